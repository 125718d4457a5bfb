"""A job with views that cannot be used ends in one sentence, and what to do about it, from the recipe itself."""

import json

import numpy as np
import pytest
from PIL import Image

from backend.pipelines.reconstruct import reconstruct
from backend.pipelines.run import Run
from protocol import recipes
from protocol.errors import KilnError
from tests.backend.ball import write_ball


def table(folder, change):
    content = json.loads((folder / "transforms.json").read_text())
    change(content)
    (folder / "transforms.json").write_text(json.dumps(content))


def cover(folder, of):
    """Replaces alpha of each picture by what `of` makes of its number and alpha."""
    for index, path in enumerate(sorted(folder.glob("color_*.png"))):
        pixels = np.array(Image.open(path))
        pixels[..., 3] = of(index, pixels[..., 3])
        Image.fromarray(pixels, "RGBA").save(path)


def bar(index, alpha):
    """Another subject in every second picture: a flat bar."""
    rows = np.abs(np.arange(len(alpha)) - len(alpha) / 2) < 3
    return np.where(rows[:, None], 255, 0) if index % 2 else alpha


def unreadable(folder):
    path = folder / "color_004.png"
    path.write_bytes(path.read_bytes()[:200])


def not_a_number(folder):
    with np.load(folder / "geometry_003.npz") as packed:
        arrays = dict(packed)
    arrays["depth"][5, 5] = np.nan
    np.savez_compressed(folder / "geometry_003.npz", **arrays)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "transforms.json").unlink(), "no transforms.json"),
        (lambda folder: table(folder, lambda content: content.update(frames=content["frames"][:1])), "1 views are too few"),
        (lambda folder: cover(folder, bar), "silhouettes do not fit together"),
        (lambda folder: cover(folder, lambda index, alpha: alpha * 0), "alpha is 0 everywhere"),
        (lambda folder: cover(folder, lambda index, alpha: alpha * 0 + 255), "have no alpha"),
        (lambda folder: cover(folder, lambda index, alpha: alpha // 4), "alpha stays below 0.5"),
        (unreadable, "View 4 .* cannot be read"),
        (not_a_number, "View 3.* wrong shape or values"),
    ],
)
def test_views_that_cannot_be_used_end_the_job_in_a_sentence(tmp_path, spoil, says):
    write_ball(tmp_path, size=48, count=12)
    spoil(tmp_path)
    smallest = {"fit.splats": 500, "fit.iterations": 50, "surface.grid": 32, "surface.faces": 200, "texture.size": 64, "fit.device": "cpu"}
    with pytest.raises(KilnError, match=says) as refused:
        reconstruct(Run(), tmp_path, recipes.make("reconstruct", smallest))
    assert refused.value.code == "bad-input" and refused.value.hint
