"""Motion of results made here: a strip that bends, turns round and stretches, in the files' layout (SPEC.md, "Results of `animate`"). Where
its vertices are at each moment is computed here, apart from the files, and compared with what Blender evaluates."""

import json
import math
import struct
from pathlib import Path

import bpy
import numpy as np
import pytest
from bl_ext.kiln_test.kiln import api, import_asset, import_motion, rebake, session
from bl_ext.kiln_test.kiln.protocol import recipes
from bl_ext.kiln_test.kiln.protocol.errors import KilnError
from mathutils import Euler, Matrix, Quaternion

PROVENANCE = {"recipe": "animate", "parameters": {"seed": 7}, "job": "job-1", "kiln": "1.2.3"}
WAYS = [way for way, _, _ in import_motion.WAYS]
EXACT = 1e-4  # of the diagonal
FRAMES, RATE = [12, 13, 14, 15, 16, 17, 18, 19, 20], 24.0
PLACE = np.array([0.5, -2.0, 1.5])  # of the subject in the files: metres, Y up
NEAR = {"location": (1.0, 2.0, 3.0), "rotation": (0.9, 0.1, -0.3, 0.3), "title": "Strip"}  # of the source


# The files


class Writer:
    def __init__(self):
        self.data, self.views, self.accessors = bytearray(), [], []

    def view(self, values):
        self.views.append({"buffer": 0, "byteOffset": len(self.data), "byteLength": values.nbytes})
        self.data += values.tobytes() + b"\0" * (-values.nbytes % 4)
        return len(self.views) - 1

    def add(self, values, sparse=False):
        """Floats, or indices, as an accessor; without a view where all values are 0."""
        values = np.ascontiguousarray(values)
        values = values.astype("<f4" if values.dtype.kind == "f" else "<u4" if values.ndim == 1 else "u1")
        kind = {1: "SCALAR", 3: "VEC3", 4: "VEC4", 16: "MAT4", 2: "VEC2"}[values.shape[1] if values.ndim == 2 else 1]
        entry = {
            "componentType": {"f": 5126, "u": 5125 if values.ndim == 1 else 5121}[values.dtype.kind],
            "count": len(values),
            "type": kind,
        }
        if kind == "VEC3":
            entry |= {"min": values.min(0).tolist(), "max": values.max(0).tolist()}
        if sparse:
            (places,) = np.nonzero(values.any(1))
            entry["sparse"] = {
                "count": len(places),
                "indices": {"bufferView": self.view(places.astype("<u2")), "componentType": 5123},
                "values": {"bufferView": self.view(values[places])},
            }
        elif values.any():
            entry["bufferView"] = self.view(values)
        self.accessors.append(entry)
        return len(self.accessors) - 1

    def save(self, path, **document):
        document |= {"asset": {"version": "2.0"}, "scene": 0, "accessors": self.accessors, "bufferViews": self.views}
        text = json.dumps({**document, "buffers": [{"byteLength": len(self.data)}]}).encode()
        text += b" " * (-len(text) % 4)
        chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(self.data), b"BIN\0") + bytes(self.data)
        path.write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks)


def strip(rings=16):
    """A square tube from 0 to 3 along x, and triangles; its first edge stands twice, as along a UV seam."""
    along = np.linspace(0, 3, rings)
    corners = np.array([[0, -0.2, -0.2], [0, 0.2, -0.2], [0, 0.2, 0.2], [0, -0.2, 0.2]])
    vertices = (along[:, None, None] * [1, 0, 0] + corners).reshape(-1, 3)
    faces = []
    for ring in range(rings - 1):
        for side in range(4):
            a, b = 4 * ring + side, 4 * ring + (side + 1) % 4
            faces += [[a, b, a + 4], [b, b + 4, a + 4]]
    faces = np.array(faces)
    faces[:2] = np.where(faces[:2] < 2, len(vertices) + faces[:2], faces[:2])
    return np.concatenate([vertices, vertices[:2]]).astype(np.float32), faces


def turn(axis, degrees):
    return np.array(Quaternion(axis, math.radians(degrees)).to_matrix())


def rigid(rotation, translation):
    made = np.eye(4)
    made[:3, :3], made[:3, 3] = rotation, translation
    return made


def quaternion(rotation):
    w, x, y, z = Matrix(rotation.tolist()).to_quaternion()
    return [x, y, z, w]


class Strip:
    """Bones 1, 2 and 4 along x, each 1 long: the first turns round twice and moves, the second bends and stretches to more than the double,
    its child bends and inherits nothing of that. The third is another child of the first, and swings: Blender orders it last."""

    def __init__(self, frames=FRAMES, rate=RATE):
        self.frames, self.rate = frames, rate
        self.vertices, self.faces = strip()
        self.share = np.linspace(0, 1, len(frames))
        count, bones, self.parents = len(frames), 4, [-1, 0, 0, 1]
        lay = turn((0, 0, 1), -90)  # a bone's y axis along x
        heads = [0.0, 1.0, 0.5, 2.0]
        self.rest = np.array([rigid(lay @ turn((0, 1, 0), 30 * bone), [heads[bone], 0, 0]) for bone in range(bones)])
        local = np.array([np.linalg.inv(self.rest[parent]) @ self.rest[bone] for bone, parent in enumerate(self.parents)])
        local[0] = self.rest[0]
        self.local_rest = local
        self.scale = np.ones((count, bones, 3))
        self.scale[:, 1] += self.share[:, None] * [-0.4, 1.3, 0.2]
        self.local = np.empty((count, bones, 4, 4))
        for moment, share in enumerate(self.share):
            self.local[moment, 0] = local[0] @ rigid(turn((0.3, 1, 0.2), 700 * share), [0.4 * share, 0, -0.7 * share])
            self.local[moment, 1] = local[1] @ rigid(turn((1, 0, 0), -80 * share), [0, 0, 0])
            self.local[moment, 2] = local[2] @ rigid(turn((0, 1, 1), 90 * np.sin(6 * share)), [0, 0, 0.2 * share])
            # The end of the second bone, from its parent: the stretch moves it, and is not inherited.
            self.local[moment, 3] = local[3] @ rigid(turn((0, 0, 1), 50 * share), [0, 1.3 * share, 0])
        stiff = self.local.copy()
        for bone, parent in list(enumerate(self.parents))[1:]:
            stiff[:, bone] = stiff[:, parent] @ self.local[:, bone]
        posed = stiff.copy()
        posed[..., :3, :3] *= self.scale[:, :, None, :]
        skin = posed @ np.linalg.inv(self.rest)
        places = np.clip(self.vertices[:, 0, None] - heads, -1, 2)
        weights = np.maximum(0, 1 - np.abs(places - 0.5) ** 2)
        self.weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
        ends = np.concatenate([self.vertices, np.ones((len(self.vertices), 1))], 1)
        self.moved = np.einsum("tbij,nj,nb->tni", skin, ends, self.weights)[..., :3]

    def diagonal(self):
        return np.linalg.norm(np.ptp(self.vertices, 0))

    def truth(self):
        """The vertices at each moment in the world, metres, Z up: (T, n, 3)."""
        x, y, z = np.moveaxis(self.moved + PLACE, 2, 0)
        return np.stack([x, -z, y], 2)

    def write(self, folder):
        folder.mkdir(exist_ok=True)
        self.write_mesh(folder / "mesh.glb")
        self.write_shape_keys(folder / "shape_keys.glb")
        self.write_armature(folder / "armature.glb")
        return folder

    def primitive(self, out):
        uv = out.add(np.random.default_rng(0).uniform(size=(len(self.vertices), 2)))
        normals = self.vertices * [0, 1, 1]
        normals = out.add(normals / np.linalg.norm(normals, axis=1, keepdims=True))
        attributes = {"POSITION": out.add(self.vertices), "NORMAL": normals, "TEXCOORD_0": uv}
        return {"attributes": attributes, "indices": out.add(self.faces.reshape(-1)), "material": 0}

    def write_mesh(self, path):
        out = Writer()
        meshes = [{"primitives": [self.primitive(out)]}]
        nodes = [{"mesh": 0, "translation": PLACE.tolist()}]
        out.save(path, meshes=meshes, nodes=nodes, scenes=[{"nodes": [0]}], materials=[{"name": "Strip"}])

    def animation(self, out, channels):
        """channels: of node, path, values."""
        times = out.add((np.array(self.frames, float) - self.frames[0]) / self.rate)
        return {
            "name": "Strip",
            "samplers": [{"input": times, "output": out.add(values)} for _, _, values in channels],
            "channels": [{"sampler": i, "target": {"node": node, "path": path}} for i, (node, path, _) in enumerate(channels)],
            "extras": {"fps": self.rate, "frames": self.frames},
        }

    def write_shape_keys(self, path):
        out = Writer()
        primitive = self.primitive(out)
        deltas = self.moved - self.vertices
        primitive["targets"] = [{"POSITION": out.add(delta, sparse=moment % 2 == 1)} for moment, delta in enumerate(deltas)]
        names = [f"frame {frame}" for frame in self.frames]
        meshes = [{"primitives": [primitive], "extras": {"targetNames": names}, "weights": [0.0] * len(names)}]
        nodes = [{"mesh": 0, "translation": PLACE.tolist()}]
        animations = [self.animation(out, [(0, "weights", np.eye(len(names)).reshape(-1))])]
        out.save(path, meshes=meshes, nodes=nodes, scenes=[{"nodes": [0]}], materials=[{"name": "Strip"}], animations=animations)

    def write_armature(self, path):
        out = Writer()
        primitive = self.primitive(out)
        joint = np.array([0, 4, 2, 3])  # the second bone's vertices follow its scale joint
        heaviest = np.argsort(-self.weights, 1)
        primitive["attributes"]["WEIGHTS_0"] = out.add(np.take_along_axis(self.weights, heaviest, 1))
        primitive["attributes"]["JOINTS_0"] = out.add(joint[heaviest])
        # armature, mesh, bones 2 to 5, scale joint 6
        nodes = [{"name": "Strip", "translation": PLACE.tolist(), "children": [2]}, {"mesh": 0, "skin": 0}]
        channels = []
        for bone in range(4):
            rest = self.local_rest[bone]
            about = {"name": f"Bone {bone + 1:03}", "rotation": quaternion(rest[:3, :3]), "translation": rest[:3, 3].tolist()}
            nodes.append(about | {"extras": {"length": 1.0}})
            turned = np.array([quaternion(moment) for moment in self.local[:, bone, :3, :3]])
            channels += [(2 + bone, "rotation", turned), (2 + bone, "translation", self.local[:, bone, :3, 3])]
        nodes[2]["children"], nodes[3]["children"] = [3, 4], [6, 5]
        nodes.append({"name": "Bone 002 scale", "extras": {"scales": 1}})
        channels.append((6, "scale", self.scale[:, 1]))
        back = np.linalg.inv(self.rest)[[0, 1, 2, 3, 1]].transpose(0, 2, 1).reshape(5, 16)
        skins = [{"skeleton": 0, "joints": [2, 3, 4, 5, 6], "inverseBindMatrices": out.add(back)}]
        scenes, animations = [{"nodes": [0, 1]}], [self.animation(out, channels)]
        meshes = [{"primitives": [primitive]}]
        out.save(path, meshes=meshes, nodes=nodes, scenes=scenes, skins=skins, materials=[{"name": "Strip"}], animations=animations)


# Blender


def bring_in(folder, way="SHAPE_KEYS", loop=False, start=None, **source):
    return import_asset.import_asset(bpy.context, folder, {**NEAR, **source}, PROVENANCE, import_motion.How(way, loop, start))


def vertices_at(thing, frame):
    """Where Blender has the vertices at a frame of the scene, in the world, Blender units; the scene's own frame is put back."""
    scene, whole = bpy.context.scene, math.floor(frame)
    before = scene.frame_current
    scene.frame_set(whole, subframe=frame - whole)
    shown = thing.evaluated_get(bpy.context.evaluated_depsgraph_get())
    mesh = shown.to_mesh()
    places = np.empty(3 * len(mesh.vertices), np.float32)
    mesh.vertices.foreach_get("co", places)
    matrix = np.array(shown.matrix_world)
    scene.frame_set(before)
    return places.reshape(-1, 3).astype(float) @ matrix[:3, :3].T + matrix[:3, 3]


def worst(thing, frames, truth):
    return max(np.abs(vertices_at(thing, frame) - places).max() for frame, places in zip(frames, truth, strict=True))


def animated(imported, way):
    """The data-block that has the action."""
    if way == "SHAPE_KEYS":
        return imported.mesh_object.data.shape_keys
    return imported.armature_object if way == "ARMATURE" else imported.mesh_object


def curves(animated):
    data = animated.animation_data
    if bpy.app.version < (4, 4):
        return data.action.fcurves
    return data.action.layers[0].strips[0].channelbag(data.action_slot).fcurves


@pytest.fixture(autouse=True)
def scene_of_the_source():
    scene = bpy.context.scene
    scene.render.fps, scene.render.fps_base = 24, 1.0
    return scene


@pytest.mark.oldest
@pytest.mark.parametrize("way", WAYS)
def test_every_vertex_is_where_the_file_has_it_at_every_moment(tmp_path, way):
    result = Strip()
    imported = bring_in(result.write(tmp_path), way)
    assert worst(imported.mesh_object, FRAMES, result.truth()) < EXACT * result.diagonal()
    truth = result.truth()
    assert np.abs(vertices_at(imported.mesh_object, 5) - truth[0]).max() < EXACT * result.diagonal(), "before the first moment it waits"
    assert np.abs(vertices_at(imported.mesh_object, 50) - truth[-1]).max() < EXACT * result.diagonal()
    if way != "ARMATURE":  # bones turn between moments, as they should
        assert np.abs(vertices_at(imported.mesh_object, 13.5) - truth[1:3].mean(0)).max() < EXACT * result.diagonal()


@pytest.mark.oldest
@pytest.mark.parametrize("way", WAYS)
def test_moments_keep_their_time_at_another_frame_rate_and_start_where_asked(tmp_path, way):
    result, scene = Strip(), bpy.context.scene
    scene.render.fps = 30
    folder = result.write(tmp_path)
    imported = bring_in(folder, way)
    assert worst(imported.mesh_object, [12 + 1.25 * i for i in range(9)], result.truth()) < EXACT * result.diagonal()
    scene.render.fps, scene.render.fps_base = 24, 1.001
    imported = bring_in(folder, way, start=-40)
    assert worst(imported.mesh_object, [-40 + i / 1.001 for i in range(9)], result.truth()) < EXACT * result.diagonal()


@pytest.mark.parametrize("way", WAYS)
def test_moments_need_not_be_evenly_apart(tmp_path, way):
    result = Strip(frames=[1, 2, 4, 9, 10])
    imported = bring_in(result.write(tmp_path), way)
    assert worst(imported.mesh_object, result.frames, result.truth()) < EXACT * result.diagonal()


@pytest.mark.oldest
@pytest.mark.parametrize("way", WAYS)
def test_a_scene_in_centimetres_and_a_source_far_away(tmp_path, way):
    result, scene = Strip(), bpy.context.scene
    scene.unit_settings.scale_length = 0.01
    imported = bring_in(
        result.write(tmp_path), way, unit_scale=0.01, location=(130.0, -40.0, 260.0), rotation=Euler((1, 2, 3)).to_quaternion()
    )
    assert worst(imported.mesh_object, FRAMES, result.truth() * 100) < EXACT * result.diagonal() * 100


@pytest.mark.oldest
def test_the_armature_has_the_files_bones_and_smooth_curves(tmp_path):
    imported = bring_in(Strip().write(tmp_path), "ARMATURE")
    armature, mesh = imported.armature_object, imported.mesh_object
    bones = armature.data.bones
    above = {bone.name: bone.parent and bone.parent.name for bone in bones}
    assert above == {"Bone 001": None, "Bone 002": "Bone 001", "Bone 003": "Bone 001", "Bone 004": "Bone 002"}
    assert all(bone.inherit_scale == "NONE" and bone.length == pytest.approx(1.0, abs=1e-5) for bone in bones)
    assert np.allclose(bones["Bone 002"].tail_local, bones["Bone 004"].head_local, atol=1e-5)
    assert mesh.parent == armature and {group.name for group in mesh.vertex_groups} == set(above)
    weights = np.array([sum(group.weight for group in vertex.groups) for vertex in mesh.data.vertices])
    assert np.allclose(weights, 1, atol=1e-6)
    turns = [curve for curve in curves(armature) if curve.data_path == 'pose.bones["Bone 001"].rotation_quaternion']
    keyed = np.array([[point.co[1] for point in curve.keyframe_points] for curve in turns])
    assert (np.einsum("it,it->t", keyed[:, 1:], keyed[:, :-1]) > 0).all(), "a quaternion changes its sign"
    assert all(point.interpolation == "LINEAR" for curve in curves(armature) for point in curve.keyframe_points)


@pytest.mark.oldest
def test_shape_keys_are_one_a_moment_and_named_by_its_frame(tmp_path):
    imported = bring_in(Strip().write(tmp_path))
    keys = imported.mesh_object.data.shape_keys
    assert [key.name for key in keys.key_blocks] == ["Basis", *(f"frame {frame}" for frame in FRAMES)]
    assert keys.animation_data.action.name == imported.collection.name


@pytest.mark.oldest
@pytest.mark.parametrize("way", WAYS)
def test_a_loop_closes_and_goes_on(tmp_path, way):
    result = Strip()
    thing = bring_in(result.write(tmp_path), way, loop=True).mesh_object
    truth, size = result.truth(), result.diagonal()
    first, last, period = FRAMES[0], FRAMES[-1], FRAMES[-1] - FRAMES[0]
    assert np.abs(truth[-1] - truth[0]).max() > 0.5 * size, "it does not close by itself"
    assert np.abs(vertices_at(thing, last) - truth[0]).max() < EXACT * size
    assert worst(thing, FRAMES[:6], truth[:6]) < EXACT * size, "what lies before the last quarter is as it was"
    for frame in (first + 0.5, first + 3, last - 1, last - 0.25):
        here = vertices_at(thing, frame)
        for away in (-period, period, 3 * period):
            assert np.abs(vertices_at(thing, frame + away) - here).max() < EXACT * size
    near = vertices_at(thing, last + 0.01)
    assert np.abs(near - vertices_at(thing, last - 0.01)).max() < 0.05 * size, "it jumps where it begins anew"


@pytest.mark.oldest
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_the_action_can_be_retimed_in_the_nla(tmp_path, way, loop):
    result = Strip()
    imported = bring_in(result.write(tmp_path), way, loop=loop)
    thing, data = imported.mesh_object, animated(imported, way).animation_data
    before = [vertices_at(thing, frame) for frame in FRAMES]
    strip = data.nla_tracks.new().strips.new("slow", 100, data.action)
    if bpy.app.version >= (4, 4):
        strip.action_slot = data.action_slot
    strip.scale = 2.0
    data.action = None
    assert strip.frame_start == 100 and strip.frame_end == pytest.approx(100 + 2 * (FRAMES[-1] - FRAMES[0]))
    assert worst(thing, [100 + 2 * i for i in range(len(FRAMES))], before) < EXACT * result.diagonal()


@pytest.mark.oldest
@pytest.mark.parametrize("way", WAYS)
def test_the_shading_follows_the_motion(tmp_path, way):
    """The file's normals are those of a round tube: wherever it goes, they stay on the outer side of each of its faces."""
    imported, scene = bring_in(Strip().write(tmp_path), way), bpy.context.scene

    def least():
        mesh = imported.mesh_object.evaluated_get(bpy.context.evaluated_depsgraph_get()).to_mesh()
        corners = np.array([normal.vector[:] for normal in mesh.corner_normals])
        faces = np.repeat([face.normal[:] for face in mesh.polygons], 3, axis=0)
        return (corners * faces).sum(1).min()

    scene.frame_set(FRAMES[0] - 1)
    at_rest = least()
    assert at_rest > 0.5
    for frame in FRAMES:
        scene.frame_set(frame)
        assert least() > at_rest - 0.5


@pytest.mark.oldest
def test_the_same_result_comes_in_again_another_way(tmp_path):
    result = Strip()
    folder = result.write(tmp_path)
    made = [bring_in(folder, way) for way in WAYS]
    for way, imported in zip(WAYS, made, strict=True):
        thing = imported.mesh_object
        assert worst(thing, FRAMES, result.truth()) < EXACT * result.diagonal()
        assert thing["kiln_motion"] == way and ("kiln_cache" in thing) == (way == "CACHE")
        assert (thing.data.shape_keys is not None) == (way == "SHAPE_KEYS")
        assert (imported.armature_object is not None) == (way == "ARMATURE")
    assert len({imported.collection.name for imported in made}) == 3


@pytest.mark.oldest
def test_a_cache_lies_beside_the_file_and_no_two_share_one(tmp_path):
    result = Strip()
    folder = result.write(tmp_path / "results")
    unsaved = bring_in(folder, "CACHE").mesh_object
    path = Path(unsaved["kiln_cache"])
    assert path.is_absolute() and path.is_file() and path.parent.name == "kiln_cache"
    (tmp_path / "work").mkdir()
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "work" / "strip.blend"))
    made = [bring_in(folder, "CACHE").mesh_object for _ in range(2)]
    shown = [thing["kiln_cache"] for thing in made]
    assert len(set(shown)) == 2 and all(name.startswith("//kiln_cache") for name in shown)
    assert {Path(bpy.path.abspath(name)) for name in shown} == set((tmp_path / "work" / "kiln_cache").glob("*.pc2"))
    bpy.ops.wm.save_mainfile()
    name = made[0].name
    (tmp_path / "work").rename(tmp_path / "elsewhere")
    bpy.ops.wm.open_mainfile(filepath=str(tmp_path / "elsewhere" / "strip.blend"))
    assert worst(bpy.data.objects[name], FRAMES, result.truth()) < EXACT * result.diagonal(), "the folder moves with its cache"
    path.unlink()


@pytest.mark.oldest
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["OBJECT", "EDIT", "POSE"])
def test_the_scene_stays_as_it_was(tmp_path, way, mode):
    scene = bpy.context.scene
    if mode == "POSE":
        bpy.ops.object.armature_add()
    else:
        bpy.ops.mesh.primitive_cube_add()
    other = bpy.context.object
    scene.frame_start, scene.frame_end, scene.render.fps = 3, 77, 25
    scene.frame_set(33)
    bpy.ops.object.mode_set(mode=mode)

    def state():
        chosen = [thing.name for thing in scene.objects if thing.select_get()]
        rates = scene.render.fps, scene.render.engine, scene.render.resolution_x
        return (
            scene.frame_current,
            scene.frame_start,
            scene.frame_end,
            rates,
            chosen,
            bpy.context.object.name,
            other.mode,
            len(bpy.data.scenes),
        )

    before = state()
    imported = bring_in(Strip().write(tmp_path), way)
    assert state() == before
    assert not imported.mesh_object.select_get()
    if way == "ARMATURE":
        assert not imported.armature_object.select_get() and imported.armature_object.mode == "OBJECT"


@pytest.mark.oldest
@pytest.mark.parametrize("way", WAYS)
def test_an_import_with_motion_is_one_undo_step(tmp_path, way):
    result = Strip()
    folder = result.write(tmp_path)
    bpy.ops.mesh.primitive_cube_add()
    bpy.context.object.location.x = 2
    bpy.ops.ed.undo_push(message="before")
    bring_in(folder, way)
    bpy.ops.ed.undo()
    assert "Strip (Kiln)" not in bpy.data.collections and bpy.data.objects["Cube"].location.x == 2
    assert not len(bpy.data.actions) and not len(bpy.data.armatures) and not len(bpy.data.shape_keys)
    bpy.ops.ed.redo()
    (thing,) = (thing for thing in bpy.data.collections["Strip (Kiln)"].objects if thing.type == "MESH")
    assert worst(thing, FRAMES, result.truth()) < EXACT * result.diagonal()


@pytest.mark.oldest
def test_another_order_of_vertices_is_found_by_their_place(tmp_path):
    result = Strip()
    result.write(tmp_path)
    order = np.random.default_rng(3).permutation(len(result.vertices))
    truth = result.truth()
    result.vertices, result.weights, result.moved = result.vertices[order], result.weights[order], result.moved[:, order]
    result.faces = np.argsort(order)[result.faces]
    result.write_shape_keys(tmp_path / "shape_keys.glb")
    result.write_armature(tmp_path / "armature.glb")
    for way in WAYS:
        assert worst(bring_in(tmp_path, way).mesh_object, FRAMES, truth) < EXACT * result.diagonal()


def test_vertices_without_a_triangle_count_for_nothing(tmp_path):
    result = Strip()
    truth, size = result.truth(), result.diagonal()
    result.vertices = np.insert(result.vertices, 7, [9, 9, 9], 0)
    result.weights = np.insert(result.weights, 7, [1, 0, 0, 0], 0)
    result.moved = np.insert(result.moved, 7, [8, 8, 8], 1)
    result.faces = result.faces + (result.faces >= 7)
    folder = result.write(tmp_path)
    for way in WAYS:
        thing = bring_in(folder, way).mesh_object
        assert len(thing.data.vertices) == truth.shape[1]
        assert worst(thing, FRAMES, truth) < EXACT * size


DAMAGE = (
    "missing", "no glTF", "cut", "empty", "no animation", "moments in no order", "numbers beyond its end", "another mesh", "no number",
)  # fmt: skip


def damaged(folder, way, damage):
    path = folder / import_motion.FILES[way]
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "no glTF":
        path.write_bytes(b"not a GLB file at all, however long it may be")
    elif damage == "cut":
        path.write_bytes(whole[:-400])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "no animation":
        path.write_bytes(whole.replace(b'"animations"', b'"animationz"'))
    elif damage == "moments in no order":
        path.write_bytes(whole.replace(b"[12, 13, 14", b"[12, 10, 14"))
    elif damage == "numbers beyond its end":
        path.write_bytes(beyond(whole))
    elif damage == "another mesh":
        other = Strip()
        other.vertices = other.vertices * np.float32([1, 1.5, 1])
        other.write_shape_keys(folder / "shape_keys.glb")
        other.write_armature(folder / "armature.glb")
    elif damage == "no number":
        other = Strip()
        other.moved[3, 5] = np.nan
        other.local[3, 1, 0, 3] = np.nan
        other.write_shape_keys(folder / "shape_keys.glb")
        other.write_armature(folder / "armature.glb")


def beyond(whole):
    """The file with some of its views far behind the end of its data."""
    length = struct.unpack_from("<I", whole, 12)[0]
    document = json.loads(whole[20 : 20 + length])
    for view in (*document["bufferViews"][:3], document["bufferViews"][-1]):
        view["byteOffset"] = 10**9
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    rest = struct.pack("<I4s", len(text), b"JSON") + text + whole[20 + length :]
    return struct.pack("<4sII", b"glTF", 2, 12 + len(rest)) + rest


@pytest.mark.oldest
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_file_is_said_and_leaves_nothing(tmp_path, way, damage):
    folder = Strip().write(tmp_path / "results")
    damaged(folder, way, damage)
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "strip.blend"))

    def names():
        return {kind: sorted(entry.name for entry in getattr(bpy.data, kind)) for kind in (*import_asset.CLEANED, "shape_keys")}

    before = names()
    with pytest.raises(KilnError, match=import_motion.FILES[way]) as failure:
        bring_in(folder, way)
    assert failure.value.code == "import-failed" and "Strip" in failure.value.message and failure.value.hint
    assert names() == before and not list(tmp_path.glob("kiln_cache/*"))


def test_a_cache_that_cannot_be_written_is_said_and_leaves_nothing(tmp_path):
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "strip.blend"))
    (tmp_path / "kiln_cache").write_text("a file where the folder should be")
    before = len(bpy.data.objects)
    with pytest.raises(KilnError, match="kiln_cache"):
        bring_in(Strip().write(tmp_path / "results"), "CACHE")
    assert len(bpy.data.objects) == before and not len(bpy.data.actions)


@pytest.mark.parametrize("way", WAYS)
def test_a_result_that_moves_is_baked_as_it_stands_at_the_frame(tmp_path, way):
    imported, scene = bring_in(Strip().write(tmp_path), way), bpy.context.scene
    scene.frame_set(FRAMES[4])
    shown = imported.mesh_object.evaluated_get(bpy.context.evaluated_depsgraph_get())
    target = bpy.data.objects.new("target", bpy.data.meshes.new_from_object(shown))
    target.matrix_world = shown.matrix_world.copy()
    scene.collection.objects.link(target)
    bpy.context.view_layer.update()
    rebake.retexture(bpy.context, imported.mesh_object, target, 64, unwrap=True)
    scene.frame_set(FRAMES[0])
    with pytest.raises(KilnError, match="has no result within the ray distance"):
        rebake.retexture(bpy.context, imported.mesh_object, target, 64, unwrap=True)


def test_a_result_of_another_recipe_stands_still(tmp_path):
    folder = Strip().write(tmp_path)
    made = import_asset.import_asset(bpy.context, folder, NEAR, {**PROVENANCE, "recipe": "reconstruct"})
    assert made.mesh_object.data.shape_keys is None and made.armature_object is None and not len(bpy.data.actions)


# What operators and scripts ask for


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A finished job whose results are here, in the list; no backend."""
    now = session.current
    monkeypatch.setattr(session.Session, "want_backend", lambda self: None)
    monkeypatch.setattr(session.Session, "connect", lambda self: None)
    monkeypatch.setattr(session.Session, "drain", lambda self: False)
    data = {
        "id": "job-1", "recipe": "animate", "parameters": recipes.values(recipes.make("animate")), "title": "Strip", "state": "done",
        "source": NEAR, "created": 0.0, "finished": 0.0, "started": 0.0, "results": {"mesh.glb": ["", 0]},
    }  # fmt: skip
    made = now.jobs["job-1"] = session.Job(data)
    result = Strip()

    def downloaded():
        made.results = result.write(tmp_path / "downloaded")
        return made, result

    yield downloaded
    now.jobs.pop("job-1", None)


def last_imported():
    """The mesh of the newest import."""
    name = sorted(collection.name for collection in bpy.data.collections if collection.name.startswith("Strip (Kiln)"))[-1]
    return next(thing for thing in bpy.data.collections[name].objects if thing.type == "MESH")


def test_the_import_operator_takes_what_is_given_over_the_scenes_settings(job):
    _, result = job()
    size, truth, settings = result.diagonal(), result.truth(), bpy.context.scene.kiln
    bpy.ops.kiln.import_job(job="job-1")
    assert last_imported()["kiln_motion"] == "SHAPE_KEYS" and worst(last_imported(), FRAMES, truth) < EXACT * size
    settings.motion, settings.motion_own_start, settings.motion_start = "ARMATURE", True, 101
    job()
    bpy.ops.kiln.import_job(job="job-1")
    assert last_imported()["kiln_motion"] == "ARMATURE" and worst(last_imported(), [101 + i for i in range(9)], truth) < EXACT * size
    job()
    bpy.ops.kiln.import_job(job="job-1", motion="CACHE", start=-3, loop=True)
    thing = last_imported()
    assert thing["kiln_motion"] == "CACHE" and worst(thing, [-3, -2, 5], truth[[0, 1, 0]]) < EXACT * size
    Path(bpy.path.abspath(thing["kiln_cache"])).unlink()


def test_a_result_that_moves_is_not_made_quads(job):
    job()
    bpy.ops.kiln.import_job(job="job-1")
    with pytest.raises(RuntimeError, match="stand still"):
        bpy.ops.kiln.remesh_quads(result=last_imported().name)
    with pytest.raises(KilnError, match="stand still"):
        api.run("animate", last_imported(), quads=500)


def test_scripts_hear_of_a_motion_that_there_is_not():
    bpy.ops.mesh.primitive_cube_add()
    with pytest.raises(KilnError, match="no motion 'BONES'") as failure:
        api.animate("Cube", motion="BONES")
    assert "SHAPE_KEYS, ARMATURE, CACHE" in failure.value.hint
