"""What a batch is to make: a FOLDER of assets, or a list in TOML or CSV, as items whose every parameter is checked before anything runs.

What is wrong with one item (a file that is not there, a value out of range) stands in its `error`, and the others go on; a manifest that
cannot be understood as a whole is refused with the file and the line. docs/batch.md shows manifests.
"""

from __future__ import annotations

import csv
import dataclasses
import fnmatch
import glob
import json
import os
import re
import string
import tomllib
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend.batch import blender
from protocol import picture, recipes
from protocol.errors import KilnError
from protocol.splats import is_splats

MODELS = (".blend", ".glb", ".gltf", ".obj", ".fbx", ".usd", ".usda", ".usdc", ".usdz", ".ply", ".stl")  # Blender imports these
WITH_TEXTURES = (".blend", ".gltf", ".obj", ".fbx", ".usd", ".usda", ".usdc")  # whose pictures are files beside them, or below
PRESET = "standard"
LONGEST_NAME = 80  # characters, so that OUT/<name>/<file> stays below what Windows takes
TAKEN_NAMES = ("thumbnails", "cancel", "index", "report", "lock", "listings")  # in the folder of results
RECORD = "item.json"  # in the folder of an item's results: what they were made of
_KEYS = ("file", "name", "recipe", "preset", "object", "collection", "parameters")
_MATERIAL = {  # what a file is -> the inputs that recipes can be given of it
    "model": ("views", "motion"),
    "picture": ("picture",),
    "splats": ("splats",),
    "views": ("views", "motion", "picture"),
}
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Item:
    """One asset to make. What `error` names keeps it from being made."""

    number: int  # in the manifest, from 1
    where: str  # in the manifest: "line 12"
    file: Path  # absolute; a folder where views were captured already
    kind: str  # "model", "picture", "splats" or "views"
    recipe: str
    preset: str
    values: dict[str, Any] = field(default_factory=dict)  # every parameter by its flat name
    pattern: str = ""  # of the name
    name: str = ""  # of the asset and its folder, once `named`
    object: str = ""  # of a .blend: objects by pattern
    collection: str = ""  # or collections
    subject: dict[str, str] | None = None  # {"kind": "object" or "collection", "name"}, once it is known
    note: str = ""  # for the report
    error: KilnError | None = None

    @property
    def has_many(self) -> bool:
        """Whether Blender must say which assets the file holds."""
        return self.error is None and self.subject is None and self.file.suffix.lower() == ".blend"


@dataclass(frozen=True)
class Overrides:
    """What the command line says over a manifest; texts are read by the parameter's type."""

    recipe: str = ""
    preset: str = ""
    parameters: dict[str, str] = field(default_factory=dict)


def read(path: Path, overrides: Overrides, made: Iterable[Path], say: Callable[[str], None] = lambda text: None) -> list[Item]:
    """The items of a folder, of a manifest file or of a single asset, each `.blend` still as one. made: the folder of results and the asset
    library, which are no sources.

    Raises KilnError("bad-manifest") where the whole cannot be understood, and "bad-parameter" or "bad-recipe" for overrides that no item
    could follow.
    """
    path = Path(os.path.abspath(path))
    _check_overrides(overrides)
    if path.is_dir():
        if path in (Path(os.path.abspath(one)) for one in made):
            raise KilnError("bad-manifest", f"The results would lie among the sources, in {path}.", "Name another --out.")
        found = [(f"{path.name}/{file.relative_to(path).as_posix()}", {"file": str(file)}) for file in _assets_in(path, made, say)]
        if not found:
            raise KilnError("bad-manifest", f"{path} holds nothing that Kiln reads.", f"It reads {_kinds()}.")
        return _items(found, {}, path, overrides, made)
    if not path.is_file():
        raise KilnError("bad-manifest", f"There is no {path}.", "Give a folder of assets, or a list of them in a .toml or .csv file.")
    if path.suffix.lower() == ".csv":
        return _items(_rows(path), {}, path.parent, overrides, made, texts=True)
    if path.suffix.lower() == ".toml":
        found, defaults = _table(path)
        return _items(found, defaults, path.parent, overrides, made)
    if path.suffix.lower() in (*MODELS, ".spz", *picture.SUFFIXES):  # a .blend can hold hundreds
        return _items([(path.name, {"file": str(path)})], {}, path.parent, overrides, made)
    raise KilnError("bad-manifest", f"{path.name} is no manifest: one ends in .toml or .csv.", "docs/batch.md shows both.")


def resolved(items: Iterable[Item], ask: Callable[[Item], list[dict[str, str]]]) -> list[Item]:
    """The items with each `.blend` taken apart into its objects or collections. ask: what Blender finds, or a KilnError;
    one that says that there is no Blender is nobody's own and raised."""
    found: list[Item] = []
    for item in items:
        if not item.has_many:
            found.append(item)
            continue
        try:
            subjects = ask(item)
            if not subjects:
                wanted = f"collection {item.collection!r}" if item.collection else f"object {item.object!r}" if item.object else "object"
                hint = "Names are compared as they stand; * stands for any characters. Without a pattern, all objects with a surface count."
                raise KilnError("bad-input", f"{item.file.name} has no {wanted} that could be rendered.", hint)
            one = len(subjects) == 1
            found += [
                dataclasses.replace(item, subject=subject, pattern=item.pattern or ("{stem}" if one else "{object}"))
                for subject in subjects
            ]
        except KilnError as error:
            if error.code in blender.MISSING:
                raise
            found.append(dataclasses.replace(item, error=_at(item.where, error)))
    return found


def named(items: Iterable[Item]) -> list[Item]:
    """The items with their names: safe as file names on every system, each once (the second of a name gets -2)."""
    owners: dict[str, str] = {name: "this folder" for name in TAKEN_NAMES}
    found = []
    for item in items:
        words = {
            "stem": item.file.name if item.kind == "views" else item.file.stem,
            "object": item.subject["name"] if item.subject else item.file.stem,
            "number": f"{item.number:03d}",
        }
        wanted = safe_name((item.pattern or "{stem}").format(**words))
        name, count = wanted, 1
        while name.casefold() in owners:
            count += 1
            name = f"{wanted}-{count}"
        note = f"Named {name}, because {wanted} is the name of {owners[wanted.casefold()]}." if name != wanted else ""
        owners[name.casefold()] = item.where
        found.append(dataclasses.replace(item, name=name, note=note))
    return found


def safe_name(text: str) -> str:
    """A name that is a file name on Linux, Windows and macOS and needs no quotes in a shell."""
    name = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", text)).strip("._- ")[:LONGEST_NAME].rstrip("._-")
    return f"asset_{name}" if _RESERVED.match(name) else name or "asset"


# -- Folder, CSV, TOML -----------------------------------------------------------------------------------------------------------------


def _assets_in(folder: Path, made: Iterable[Path], say: Callable[[str], None]) -> list[Path]:
    """Every asset below the folder, in the order of their paths. Pictures beside or below models are taken to be their textures."""
    own, found, textures = {Path(os.path.abspath(path)) for path in made}, [], 0
    with_models: list[Path] = []
    for place, folders, files in os.walk(folder):
        here = Path(place)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and here / name not in own)
        if "transforms.json" in files and here != folder:
            found.append(here)
            folders.clear()
            continue
        if any(name.lower().endswith(WITH_TEXTURES) for name in files):
            with_models.append(here)
        is_textures = any(here == one or one in here.parents for one in with_models) or here.name.lower() in ("textures", "texture", "maps")
        for name in sorted(files):
            if name.startswith(".") or here / name in own:
                continue
            if name.lower().endswith((*MODELS, ".spz")):
                found.append(here / name)
            elif name.lower().endswith(picture.SUFFIXES):
                textures += is_textures
                if not is_textures:
                    found.append(here / name)
    if textures:
        say(f"{textures} pictures lie beside models and count as their textures; a manifest can name pictures as assets.")
    return sorted(found)


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(where, entry) of each row of a CSV file; its columns that are no key are parameters."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            head = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter=max(",;\t", key=head.count), strict=True, skipinitialspace=True)
            columns = [(column or "").strip() for column in reader.fieldnames or ()]
            if "file" not in columns:
                raise _bad(path, 1, f"there is no column `file` but {', '.join(columns) or 'nothing'}", "The first line names the columns.")
            for column in columns:
                if columns.count(column) > 1:
                    raise _bad(path, 1, f"the column {column!r} stands there twice", "Remove one.")
                if column not in _KEYS and column not in _parameters() or column == "parameters":
                    raise _bad(
                        path, 1, f"{column!r} is no column", f"Columns: {', '.join(_KEYS[:-1])}, and parameters such as texture.size."
                    )
            reader.fieldnames = columns
            found = []
            for row in reader:
                line = reader.line_num
                if None in row or None in row.values() and any(row.values()):
                    count = len(columns) + len(row.get(None) or ()) - sum(value is None for value in row.values())
                    raise _bad(path, line, f"{count} cells under {len(columns)} columns", "Put a text with a comma into quotes.")
                cells = {column: cell.strip() for column, cell in row.items() if cell and cell.strip()}
                if cells:
                    entry: dict[str, Any] = {column: cell for column, cell in cells.items() if column in _KEYS}
                    entry["parameters"] = {column: cell for column, cell in cells.items() if column not in _KEYS}
                    found.append((f"{path.name}, line {line}", entry))
    except UnicodeDecodeError as error:
        raise _bad(path, 0, f"it is not UTF-8 text ({error.reason})", "Save it as UTF-8; spreadsheets call it CSV UTF-8.") from None
    except csv.Error as error:
        raise _bad(path, reader.line_num, str(error), "Every row has a cell for each column, between commas.") from None
    except OSError as error:
        raise _bad(path, 0, error.strerror or str(error), "Check the file.") from None
    if not found:
        raise _bad(path, 0, "it lists nothing", "Every line after the first is an asset.")
    return found


def _table(path: Path) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, Any]]:
    """(where, entry) of each of the [[items]], and the [defaults]."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise _bad(path, 0, str(error), "Save it as UTF-8 text.") from None
    except tomllib.TOMLDecodeError as error:
        raise _bad(path, 0, f"it is no TOML: {error}", "docs/batch.md shows a manifest; texts stand in quotes.") from None
    entries, defaults = content.pop("items", []), content.pop("defaults", {})
    if content:
        raise _bad(path, 0, f"{next(iter(content))!r} stands there", "A manifest has [defaults] and [[items]].")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise _bad(path, 0, "it lists nothing", 'Add an item: [[items]] and file = "props/*.glb".')
    if not isinstance(defaults, dict):
        raise _bad(path, 0, "`defaults` is no table", "Write [defaults], and below it recipe, preset or parameters.")
    allowed = ("name", "recipe", "preset", "parameters")
    for key, value in defaults.items():
        if key not in allowed:
            raise _bad(path, 0, f"[defaults] has {key!r}", f"Allowed: {', '.join(allowed)}.")
        _check_type(key, value, lambda words, hint: _bad(path, 0, f"in [defaults], {words}", hint))
    defaults["parameters"] = _flat(defaults.get("parameters", {}))
    for name in defaults["parameters"]:
        if name not in _parameters():
            raise _bad(path, 0, f"in [defaults], no recipe has a parameter {name!r}", "docs/recipes.md lists them.")
    lines = [number for number, line in enumerate(text.splitlines(), 1) if re.match(r"\s*\[\[\s*items\s*\]\]", line)]
    known = len(lines) == len(entries)
    places = [f"{path.name}, line {lines[index]}" if known else f"{path.name}, item {index + 1}" for index in range(len(entries))]
    return list(zip(places, entries)), defaults


def _flat(parameters: dict[str, Any], before: str = "") -> dict[str, Any]:
    """{"texture.size": 512} also of texture.size = 512 without quotes, which TOML reads as a table in a table."""
    found: dict[str, Any] = {}
    for name, value in parameters.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return found


# -- Items -----------------------------------------------------------------------------------------------------------------------------


def _items(
    entries: list[tuple[str, dict[str, Any]]], defaults: dict[str, Any], folder: Path, overrides: Overrides, made: Iterable[Path],
    texts: bool = False,
) -> list[Item]:  # fmt: skip
    """texts: parameters are texts, of a CSV file."""
    items: list[Item] = []
    for where, entry in entries:
        try:
            files = _files(entry, folder, made)
        except KilnError as error:
            file = folder / str(entry.get("file", ""))
            pattern = "item_{number}" if glob.has_magic(file.name) or not file.stem else ""
            items.append(Item(len(items) + 1, where, file, "", "", "", pattern=pattern, error=_at(where, error)))
            continue
        for file in files:
            items.append(_item(len(items) + 1, where, file, entry, defaults, overrides, texts))
    return items


def _files(entry: dict[str, Any], folder: Path, made: Iterable[Path]) -> list[Path]:
    """The files that an entry names, after a look at its keys. A pattern means nothing that was made; a whole name means what it says."""
    for key, value in entry.items():
        if key not in _KEYS:
            raise KilnError("bad-manifest", f"An item has no key {key!r}.", f"Keys: {', '.join(_KEYS)}.")
        _check_type(key, value, lambda words, hint: KilnError("bad-manifest", f"{words[0].upper()}{words[1:]}.", hint))
    given = entry.get("file", "")
    if not given:
        raise KilnError("bad-manifest", "The item names no file.", 'Add file = "NAME".')
    path = folder / Path(given.replace("\\", "/") if os.sep == "/" else given).expanduser()
    if path.exists():
        return [Path(os.path.abspath(path))]
    if glob.has_magic(given):
        known = (*MODELS, *picture.SUFFIXES, ".spz")
        found = sorted(Path(os.path.abspath(one)) for one in glob.glob(str(path), recursive=True))
        found = [one for one in found if one.suffix.lower() in known or (one / "transforms.json").is_file()]
        found = [one for one in found if not _is_made(one, made)]
        if found:
            return found
        raise KilnError("bad-input", f"No file fits {given!r}.", f"Patterns are taken from {folder}; Kiln reads {_kinds()}.")
    raise KilnError("bad-input", f"There is no file {given!r}.", f"Paths are taken from {folder}.")


def _is_made(file: Path, made: Iterable[Path]) -> bool:
    """Whether an earlier run made a file: one that lies with an item's results, which may be a folder beside the sources (--out .)."""
    for own in (Path(os.path.abspath(one)) for one in made):
        if own in file.parents:
            top = own / file.relative_to(own).parts[0]
            if top.name in TAKEN_NAMES or (top / RECORD).is_file():
                return True
        elif file == own:
            return True
    return False


def _item(number: int, where: str, file: Path, entry: dict[str, Any], defaults: dict[str, Any], overrides: Overrides, texts: bool) -> Item:
    merged = {**defaults, **entry}
    recipe = overrides.recipe or merged.get("recipe", "")
    item = Item(
        number, where, file, "", recipe, overrides.preset or merged.get("preset", PRESET),
        object=merged.get("object", ""), collection=merged.get("collection", ""),
    )  # fmt: skip
    try:
        _check_pattern(merged.get("name", ""))
        item = dataclasses.replace(item, pattern=merged.get("name", ""))
        kind = kind_of(file)
        recipe = recipe or _usual(kind, file)
        wanted = recipes.recipe_named(recipe).INPUT
        if wanted in {input for inputs in _MATERIAL.values() for input in inputs}:
            _check_material(file, kind, recipe, wanted)
        else:
            kind = "files"  # of a recipe kept elsewhere
        if file.suffix.lower() != ".blend" and (item.object or item.collection):
            raise KilnError("bad-manifest", f"`object` and `collection` are for .blend files; {file.name} is one asset.", "Leave them out.")
        if item.object and item.collection:
            raise KilnError("bad-manifest", "An item has `object` or `collection`, not both.", "Make two items of it.")
        known = {parameter.name: parameter for parameter in recipes.parameters(recipes.RECIPES[recipe])}
        own = _flat(entry.get("parameters", {}))
        if texts:
            own = {name: known[name].read(text) if name in known else text for name, text in own.items()}
        chosen = {name: value for name, value in _flat(defaults.get("parameters", {})).items() if name in known} | own
        chosen |= {name: known[name].read(text) for name, text in overrides.parameters.items() if name in known}
        values = recipes.values(recipes.make(recipe, chosen, item.preset))
        return dataclasses.replace(item, kind=kind, recipe=recipe, values=values)
    except KilnError as error:
        return dataclasses.replace(item, recipe=recipe, error=_at(where, error))


def kind_of(file: Path) -> str:
    """What a file is, by its name, and of a .ply by its first lines: "model", "picture", "splats", "views" or "" (unknown)."""
    suffix = file.suffix.lower()
    if file.is_dir() or file.name == "transforms.json":
        return "views" if (file / "transforms.json").is_file() or file.is_file() else ""
    if is_splats(file):
        return "splats"
    return "model" if suffix in MODELS else "picture" if suffix in picture.SUFFIXES else ""


def _usual(kind: str, file: Path) -> str:
    """The recipe for what no recipe was said for."""
    if kind == "views":
        folder = file if file.is_dir() else file.parent
        try:
            frames = json.loads((folder / "transforms.json").read_text(encoding="utf-8"))["frames"]
            return "animate" if any("frame" in frame for frame in frames) else "reconstruct"
        except (OSError, ValueError, KeyError, TypeError):
            return "reconstruct"  # which says what is wrong with the file
    if kind == "":
        raise KilnError("bad-input", f"{file.name} is nothing that Kiln reads.", f"It reads {_kinds()}.")
    return {"model": "reconstruct", "picture": "im3d", "splats": "mesh_splats"}[kind]


def _check_material(file: Path, kind: str, recipe: str, wanted: str) -> None:
    possible = _MATERIAL.get(kind, ())
    if file.suffix.lower() == ".blend":
        possible += ("splats",)
    if wanted not in possible:
        others = [name for name, one in recipes.RECIPES.items() if one.INPUT in possible]
        words = {"model": "a model", "picture": "a picture", "splats": "splats", "views": "captured views"}.get(kind, "unknown to Kiln")
        hint = f"Recipes for it: {', '.join(others)}." if others else f"Kiln reads {_kinds()}."
        raise KilnError("bad-recipe", f"{recipe} cannot start from {file.name}, which is {words}.", hint)


def _check_overrides(overrides: Overrides) -> None:
    """Refuses what is wrong for every recipe before anything is read."""
    if overrides.recipe:
        recipes.recipe_named(overrides.recipe)
    found = [recipes.RECIPES[overrides.recipe]] if overrides.recipe else list(recipes.RECIPES.values())
    if overrides.preset and not any(overrides.preset in recipe.PRESETS for recipe in found):
        raise KilnError("bad-parameter", f"There is no preset {overrides.preset!r}.", f"Presets: {', '.join(found[0].PRESETS)}.")
    for name, text in overrides.parameters.items():
        known = [p for recipe in found for p in recipes.parameters(recipe) if p.name == name]
        if not known:
            raise KilnError("bad-parameter", f"No recipe has a parameter {name!r}.", "`kiln run RECIPE --help` lists them.")
        refusals = []
        for parameter in known:
            try:
                parameter.check(parameter.read(text))
            except KilnError as error:
                refusals.append(error)
        if len(refusals) == len(known):  # what one recipe allows is a matter of the items
            raise refusals[0]


def _check_pattern(pattern: str) -> None:
    try:
        fields = [(field, spec, conversion) for _, field, spec, conversion in string.Formatter().parse(pattern) if field is not None]
    except ValueError as error:
        raise KilnError("bad-manifest", f"The name {pattern!r} is no pattern: {error}.", "Write {stem}, {object} or {number}.") from None
    for name, spec, conversion in fields:
        if name not in ("stem", "object", "number") or spec or conversion:
            raise KilnError("bad-manifest", f"The name {pattern!r} asks for {{{name}}}.", "There are {stem}, {object} and {number}.")


def _check_type(key: str, value: Any, refuse: Callable[[str, str], KilnError]) -> None:
    if key == "parameters" and not isinstance(value, dict):
        raise refuse(f"`parameters` is {value!r}", 'Write parameters = { "texture.size" = 1024 }.')
    if key != "parameters" and not isinstance(value, str):
        raise refuse(f"`{key}` is {value!r}", "Put a text into quotes.")


def _at(where: str, error: KilnError) -> KilnError:
    """The error with its place in the manifest."""
    return KilnError(error.code, f"{where}: {error.message}", error.hint)


def _bad(path: Path, line: int, what: str, hint: str) -> KilnError:
    return KilnError("bad-manifest", f"{path.name}{f', line {line}' if line else ''}: {what}.", hint)


def _parameters() -> set[str]:
    return {parameter.name for recipe in recipes.RECIPES.values() for parameter in recipes.parameters(recipe)}


def _kinds() -> str:
    names = [suffix[1:] for suffix in (*MODELS, ".spz", *picture.SUFFIXES)]
    return f"{', '.join(names)}, and folders with transforms.json"


def matches(item: Item, patterns: Iterable[str]) -> bool:
    """Whether an item is meant by one of the patterns of names."""
    return any(fnmatch.fnmatchcase(item.name.casefold(), pattern.casefold()) for pattern in patterns)
