"""The files of a coloured ball's views: input for tests that need a whole job."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from backend.views.ball import ball
from backend.views.cameras import OPENCV_FROM_OPENGL


def write_ball(folder: Path, size: int = 96, count: int = 20, radius: float = 0.7) -> None:
    """`count` views of `size` pixels all around; every seventh is held out."""
    views = ball(size, count, radius)
    frames = []
    for index, camera in enumerate(views.cameras):
        pixels = (np.dstack([views.images[index], views.alpha[index]]) * 255).astype(np.uint8)
        Image.fromarray(pixels, "RGBA").save(folder / f"color_{index:03}.png")
        normal = views.normals[index].astype(np.float16)
        np.savez_compressed(folder / f"geometry_{index:03}.npz", depth=views.depth[index], normal=normal)
        frames.append(
            {
                "file_path": f"color_{index:03}.png",
                "geometry_file_path": f"geometry_{index:03}.npz",
                "split": "holdout" if views.holdout[index] else "train",
                "transform_matrix": (camera.world_from_camera @ OPENCV_FROM_OPENGL).tolist(),
            }
        )
    table = {"w": size, "h": size, "fl_x": camera.fx, "fl_y": camera.fy, "cx": camera.cx, "cy": camera.cy, "frames": frames}
    (folder / "transforms.json").write_text(json.dumps(table))
