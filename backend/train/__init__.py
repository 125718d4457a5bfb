"""Models trained on pictures of objects that our own code makes, or of the user's own assets."""
