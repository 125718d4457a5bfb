"""Views of a coloured ball, computed from its equation: input for tests that need a whole job."""

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

from backend.views.cameras import OPENCV_FROM_OPENGL, look_at

FOV = math.radians(40)


def write_ball(folder: Path, size: int = 96, count: int = 20, radius: float = 0.7) -> None:
    """`count` views of `size` pixels all around; every seventh is held out."""
    frames = []
    for index in range(count):
        height, turn = 1 - 2 * (index + 0.5) / count, index * 2.399963  # evenly over the sphere: a Fibonacci lattice
        across = math.sqrt(1 - height * height)
        eye = np.array([across * math.cos(turn), across * math.sin(turn), height]) / math.sin(FOV / 2)
        camera = look_at(eye, (0, 0, 0), size, FOV)
        rays = camera.unproject(np.ones((size, size))) - eye  # of depth 1 along the axis, so lengths along them are depths
        along, squared = (rays * eye).sum(-1), (rays * rays).sum(-1)
        inside = along**2 - squared * (eye @ eye - radius**2)
        hit = inside > 0
        depth = np.where(hit, (-along - np.sqrt(np.maximum(inside, 0))) / squared, 0)
        points = eye + rays * depth[..., None]
        color = np.where(hit[..., None], 0.5 + 0.4 * np.sin(6 * points), 0)
        pixels = (np.dstack([color, hit]) * 255).astype(np.uint8)
        Image.fromarray(pixels, "RGBA").save(folder / f"color_{index:03}.png")
        normal = np.where(hit[..., None], points / radius, 0).astype(np.float16)
        np.savez_compressed(folder / f"geometry_{index:03}.npz", depth=depth.astype(np.float32), normal=normal)
        frames.append(
            {
                "file_path": f"color_{index:03}.png",
                "geometry_file_path": f"geometry_{index:03}.npz",
                "split": "holdout" if index % 7 == 3 else "train",
                "transform_matrix": (camera.world_from_camera @ OPENCV_FROM_OPENGL).tolist(),
            }
        )
    table = {"w": size, "h": size, "fl_x": camera.fx, "fl_y": camera.fy, "cx": camera.cx, "cy": camera.cy, "frames": frames}
    (folder / "transforms.json").write_text(json.dumps(table))
