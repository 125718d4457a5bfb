"""From a field to a game-ready mesh: marching cubes, cleaning, UV charts, baking, GLB."""
