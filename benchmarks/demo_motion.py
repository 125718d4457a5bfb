"""The demo's part for subjects that move: one clip of a file on the timeline, the true surface frame by frame for scoring, and pictures of
source and imported result from one camera."""

from __future__ import annotations

from pathlib import Path

import bpy
import numpy as np

MOST_FRAMES = 48
SHOWN = 6  # frames of the strip
SIZE = 320  # pixels of each


def built_in_object() -> bpy.types.Object:
    """A striped horn that sways: shape and colour made on the spot, two bends that are keyframed."""
    bpy.ops.mesh.primitive_cylinder_add(vertices=48, radius=0.12, depth=1.0, location=(0, 0, 0.5))
    thing = bpy.context.object
    thing.name = "Horn"
    remesh = thing.modifiers.new("Rings", "REMESH")
    remesh.mode, remesh.voxel_size = "VOXEL", 0.03
    taper = thing.modifiers.new("Taper", "SIMPLE_DEFORM")
    taper.deform_method, taper.deform_axis, taper.factor = "TAPER", "Z", -0.6
    for name, axis, turns in (("Curl", "X", (-1.4, 1.2)), ("Sway", "Y", (0.5, -0.9))):
        bend = thing.modifiers.new(name, "SIMPLE_DEFORM")
        bend.deform_method, bend.deform_axis = "BEND", axis
        for frame, angle in ((1, turns[0]), (12, turns[1]), (24, turns[0])):
            bend.angle = angle
            bend.keyframe_insert("angle", frame=frame)
    bpy.context.scene.frame_start, bpy.context.scene.frame_end = 1, 24
    material = bpy.data.materials.new("Stripes")
    material.use_nodes = True
    nodes, links = material.node_tree.nodes, material.node_tree.links
    place, waves, ramp = (nodes.new(f"ShaderNode{kind}") for kind in ("TexCoord", "TexWave", "ValToRGB"))
    waves.inputs["Scale"].default_value, waves.inputs["Distortion"].default_value = 4.0, 3.0
    ramp.color_ramp.elements[0].color, ramp.color_ramp.elements[1].color = (0.55, 0.05, 0.12, 1), (0.95, 0.75, 0.5, 1)
    links.new(place.outputs["Generated"], waves.inputs["Vector"])
    links.new(waves.outputs["Color"], ramp.inputs["Fac"])
    links.new(ramp.outputs["Color"], nodes["Principled BSDF"].inputs["Base Color"])
    thing.data.materials.append(material)
    return thing


def surface(things: list[bpy.types.Object]) -> tuple[np.ndarray, np.ndarray]:
    """Evaluated vertices (n, 3) in world units and triangles of objects at the current frame."""
    depsgraph = bpy.context.evaluated_depsgraph_get()
    points, faces, count = [], [], 0
    for thing in things:
        evaluated = thing.evaluated_get(depsgraph)
        mesh = evaluated.to_mesh()
        mesh.calc_loop_triangles()
        own = np.empty(3 * len(mesh.vertices), np.float32)
        mesh.vertices.foreach_get("co", own)
        corners = np.empty(3 * len(mesh.loop_triangles), np.int32)
        mesh.loop_triangles.foreach_get("vertices", corners)
        matrix = np.array(evaluated.matrix_world, np.float64)
        points.append(own.reshape(-1, 3) @ matrix[:3, :3].T + matrix[:3, 3])
        faces.append(corners.reshape(-1, 3) + count)
        count += len(mesh.vertices)
        evaluated.to_mesh_clear()
    return np.concatenate(points).astype(np.float32), np.concatenate(faces)


def tracks(things: list[bpy.types.Object], frames: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (t, n, 3) at each frame, in metres, and triangles. The scene's frame is left as it was."""
    scene, found = bpy.context.scene, []
    before = scene.frame_current
    for frame in frames:
        scene.frame_set(int(frame), subframe=frame % 1)
        points, faces = surface(things)
        found.append(points * scene.unit_settings.scale_length)
    scene.frame_set(before)
    return np.stack(found), faces


def pictures(capture, recipes, source: list[bpy.types.Object], result: list[bpy.types.Object], frames: list[float], folder: Path) -> None:
    """Source and result at some frames, as the extension captures both, from the same cameras: folder/source_N and folder/result_N."""
    scene = bpy.context.scene
    before = scene.frame_current
    p = recipes.Capture(views=4, size=SIZE, holdout=0, geometry=False, materials=False)
    corners = np.concatenate(tracks(source, frames)[0]) / scene.unit_settings.scale_length
    like = capture.Capture(capture.subject(bpy.context, objects=source), p, folder / "like")
    like._centre, like._radius = capture.bounding_sphere(corners.astype(np.float64))  # of all frames
    for number, frame in enumerate(np.array(frames)[np.linspace(0, len(frames) - 1, min(SHOWN, len(frames))).round().astype(int)]):
        scene.frame_set(int(frame), subframe=float(frame) % 1)
        for name, things in (("source", source), ("result", result)):
            work = capture.Capture(capture.subject(bpy.context, objects=things), p, folder / f"{name}_{number}", like=like)
            while work.step():
                pass
            work.finish()
            work.close()
    scene.frame_set(before)
