"""Cuts the subject out of pictures: by the matting network isnet-general-use (Qin et al. 2022) through rembg, or by the border's colour.

The network runs from a folder of the weights registry; nothing is fetched. rembg has sessions that send the picture away: none of them can
be named here, and of its code only the class that runs this one network is used. The cut-out by the border's colour needs no weights. It is
made for subjects in front of one colour or a soft gradient, as the views of turntable generators and most product pictures are.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image
from scipy import ndimage

from backend import weights
from backend.progress import Progress, silent
from backend.views.picture import FRACTION, Picture, centred, read
from protocol.errors import KilnError

NETWORK = "isnet-general-use"  # the only network that may be asked for
WAYS = ("auto", "network", "border")
FLAT = 0.1  # a border whose colours scatter more than this about a smooth background is no background
NOISE = 0.006  # sRGB, of a clean picture's background: what rounding and ringing leave
APART = 0.03, 5.0  # how far from the background a pixel is seen to belong to the subject: at least, and in units of the noise
HELD = 0.6  # share of the border that may be subject
SPECK = 0.05  # parts smaller than this share of the largest are dropped
SEAMS = 2, 6  # pixels, the thinnest and the thickest soft edge
EMPTY, FULL = 0.002, 0.98  # share of a picture that its subject covers, outside of which there is none
DOUBT = 0.3  # the network's highest answer below which it saw nothing


def matte(frames: Float[np.ndarray, "k h w 3"], how: str = "auto", progress: Progress = silent) -> Float[np.ndarray, "k h w"]:
    """Coverage of the subject in [0, 1], float32, of each picture by itself; 0 all over where nothing stands out.

    how: "network", "border", or "auto": the network if it is installed, else the border; the report's text says which. Raises
    `KilnError("no-weights")` where the network is asked for and missing, "bad-input" where a border's colour tells nothing.
    """
    how, why = way(how)
    progress(0.0, why)
    alpha = np.zeros(frames.shape[:3], np.float32)
    for number, frame in enumerate(frames):
        alpha[number] = by_network(frame, weights.folder(NETWORK)) if how == "network" else by_border(frame)
        progress((number + 1) / len(frames), f"{why} Picture {number + 1} of {len(frames)}.")
    return alpha


def way(how: str) -> tuple[str, str]:
    """What `how` comes to on this machine, "network" or "border", and a sentence that says so."""
    if how not in WAYS:
        raise KilnError("bad-parameter", f"There is no way {how!r} to cut a subject out.", f"Ways: {', '.join(WAYS)}.")
    if how == "border":
        return "border", "The subject is what differs from the border's colour."
    try:
        weights.folder(NETWORK)
    except KilnError as error:
        if how == "network" or error.code != "no-weights":
            raise
        return (
            "border",
            f"The matting network is not installed (`kiln weights pull {NETWORK}`): what differs from the border's colour is cut out.",
        )
    return "network", f"The matting network {NETWORK} cuts the subject out."


def has_subject(alpha: Float[np.ndarray, "h w"]) -> bool:
    """Whether the matte shows something in front of something else."""
    return EMPTY < float((alpha > 0.5).mean()) < FULL


def straight(
    color: Float[np.ndarray, "h w 3"], alpha: Float[np.ndarray, "h w"], behind: Float[np.ndarray, "3"] | None = None
) -> Float[np.ndarray, "h w 3"]:
    """The subject's own colours: what shone through its edges is taken out, and they go on a little beyond it.

    behind: the background's colour; None takes that of the nearest pixel outside.
    """
    sure = alpha > 0.95
    if not sure.any():
        return color
    if behind is None:
        outside = alpha < 0.02
        nearest = ndimage.distance_transform_edt(~outside, return_distances=False, return_indices=True) if outside.any() else None
        background = color if nearest is None else color[nearest[0], nearest[1]]
    else:
        background = np.asarray(behind, np.float32)
    cover = alpha[..., None]
    own = np.clip((color - (1 - cover) * background) / np.maximum(cover, 0.1), 0, 1)
    rows, columns = ndimage.distance_transform_edt(~sure, return_distances=False, return_indices=True)
    trust = np.clip((cover - 0.1) / 0.5, 0, 1)  # where little of the subject is in a pixel, its neighbours know better
    return np.where(sure[..., None], color, trust * own + (1 - trust) * color[rows, columns]).astype(np.float32)


def prepare(path: Path, how: str = "auto", size: int = 1024, fraction: float = FRACTION, progress: Progress = silent) -> Picture:
    """The subject of a picture file: cut out, in the middle of a square of `size` pixels, its longer side `fraction` of that.

    how: "auto" takes the file's transparency if it has one, else what `matte` takes; "network" and "border" are explicit.
    Raises `KilnError("bad-input")` for what is no picture, damaged, too small, too large, or shows no subject.
    """
    path = Path(path)
    progress(0.0, f"Reading {path.name}")
    color, alpha = read(path, most=4 * size)
    if alpha is not None and float(alpha.max()) < 0.05:
        raise KilnError("bad-input", f"{path.name} is transparent all over: there is no object in it.", "Give another picture.")
    if alpha is not None and how == "auto":
        note = "The picture's own transparency cuts the subject out."
    else:
        if alpha is not None:
            color = color * alpha[..., None] + (1 - alpha[..., None])
        note = way(how)[1]
        alpha = matte(color[None], how, progress)[0]
        color = straight(color, alpha)
    if not has_subject(alpha):
        seen = "what was cut out fills it" if float(alpha.mean()) > 0.5 else "nothing stands out from the background"
        raise KilnError(
            "bad-input",
            f"No object was found in {path.name}: {seen}.",
            "Give a picture of one object with some background around it, or a PNG with a transparent background.",
        )
    rgba = centred(color, alpha, size, fraction, path.name)
    progress(1.0, note)
    return Picture(rgba, note)


# --- by the border's colour ---------------------------------------------------------------------------------------------------------------


def by_border(frame: Float[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w"]:
    """What differs from a smooth background that the border shows. Holes through which the background is seen stay holes; parts inside
    that are only nearly of its colour are the subject's. `KilnError("bad-input")` if the border is not of one colour."""
    frame = np.asarray(frame, np.float32)
    background, noise = _background(frame)
    off = np.sqrt(((frame - background) ** 2).mean(2))
    near = max(APART[0], APART[1] * noise)
    apart = off > near
    outer = _touching_border(~apart)
    inner = ~apart & ~outer
    solid = apart | (inner & ~_holes(off, inner, noise))
    solid = _large_parts(solid)
    if not solid.any():
        return np.zeros(frame.shape[:2], np.float32)
    border = np.concatenate([solid[0], solid[-1], solid[:, 0], solid[:, -1]])
    if border.mean() > HELD:
        raise _no_background()
    return _soft(frame, background, solid, near)


def _background(frame: np.ndarray) -> tuple[np.ndarray, float]:
    """A quadratic surface through the border's colours, robust against a subject that touches it (iteratively reweighted least squares
    with Tukey's weights), and the noise about it."""
    height, width = frame.shape[:2]
    rim = max(1, round(0.02 * min(height, width)))
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], -1)
    ring = np.ones((height, width), bool)
    ring[rim:-rim, rim:-rim] = False
    samples, colors = terms[ring], frame[ring]
    start = np.median(colors, 0)
    fitted = np.zeros((6, 3), np.float32)
    fitted[0] = start
    for _ in range(12):
        off = np.sqrt(((colors - samples @ fitted) ** 2).mean(1))
        scale = max(1.4826 * float(np.median(off)), NOISE)
        weight = np.clip(1 - (off / (4 * scale)) ** 2, 0, 1) ** 2
        normal = (samples * weight[:, None]).T @ samples + 1e-3 * weight.sum() * np.diag([0, 1, 1, 1, 1, 1])  # as flat as it can be
        fitted = np.linalg.solve(normal, (samples * weight[:, None]).T @ colors).astype(np.float32)
    off = np.sqrt(((colors - samples @ fitted) ** 2).mean(1))
    if float(np.median(off)) > FLAT / 2 or float((off < FLAT).mean()) < 1 - HELD:
        raise _no_background()
    noise = max(1.4826 * float(np.median(off)), NOISE)
    return np.clip(terms @ fitted, 0, 1), noise


def _no_background() -> KilnError:
    return KilnError(
        "bad-input",
        "The picture has no background of one colour, so its border does not tell the subject.",
        f"Install the matting network (`kiln weights pull {NETWORK}`), or give a PNG with a transparent background.",
    )


def _touching_border(where: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    labels, _ = ndimage.label(where)
    rim = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    return np.isin(labels, rim[rim > 0])


def _holes(off: np.ndarray, inner: np.ndarray, noise: float) -> np.ndarray:
    """Of the closed regions near the background's colour, those that look like nothing but background: as flat as it is."""
    labels, count = ndimage.label(inner)
    if count == 0:
        return inner
    numbers = np.arange(1, count + 1)
    sizes = ndimage.sum_labels(inner, labels, numbers)
    through = sizes >= max(9, 2e-4 * off.size)
    for number in numbers[through]:  # few; the lower quarter lies away from the region's own seam
        through[number - 1] = np.quantile(off[labels == number], 0.25) < 2 * noise
    return np.isin(labels, numbers[through])


def _large_parts(solid: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(solid, np.ones((3, 3)))
    if count < 2:
        return solid
    numbers = np.arange(1, count + 1)
    sizes = ndimage.sum_labels(solid, labels, numbers)
    return np.isin(labels, numbers[sizes >= SPECK * sizes.max()])


def _soft(frame: np.ndarray, background: np.ndarray, solid: np.ndarray, near: float) -> np.ndarray:
    """Coverage in the seam: how far a pixel's colour has come from the background's to that of the subject's nearest inner pixel."""
    deep = ndimage.distance_transform_cdt(np.pad(solid, 1, "edge"), "chessboard")[1:-1, 1:-1]
    off = np.sqrt(((frame - background) ** 2).mean(2))
    depth = _seam(off, deep)
    core = deep > depth
    thin = solid & ~ndimage.binary_dilation(core, np.ones((3, 3)), iterations=depth + 1)  # these have no inside: their middle line it is
    core |= thin & (off > 0.8 * ndimage.maximum_filter(off, 2 * depth + 1))
    rows, columns = ndimage.distance_transform_edt(~core, return_distances=False, return_indices=True)
    seam = ndimage.binary_dilation(solid, iterations=1) & ~core
    own, behind, seen = frame[rows, columns][seam], background[seam], frame[seam]
    span = own - behind
    length = (span * span).sum(1)
    share = np.clip(((seen - behind) * span).sum(1) / np.maximum(length, 1e-6), 0, 1)
    # Where the subject has almost the background's colour, or the pixel is no mixture of the two, all that is known is the hard edge.
    beside = np.sqrt(((seen - behind - share[:, None] * span) ** 2).mean(1))
    known = np.clip(np.sqrt(length / 3) / (3 * near) - 0.5, 0, 1) * np.clip(2 - beside / (2 * near), 0, 1)
    alpha = core.astype(np.float32)
    alpha[seam] = known * share + (1 - known) * solid[seam]
    return alpha


def _seam(off: np.ndarray, deep: np.ndarray) -> int:
    """How many pixels deep the subject's colours are mixed with the background's: until they come no further from it."""
    shells = [off[deep == depth] for depth in range(1, SEAMS[1] + 3)]
    typical = np.array([float(np.median(shell)) if len(shell) > 20 else 0.0 for shell in shells])
    rising = typical[1:] > 1.25 * typical[:-1]
    return int(np.clip(np.flatnonzero(~rising)[0] + 1 if not rising.all() else SEAMS[1], *SEAMS))


# --- by the network -----------------------------------------------------------------------------------------------------------------------


def by_network(frame: Float[np.ndarray, "h w 3"], folder: Path) -> Float[np.ndarray, "h w"]:
    """What the network in `folder` takes for the subject. `KilnError("no-weights")` if it cannot be loaded."""
    path = folder / f"{NETWORK}.onnx"
    session = _session(path, path.stat().st_mtime_ns if path.exists() else 0)
    picture = Image.fromarray((np.clip(frame, 0, 1) * 255 + 0.5).astype(np.uint8), "RGB")
    given = session.normalize(picture, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0), (1024, 1024))
    answer = np.asarray(session.inner_session.run(None, given)[0], np.float32)[0, 0]
    if not np.isfinite(answer).all() or float(answer.max()) < DOUBT:
        return np.zeros(frame.shape[:2], np.float32)
    low, high = float(answer.min()), float(answer.max())
    if high > low:  # stretched to [0, 1], as its authors do
        answer = (answer - low) / (high - low)
    sized = Image.fromarray(answer, "F").resize((frame.shape[1], frame.shape[0]), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(sized, np.float32), 0, 1)


def is_warm() -> bool:
    """Whether the matting network is in memory, ready for a next job."""
    return _session.cache_info().currsize > 0


def release() -> None:
    """Gives its memory back."""
    _session.cache_clear()


@functools.lru_cache(maxsize=1)
def _session(path: Path, changed: int) -> Any:
    """rembg's session of the network in the file `path`; `changed`, its time, tells a new file from an old one."""
    try:
        import onnxruntime
        from rembg.sessions.dis_general_use import DisSession
    except ImportError as error:
        raise KilnError(
            "unavailable", f"The matting network cannot run: {error}.", "Set the backend up again, or set generate.matte to border."
        ) from None
    onnxruntime.disable_telemetry_events()
    onnxruntime.set_default_logger_severity(3)

    class Local(DisSession):
        @classmethod
        def download_models(cls, *args, **kwargs):
            """Where the network is. rembg's own would fetch it."""
            return str(path)

    offered = onnxruntime.get_available_providers()
    providers = [one for one in ("CUDAExecutionProvider", "CPUExecutionProvider") if one in offered]
    try:
        return Local(NETWORK, onnxruntime.SessionOptions(), providers=providers)
    except Exception as error:  # onnxruntime has a class of its own for each way to fail
        raise KilnError(
            "no-weights", f"The matting network in {path.parent} cannot be loaded: {error}.", f"`kiln weights verify {NETWORK}` tells more."
        ) from None
