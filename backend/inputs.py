"""The input files of a recipe, gathered from a folder or a file on this disk by the names that they have on the wire."""

from __future__ import annotations

from pathlib import Path

from backend.store import check_name
from protocol import picture, views
from protocol.errors import KilnError


def gather(path: Path, kind: str) -> dict[str, Path]:
    """The input files of a recipe, by the names that they have for it: what `transforms.json` names, a file of splats, or a folder."""
    if kind == "splats":
        return _gather_splats(path)
    if path.is_file() and path.name != "transforms.json" and kind in ("views", "motion"):
        raise KilnError(
            "bad-input",
            f"{path.name} is no folder of views.",
            "Give pictures from several cameras and their places in transforms.json. One picture: `kiln run im3d`; no recipe takes video.",
        )
    if path.is_file() and path.name != "transforms.json":
        return {check_name(path.name): path}
    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        raise KilnError("bad-input", f"There is no folder {path}.", "Give a folder of inputs.")
    if kind not in ("views", "motion"):
        return {check_name(file.relative_to(folder).as_posix()): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return views.files(folder, [check_name(name) for name in views.names(folder)])


def gather_picture(given: Path | None, image: Path | None, turntable: Path | None, prompt: str) -> tuple[dict[str, Path], Path | None]:
    """The input files of a recipe that starts from a picture, and which of the paths they come from; None where the prompt is all."""
    if given is not None and (image is not None or turntable is not None):
        raise KilnError("bad-input", f"Besides {given} there is {image or turntable}.", "Give one of INPUT, --image and --views.")
    if given is not None:
        image, turntable = (None, given) if given.is_dir() or given.name == "transforms.json" else (given, None)
    found = picture.gather(image, turntable, prompt)
    return {check_name(name): file for name, file in found.items()}, image or turntable


def _gather_splats(path: Path) -> dict[str, Path]:
    """One file, called splats.ply or splats.spz for the recipe. Of a results folder, splats.ply, which is exact."""
    files = [path] if path.is_file() else sorted(one for one in path.glob("*") if one.suffix.lower() in (".ply", ".spz"))
    files = [one for one in files if one.name == "splats.ply"] or files
    if not path.exists():
        raise KilnError("bad-input", f"There is no {path}.", "Give a .ply or .spz file of splats.")
    if len(files) != 1 or files[0].suffix.lower() not in (".ply", ".spz"):
        found = f"{len(files)} .ply and .spz files" if len(files) != 1 else "not splats by its name"
        raise KilnError("bad-input", f"{path} is {found}." if path.is_file() else f"{path} holds {found}.", "Give one .ply or .spz file.")
    return {"splats" + files[0].suffix.lower(): files[0]}
