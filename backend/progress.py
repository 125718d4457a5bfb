"""How a long step reports: every step takes `progress=silent` and works without anyone listening."""

from collections.abc import Callable

import numpy as np

# progress(fraction in [0, 1], text, preview): `preview` is an H x W x 3 float32 picture in [0, 1], sRGB. Raises `protocol.errors.Cancelled`
# inside the step when the job was cancelled, so a step that reports at least twice a second can be stopped at once.
Progress = Callable[..., None]


def silent(fraction: float, text: str = "", preview: np.ndarray | None = None) -> None:
    """Report to nobody."""
