"""What a folder of views may hold (SPEC.md, "Views" and "Motion"): the extension refuses more before it renders, the backend before it
reads."""

MOST_VIEWS = 500  # of a still subject
MOST_MOVING_VIEWS = 5500  # over all frames
MOST_PIXELS = 500_000_000  # over all views: about 14 GB with depth, normals and material
