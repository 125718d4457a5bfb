"""What `im3d` hands over: the files of an asset together with the turntable that it was made from, or the turntable alone."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from backend.pipelines.asset import PAPER, Asset, coded
from backend.views.views import Views

SHEET_SIDE = 256  # pixels of a view on the contact sheet, at most


@dataclass(frozen=True)
class TurntableAsset:
    """The views alone, for a person to look at before the fit."""

    views: Views
    report: dict[str, Any]

    def save(self, folder: Path) -> None:
        """view_000.png ... (straight alpha), turntable.png (all of them on one sheet), report.json."""
        save_views(self.views, folder)
        (folder / "report.json").write_text(json.dumps(self.report, indent=1, allow_nan=False), encoding="utf-8")


@dataclass(frozen=True)
class PictureAsset:
    asset: Asset
    views: Views  # the turntable, as it was last refined

    def save(self, folder: Path) -> None:
        """What `Asset` saves, and the turntable."""
        self.asset.save(folder)
        save_views(self.views, folder)


def save_views(views: Views, folder: Path) -> None:
    for index in range(len(views)):
        picture = np.dstack([views.images[index], views.alpha[index]])
        Image.fromarray(coded(picture)).save(folder / f"view_{index:03d}.png")
    Image.fromarray(coded(sheet(views.images * views.alpha[..., None] + PAPER * (1 - views.alpha[..., None])))).save(
        folder / "turntable.png"
    )


def sheet(pictures: Float[np.ndarray, "k h w 3"]) -> Float[np.ndarray, "rows columns 3"]:
    """The pictures in reading order, in rows of about the same number, each at most SHEET_SIDE pixels wide."""
    step = -(-pictures.shape[2] // SHEET_SIDE)
    pictures = pictures[:, ::step, ::step]
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = -(-len(pictures) // columns)
    blank = np.broadcast_to(PAPER, (rows * columns - len(pictures), *pictures.shape[1:]))
    grid = np.concatenate([pictures, blank]).reshape(rows, columns, *pictures.shape[1:])
    return grid.transpose(0, 2, 1, 3, 4).reshape(rows * pictures.shape[1], columns * pictures.shape[2], 3)
