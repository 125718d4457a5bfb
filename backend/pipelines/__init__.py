"""One file a recipe: a straight-line function from inputs to an asset."""
