"""Kiln for a terminal that has Blender: `blender --command kiln run FILE --out DIR`.

`run` and `setup` work in this Blender. Every other word is for the backend's own `kiln` command, which is started with the rest of the
line; `batch` then captures with this Blender. The exit code is that of `kiln batch`: 0 all well, 1 failed, 2 wrong usage, 3 no backend,
130 cancelled.
"""

from __future__ import annotations

import argparse
import fnmatch
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import bpy

from . import api, batches, importers, session
from .protocol import picture, recipes
from .protocol.errors import KilnError
from .protocol.splats import is_splats

DONE, FAILED, BAD, UNAVAILABLE, CANCELLED = 0, 1, 2, 3, 130
WRONG = ("bad-parameter", "bad-recipe", "bad-input", "bad-subject", "no-object", "nothing-selected")  # codes that say: ask otherwise
ABSENT = ("unavailable", "no-backend", "backend-died", "backend-stopped", "refused", "offline")  # codes that say: no backend


def main(arguments: list[str]) -> int:
    """What `blender --command kiln` runs: one command, its exit code. Every expected failure is a sentence and a hint on standard error."""
    session.interrupted.clear()
    before = signal.signal(signal.SIGINT, _interrupt)  # Blender's own would render on
    try:
        if arguments and arguments[0] not in ("run", "setup") and not arguments[0].startswith("-"):
            return _hand_over(arguments)
        given = _parser().parse_args(arguments)
        return given.command(given)
    except SystemExit as usage:  # of argparse, which has said why; Blender would take any text for 1
        return usage.code if isinstance(usage.code, int) else DONE
    except KilnError as error:
        print(f"kiln: {error.message}\n      {error.hint}".rstrip(), file=sys.stderr)
        return BAD if error.code in WRONG else UNAVAILABLE if error.code in ABSENT else CANCELLED if error.code == "cancelled" else FAILED
    except KeyboardInterrupt:
        return CANCELLED
    finally:
        if before is not None:  # None: it was not Python's, and cannot be put back
            signal.signal(signal.SIGINT, before)


def _interrupt(*_):
    session.interrupted.set()
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="blender --command kiln",
        description="Makes textured mesh assets of models, pictures and splats.",
        epilog="All other commands are those of the backend: batch, jobs, weights, doctor, stop, ... (`kiln COMMAND --help`).",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="make one asset",
        description="Makes one asset of a file, or of the file that Blender was given before --command.",
        epilog=_parameters(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("file", nargs="?", type=Path, metavar="FILE", help="a model, a .blend, splats (.ply, .spz) or a picture")
    run.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    run.add_argument("--recipe", choices=list(recipes.RECIPES), help="default: what the file's kind asks for")
    presets = dict.fromkeys(preset for recipe in recipes.RECIPES.values() for preset in recipe.PRESETS)
    run.add_argument("--preset", choices=list(presets), default="standard", help="values to start from (default: standard)")
    run.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the recipe, listed below; repeatable")
    run.add_argument("--object", action="append", default=[], metavar="PATTERN", help="objects, together one subject; repeatable")
    run.add_argument("--collection", metavar="NAME", help="a collection of the file as the subject")
    run.add_argument("--title", default="", help="name of the asset; default: the subject's")
    run.set_defaults(command=_run)
    setup = commands.add_parser("setup", help="set the compute backend up; downloads it (blender --online-mode --command kiln setup)")
    setup.add_argument("--bundle", type=Path, metavar="FILE", help="an offline bundle to set it up from instead")
    setup.add_argument("--repair", action="store_true", help="delete what is there first")
    setup.set_defaults(command=_set_up)
    return parser


def _parameters() -> str:
    """The parameters of every recipe for the help text, as the recipes define them."""
    lines = []
    for recipe in recipes.RECIPES.values():
        lines.append(f"\nparameters of {recipe.NAME}:")
        for parameter in recipes.parameters(recipe):
            default = "on" if parameter.default is True else "off" if parameter.default is False else parameter.default
            words = f"{parameter.help} (default: {'none' if default == '' else default})"
            lines += textwrap.wrap(words, 110, initial_indent=f"  {parameter.name:<26} ", subsequent_indent=" " * 29)
    return "\n".join(lines)


def _values(recipe: str, words: list[str]) -> dict:
    """The flat values of `--set NAME=VALUE`."""
    known = {parameter.name: parameter for parameter in recipes.parameters(recipes.recipe_named(recipe))}
    values = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise KilnError("bad-parameter", f"--set {word} says no value.", "Write --set NAME=VALUE.")
        if name not in known:
            raise KilnError("bad-parameter", f"{recipe} has no parameter {name!r}.", f"Parameters: {', '.join(known)}.")
        values[name] = known[name].check(known[name].read(text))
    return values


def _run(given: argparse.Namespace) -> int:
    recipe = given.recipe or _recipe_of(given.file)
    values = _values(recipe, given.set)
    recipes.make(recipe, values, given.preset)  # refused before a file is opened
    kind = recipes.recipe_named(recipe).INPUT
    if given.file is not None and not given.file.is_file():
        raise KilnError("bad-input", f"There is no file {given.file}.", "Check the path.")
    if given.file is not None and kind in ("picture", "splats") and given.file.suffix.lower() != ".blend":
        source, title = given.file.absolute(), given.title or given.file.stem
    else:
        source, title = _subject(given)
    made = api.compute(recipe, source, given.out, given.preset, title, **values)
    session.terminal(f"{made.name}: {made.figures.get('faces', 0):,} faces in {made.folder}", last=True)
    return DONE


def _subject(given: argparse.Namespace):
    """What to capture, and what to call it: a collection or a list of objects, of the file that is named or else of the open one."""
    path = Path(bpy.data.filepath or "the open file")
    if given.file is not None:
        path = given.file
        bpy.ops.wm.read_homefile(use_factory_startup=True, use_empty=True)
        for warning in importers.load(path):
            print(f"kiln: {warning}", file=sys.stderr)
        if path.suffix.lower() != ".blend":
            importers.choose_clip()
    if given.collection is not None:
        found = bpy.data.collections.get(given.collection)
        if found is None:
            raise KilnError("no-object", f"{path.name} has no collection {given.collection!r}.", _there(bpy.data.collections))
        return found, given.title
    if not given.object:
        return importers.surfaces(path, bpy.context.scene), given.title or path.stem
    things = bpy.context.scene.objects
    chosen = [thing for thing in things if any(thing.name == one or fnmatch.fnmatchcase(thing.name, one) for one in given.object)]
    if not chosen:
        raise KilnError("no-object", f"{path.name} has no object {' or '.join(given.object)}.", _there(things))
    return chosen, given.title


def _there(things) -> str:
    names = [thing.name for thing in things]
    return f"It has {', '.join(names[:10])}{' and more' if len(names) > 10 else ''}." if names else "It has none."


def _recipe_of(file: Path | None) -> str:
    """The recipe that a file's kind asks for."""
    suffix = file.suffix.lower() if file else ""
    if suffix in picture.SUFFIXES:
        return "im3d"
    return "mesh_splats" if file and is_splats(file) else "reconstruct"


def _set_up(given: argparse.Namespace) -> int:
    session.current.set_up("repair" if given.repair else "create", **({"bundle": given.bundle} if given.bundle else {}))
    session.terminal(f"The backend is ready in {session.environment_folder()}", last=True)
    return DONE


def _hand_over(words: list[str]) -> int:
    """A command of the backend's `kiln`, in its own process; Ctrl-C reaches that too, and its exit code says so."""
    if words[0] == "batch" and not any(word.partition("=")[0] in ("--blender", "--help", "-h") for word in words):
        words = [*words, *batches.blender()]
    command, environment = batches.kiln(words)
    process = subprocess.Popen(command, env=environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


_command = None  # Blender's handle of it


def register():
    global _command
    _command = bpy.utils.register_cli_command("kiln", main)


def unregister():
    bpy.utils.unregister_cli_command(_command)
