"""Pictures of a moving subject, some cameras at every chosen frame, in SPEC.md's "Motion" layout: what `capture` does for a still one.

First every frame is looked at, in order, with all frames between them where the scene simulates something: that fills the simulations'
caches, from which any frame can then be rendered, tells whether anything moves, and sizes the one sphere that the cameras surround. No
motion is written down: it is for the backend to find. Within a step the user's scene stands at another frame; between steps, at the user's.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import bpy
import numpy as np

from . import capture
from .capture import Moment, Subject, View
from .protocol import recipes
from .protocol.errors import KilnError
from .protocol.views import MOST_FILES, MOST_MOVING_VIEWS, MOST_PIXELS

STILL = 1e-3  # of the subject's radius: what moves less is an eighth of a pixel in views of 256
FAR = 0.1  # of the cameras' sphere: what stays smaller shows as a few pixels
LEAST_PARTS = 8  # instances that have to be there before their coming and going counts
SLICE = 0.2  # seconds that a step may look at frames
STILL_HINT = "Choose other frames, or the recipe Reconstruct for what does not move."


# Which frames, which cameras


def resolved(values: dict, scene: bpy.types.Scene) -> dict:
    """A recipe's flat values with the frame range that they mean in this scene, where it is a recipe that has one."""
    if not values.get("capture.scene_frames"):
        return values
    return {**values, "capture.frame_start": scene.frame_start, "capture.frame_end": scene.frame_end}


def with_own_range(given: dict) -> dict:
    """Flat values that a caller gave, where a first or last frame among them means that the scene's range is not to be taken."""
    own = {"capture.frame_start", "capture.frame_end"} & set(given)
    return {"capture.scene_frames": False, **given} if own else given


def frames(p: recipes.CaptureMotion) -> range:
    """The frames to capture. Raises KilnError("bad-parameter") where they are not several, or more than a job can hold."""
    chosen = range(p.frame_start, p.frame_end + 1, p.frame_step)
    if not chosen:
        raise KilnError("bad-parameter", f"The frames end at {p.frame_end}, before they begin at {p.frame_start}.", "Set the frame range.")
    if len(chosen) == 1:
        what = f"Frame {chosen[0]} is the only one to capture: nothing moves in it."
        raise KilnError("bad-parameter", what, "Choose a longer frame range or a smaller step, or the recipe Reconstruct.")
    if not _fits(len(chosen), p):
        step = next((n for n in range(2, len(chosen)) if _fits(len(chosen[::n]), p)), None)
        hint = f"Capture every {step * p.frame_step} frames, or take fewer or smaller views." if step else "Take fewer or smaller views."
        raise KilnError("bad-parameter", f"{len(chosen)} frames of {_each(p)} views of {p.size} pixels are more than a job can hold.", hint)
    return chosen


def sentence(p: recipes.CaptureMotion) -> str:
    """What will be captured, for people. Raises as `frames` does."""
    chosen = frames(p)
    of = f", every {p.frame_step}" if p.frame_step > 1 else ""
    return f"Frames {chosen[0]} to {chosen[-1]}{of}: {len(chosen)} of {_each(p)} views, {len(chosen) * _each(p):,} in all"


def _fits(count: int, p: recipes.CaptureMotion) -> bool:
    views, files = count * _each(p), count * (_each(p) + 1) + 1
    return views <= MOST_MOVING_VIEWS and views * p.size**2 <= MOST_PIXELS and files <= MOST_FILES


def _each(p: recipes.CaptureMotion) -> int:
    """Views of each frame."""
    return p.views + p.holdout


def views_of(p: recipes.CaptureMotion, moments: int, seed: int) -> list[View]:
    """The views of all moments: each is seen from all sides by as many cameras as a still with so few would have, and the next by the same
    turned into the gaps, until all have had their turn. Held-out ones are taken in turn out of a set of their own."""
    rigs = [capture.directions(p.views)]
    random = np.random.default_rng(0)
    for _ in range(1, -(-p.cameras // p.views)):
        turned = [rigs[0] @ _random_turn(random).T for _ in range(200)]
        rigs.append(min(turned, key=lambda rig: (rig @ np.concatenate(rigs).T).max()))
    held_out = capture.between(np.concatenate(rigs), p.holdout * len(rigs), seed)
    found = []
    for moment in range(moments):
        found += [View(moment, direction, held_out=False) for direction in rigs[moment % len(rigs)]]
        first = moment * (p.holdout - 1)  # one camera stays from a moment to the next: what it sees change can be scored
        found += [View(moment, held_out[(first + k) % len(held_out)], held_out=True) for k in range(p.holdout)]
    return found


def _random_turn(random: np.random.Generator) -> np.ndarray:
    """A rotation (3, 3), all equally likely."""
    q, r = np.linalg.qr(random.normal(size=(3, 3)))
    q *= np.sign(np.diagonal(r))
    return q * np.linalg.det(q)


@contextmanager
def _frame(scene: bpy.types.Scene, frame: int) -> Iterator[None]:
    """The user's scene at a frame; afterwards, also by an error, at the one where it was."""
    before = scene.frame_current, scene.frame_subframe
    try:
        if before != (frame, 0.0):
            scene.frame_set(frame)
        yield
    finally:
        if before != (scene.frame_current, scene.frame_subframe):
            scene.frame_set(before[0], subframe=before[1])


# Simulations


def simulation_start(scene: bpy.types.Scene) -> int | None:
    """The frame at which the first simulation in a scene begins; None where there is none. A simulation cannot jump to a frame."""
    things = set(scene.objects)
    things |= {thing for empty in scene.objects if empty.instance_collection for thing in empty.instance_collection.all_objects}
    starts = [start for thing in things for modifier in thing.modifiers for start in _starts(modifier, scene)]
    if scene.rigidbody_world is not None:
        starts.append(scene.rigidbody_world.point_cache.frame_start)
    return min(starts, default=None)


def _starts(modifier: bpy.types.Modifier, scene: bpy.types.Scene) -> list[int]:
    match modifier.type:
        case "CLOTH" | "SOFT_BODY":
            return [modifier.point_cache.frame_start]
        case "PARTICLE_SYSTEM":
            return [modifier.particle_system.point_cache.frame_start]
        case "DYNAMIC_PAINT" if modifier.canvas_settings is not None:
            return [surface.frame_start for surface in modifier.canvas_settings.canvas_surfaces]
        case "FLUID" if modifier.domain_settings is not None:
            return [modifier.domain_settings.cache_frame_start]
        case "NODES" if _simulates(modifier.node_group, set()):
            return [scene.frame_start]
    return []


def _simulates(tree: bpy.types.NodeTree | None, seen: set[int]) -> bool:
    """Whether a node group or one in it has a simulation zone."""
    if tree is None or tree.session_uid in seen:
        return False
    seen.add(tree.session_uid)
    return any(
        node.bl_idname == "GeometryNodeSimulationOutput" or node.bl_idname == "GeometryNodeGroup" and _simulates(node.node_tree, seen)
        for node in tree.nodes
    )


# The capture


class MovingCapture(capture.Capture):
    """A capture of several frames of the timeline. steps and done count the frames that are looked at, too."""

    def __init__(self, subject: Subject, p: recipes.CaptureMotion, folder: Path, seed: int = 0):
        """Raises KilnError("bad-parameter") for frames that make no motion; what the subject is unfit for, the first steps find."""
        scene = capture._scene(subject)
        if p.scene_frames:
            p = dataclasses.replace(p, frame_start=scene.frame_start, frame_end=scene.frame_end)
        self.frames = frames(p)
        self._each = _each(p)
        passes = recipes.Capture(
            views=p.views, size=p.size, color=p.color, samples=p.samples, geometry=True, materials=p.materials, holdout=p.holdout
        )
        self._begin(subject, passes, folder, views_of(p, len(self.frames), seed))
        self._fps = scene.render.fps / scene.render.fps_base
        begins = simulation_start(scene)
        self._simulated = begins is not None
        self._walk = range(min(begins, self.frames[0]), self.frames[-1] + 1) if self._simulated else self.frames
        self._tasks = [("look", frame) for frame in self._walk] + self._tasks
        self._first_shapes: list[np.ndarray] | None = None  # where all points were at the first moment, until one has moved
        self._passes: list[dict[str, np.ndarray]] = []  # of one moment's views

    def _step(self) -> None:
        if self._tasks[self.done][0] != "look":
            super()._step()
            return
        scene = capture._scene(self.subject)
        if self.done == 0 and self._simulated:
            self._simulate(scene)
        started = time.perf_counter()
        # A simulation goes on only from the frame before.
        with capture._idle(), _frame(scene, self._walk[max(self.done - self._simulated, 0)]):
            while self.done < len(self._walk):
                frame = self._walk[self.done]
                if scene.frame_current != frame or self.done == 0:
                    scene.frame_set(frame)
                if frame in self.frames:
                    self._take_in(frame, capture.look(self.subject, shapes=not self._moments or self._first_shapes is not None))
                self.done += 1
                if time.perf_counter() - started > SLICE:
                    break
        if self.done == len(self._walk):
            self._refuse_what_no_mesh_can_follow()
            self._place_cameras()
            self._refuse_what_travels()

    def _simulate(self, scene: bpy.types.Scene) -> None:
        """Fills simulations' caches in one go where a pause would spoil them: rigid bodies' keeps no speeds, so that they would fall anew,
        and a visit to the user's frame, where that comes later than what is in the caches, would take it for the next one."""
        now = scene.frame_current_final
        if scene.rigidbody_world is None and now <= self._walk[0]:
            return
        with capture._idle(), _frame(scene, self._walk[0]):
            for frame in range(self._walk[0], max(self._walk[-1], math.ceil(now)) + 1):
                scene.frame_set(frame)

    def _take_in(self, frame: int, moment: Moment) -> None:
        if not len(moment.points):
            words = f"{self.subject.title} is not there at frame {frame}: no faces, hair or instances of it render."
            raise KilnError("bad-subject", words, "Choose frames at which it shows, or check what is keyed of its visibility in renders.")
        shapes, moment.evaluated.shapes = moment.evaluated.shapes, None
        self._moments.append(moment)
        if len(self._moments) == 1:
            self._first_shapes, self._source = shapes, self._place()
        elif self._first_shapes is not None and _differ(self._first_shapes, shapes, STILL * _reach(moment)):
            self._first_shapes = None

    def _refuse_what_no_mesh_can_follow(self) -> None:
        title, moments = self.subject.title, self._moments
        if self._first_shapes is not None:
            words = f"{title} does not move from frame {self.frames[0]} to {self.frames[-1]}."
            raise KilnError("bad-subject", words, STILL_HINT)
        counts = [moment.evaluated.instances for moment in moments]
        few, many = int(np.argmin(counts)), int(np.argmax(counts))
        if counts[many] >= LEAST_PARTS and 2 * counts[few] < counts[many]:
            shown = [f"{counts[one]} instances at frame {self.frames[one]}" for one in (few, many)]
            words = f"{title} shows {shown[0]} and {shown[1]}: one mesh cannot follow parts that come and go."
            hint = "Hide its particles or instances in renders, or choose frames at which their number stays."
            raise KilnError("bad-subject", words, hint)
        reaches = [_reach(moment) for moment in moments]
        if min(reaches) < STILL * max(reaches):
            words = f"{title} has no size at frame {self.frames[int(np.argmin(reaches))]}: all its points lie in one place."
            raise KilnError("bad-subject", words, "Choose frames at which it shows.")

    def _refuse_what_travels(self) -> None:
        size = float(np.median([_reach(moment) for moment in self._moments]))
        if size < FAR * self._radius:
            times = f"{self._radius / size:.0f} times"
            words = f"{self.subject.title} travels {times} its own size: views that hold all of its way show it too small."
            raise KilnError("bad-subject", words, "Choose fewer frames, or let it move on the spot while it is captured.")

    def _at(self, number: int) -> AbstractContextManager[None]:
        return _frame(capture._scene(self.subject), self.frames[number])

    def _file_name(self, kind: str, number: int) -> str:
        frame, index = self.frames[number // self._each], number % self._each
        return f"color_{frame:05}_{index:03}.png" if kind == "color" else f"passes_{frame:05}.npz"

    def _keep_passes(self, number: int, geometry: dict[str, np.ndarray], material: dict[str, np.ndarray]) -> None:
        """Those of a moment's views go into one file: a long capture would have more files than a job may."""
        self._passes.append({**geometry, **material})
        if len(self._passes) < self._each:
            return
        found = {name: one[name] for one in self._passes for name in one}  # any view's: emission is not in all of them
        packed = {name: np.stack([one.get(name, np.zeros_like(like)) for one in self._passes]) for name, like in found.items()}
        self._passes.clear()
        np.savez_compressed(self.folder / self._file_name("passes", number), **packed)

    def _entry(self, number: int) -> dict:
        passes = self._file_name("passes", number)
        return {
            "frame": self.frames[number // self._each],
            "file_path": self._file_name("color", number),
            "geometry_file_path": passes,
            **({"material_file_path": passes} if capture._wants_materials(self.p) else {}),
            "layer": number % self._each,
        }

    def _table(self) -> dict:
        return {"fps": self._fps, **super()._table()}

    def finish(self) -> tuple[dict[str, Path], dict]:
        inputs, source = super().finish()
        times = {
            "frame_start": self.frames[0], "frame_end": self.frames[-1], "frame_step": self.frames.step, "fps": self._fps,
        }  # fmt: skip
        return inputs, {**source, **times}

    def _refuse_unseen(self, number: int) -> None:
        if number not in self._shown:
            words = f"{self.subject.title} renders as nothing at frame {self.frames[number]}: every view is empty."
            raise KilnError("bad-subject", words, capture.SEE_NOTHING)


def _reach(moment: Moment) -> float:
    """Half the diagonal of what is seen at a moment."""
    return float(np.linalg.norm(moment.highest - moment.lowest)) / 2


def _differ(shapes: list[np.ndarray], others: list[np.ndarray], distance: float) -> bool:
    """Whether any point lies farther than `distance` from where it was, or is another."""
    if [one.shape for one in shapes] != [one.shape for one in others]:
        return True
    return any(float(np.abs(one - other).max(initial=0)) > distance for one, other in zip(shapes, others, strict=True))
