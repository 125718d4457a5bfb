"""What may stay of splats that another tool has written: how many there may be, and which of them can be drawn at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool

from protocol.errors import KilnError

from .model import Splats

# Reading, drawing and meshing take up to 1 kB a Gaussian with all its spherical harmonics: 5 GB for so many.
MOST_SPLATS = 5_000_000
LEAST_LOG, MOST_LOG = -50.0, 50.0  # natural logarithms of lengths; what lies beyond is a point, or everything


def check_count(count: int, name: str) -> None:
    """Refuses a file by what its header says, before memory is spent."""
    if count == 0:
        raise KilnError("bad-input", f"{name} holds no Gaussians.", "Export it again.")
    if count > MOST_SPLATS:
        raise KilnError(
            "bad-input", f"{name} holds {count:,} Gaussians; at most {MOST_SPLATS:,} can be read.",
            "Crop it to the subject in a splat editor and export it again.",
        )  # fmt: skip


def cleaned(splats: Splats, name: str, say: Callable[[str], None] = lambda sentence: None) -> Splats:
    """The splats without those that cannot be drawn. Their counts and reasons are told to `say`; `KilnError` if none is left."""
    count = len(splats)
    with np.errstate(invalid="ignore"):
        largest = splats.log_scales.max(1)
        length = np.linalg.norm(splats.quaternions, axis=1)
        # +inf is an opaque Gaussian's logit that was saved without care, -inf an invisible one's
        problems = {
            "values that are no numbers": ~(
                _finite(splats.means) & _finite(splats.quaternions) & _finite(splats.sh) & ~np.isnan(splats.log_scales).any(1)
                & ~np.isnan(splats.opacity_logits)
            ),
            "no size": largest < LEAST_LOG,
            "no end": largest > MOST_LOG,
            "no rotation": length < 1e-12,
        }  # fmt: skip
    keep = np.ones(count, bool)
    for what, found in problems.items():
        found &= keep
        if found.any():
            say(f"{name}: {found.sum():,} of {count:,} Gaussians have {what} and are left out.")
            keep &= ~found
    if not keep.any():
        reasons = " or ".join(what for what, found in problems.items() if found.any())
        raise KilnError("bad-input", f"{name}: none of its {count:,} Gaussians can be drawn: they have {reasons}.", "Export it again.")
    kept = splats if keep.all() else chosen(splats, keep)
    flat_ones_too = np.maximum(kept.log_scales, np.float32(LEAST_LOG))  # some are saved with a thickness of 0
    return dataclasses.replace(kept, log_scales=flat_ones_too, opacity_logits=np.clip(kept.opacity_logits, -30, 30))


def chosen(splats: Splats, which: Bool[np.ndarray, "n"]) -> Splats:
    """The splats where `which` is true."""
    return Splats(**{field.name: getattr(splats, field.name)[which] for field in dataclasses.fields(splats)})


def _finite(values: np.ndarray) -> np.ndarray:
    return np.isfinite(values).reshape(len(values), -1).all(1)
