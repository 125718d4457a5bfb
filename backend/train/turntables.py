"""Turntables to learn from: K views at equal steps of azimuth, one elevation, a fixed distance and field of view, on white. Of procedural
objects (objects.py), rendered here, or of the user's own assets, rendered by the add-on into folders of views.

The paper (IM-3D, section 3.1) trains its generator on such turntables of 3D assets; the elevation is uniform in 0 to 45 degrees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from backend.mesh.raster import corner_weights, project, z_buffer
from backend.train.objects import Object, make
from backend.views.cameras import Camera
from backend.views.orbit import Orbit
from protocol.errors import KilnError

VIEWS = 16
FOV = 40.0  # degrees
ELEVATIONS = (0.0, 45.0)  # degrees
SUPERSAMPLE = 3  # rays along a pixel's edge
OFF = 2.0  # degrees, and percent of the distance, that a camera may be off the orbit


@dataclass(frozen=True)
class Turntable:
    """frames: float32 sRGB on white; the orbit's azimuths are equal steps from 0 on. name: for messages."""

    frames: Float[np.ndarray, "k s s 3"]
    orbit: Orbit
    name: str

    def from_view(self, first: int, count: int, size: int) -> Float[np.ndarray, "count size size 3"]:
        """`count` frames that turn once from the view `first` on, the last of them showing the first again, at another size."""
        views = len(self.frames)
        order = (first + np.round(np.arange(count) * views / (count - 1)).astype(int)) % views
        return np.stack([_resized(self.frames[index], size) for index in order])


def picture(thing: Object, camera: Camera, supersample: int = SUPERSAMPLE) -> tuple[Float[np.ndarray, "h w 3"], Float[np.ndarray, "h w"]]:
    """float32 sRGB on white, and coverage. Colours are averaged as they are encoded, as the pictures that a generator learns from are."""
    fine = camera.scaled(supersample)
    screen, inverse_depth = project(thing.vertices, fine)
    _, triangle = z_buffer(screen, inverse_depth, thing.faces, fine.width, fine.height)
    place = np.argwhere(triangle >= 0)
    face = thing.faces[triangle[place[:, 0], place[:, 1]]]
    weights = corner_weights(screen, inverse_depth, face, place).astype(np.float32)
    color = np.ones((fine.height, fine.width, 3), np.float32)
    color[place[:, 0], place[:, 1]] = np.einsum("tkc,tk->tc", thing.colors[face], weights)
    blocks = (camera.height, supersample, camera.width, supersample)
    cover = (triangle >= 0).reshape(blocks).mean((1, 3), dtype=np.float32)
    return color.reshape(*blocks, 3).mean((1, 3)), cover


def turntable(
    thing: Object, elevation: float, size: int = 64, views: int = VIEWS, fov: float = FOV
) -> tuple[Float[np.ndarray, "k h w 3"], Float[np.ndarray, "k h w"]]:
    """Pictures on white and coverage of the whole turn, from azimuth 0."""
    shots = [picture(thing, camera) for camera in Orbit.turn(views, elevation, fov).cameras(size)]
    return np.stack([shot[0] for shot in shots]), np.stack([shot[1] for shot in shots])


def elevation_of(seed: int) -> float:
    """Degrees: of the seed's `example`."""
    return float(np.random.default_rng([seed, 7]).uniform(*ELEVATIONS))


def example(seed: int, family: int | None = None, size: int = 64, views: int = VIEWS) -> Float[np.ndarray, "k h w 3"]:
    """The turntable of a seed's object at an elevation of the seed's own."""
    return turntable(make(seed, family), elevation_of(seed), size, views)[0]


def read(folder: Path) -> Turntable:
    """The turntable in a folder of views, or KilnError("bad-input") that says why it is none."""
    from backend.views import views as files  # the loader, with scipy behind it, only where files are read

    loaded = files.load(folder)
    hint = "Render it with the add-on's turntable cameras: one height, one distance, equal steps around, every camera towards the middle."

    def off(what: str) -> KilnError:
        return KilnError("bad-input", f"The views in {folder} are no turntable: {what}.", hint)

    size = loaded.images.shape[1:3]
    if size[0] != size[1]:
        raise KilnError("bad-input", f"The views in {folder} are {size[1]} x {size[0]} pixels.", "Turntables need square views.")
    eyes = np.stack([camera.centre for camera in loaded.cameras])
    ahead = np.stack([camera.camera_from_world[2, :3] for camera in loaded.cameras])
    across = np.eye(3) - ahead[:, :, None] * ahead[:, None, :]  # onto the plane across each camera's axis
    middle = np.linalg.lstsq(across.sum(0), (across @ eyes[:, :, None]).sum(0)[:, 0], rcond=None)[0]
    out = eyes - middle
    distance = np.linalg.norm(out, axis=1)
    aside = np.degrees(np.arccos(np.clip(-(out * ahead).sum(1) / distance, -1, 1))).max()
    if aside > OFF:
        raise off(f"a camera looks {aside:.1f} degrees past the others' middle")
    if np.ptp(distance) > OFF / 50 * distance.mean():
        raise off(f"distances go from {distance.min():.3g} to {distance.max():.3g} units")
    heights = np.degrees(np.arcsin(np.clip(out[:, 2] / distance, -1, 1)))
    if np.ptp(heights) > 2 * OFF:
        raise off(f"elevations go from {heights.min():.1f} to {heights.max():.1f} degrees")
    azimuths = np.degrees(np.arctan2(out[:, 0], -out[:, 1])) % 360
    order = np.argsort((azimuths - azimuths[np.argmin(np.minimum(azimuths, 360 - azimuths))] + 1e-6) % 360)
    steps = np.diff(azimuths[order], append=azimuths[order[0]] + 360) % 360
    if np.abs(steps - 360 / len(steps)).max() > OFF:
        raise off(f"steps between neighbours go from {steps.min():.1f} to {steps.max():.1f} degrees")
    alpha = loaded.alpha[order][..., None]
    frames = (loaded.images[order] * alpha + (1 - alpha)).astype(np.float32)
    camera = loaded.cameras[0]
    fov = math.degrees(2 * math.atan(camera.width / 2 / camera.fx))
    orbit = Orbit(np.arange(len(order)) * 360.0 / len(order), float(heights.mean()), fov, float(distance.mean()))
    return Turntable(frames, orbit, str(folder))


def _resized(frame: Float[np.ndarray, "h w 3"], size: int) -> Float[np.ndarray, "s s 3"]:
    if len(frame) == size:
        return frame
    bands = [
        np.asarray(Image.fromarray(np.ascontiguousarray(frame[..., k])).resize((size, size), Image.Resampling.LANCZOS)) for k in range(3)
    ]
    return np.stack(bands, -1).clip(0, 1)
