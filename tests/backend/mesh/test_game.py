"""game.glb by independent readers: trimesh, and the Khronos validator."""

import dataclasses
import json
import struct

import numpy as np
import pytest
import trimesh

from backend.mesh import game, raster
from backend.mesh.bake import vertex_normals, with_normals
from backend.mesh.decimate import decimate
from backend.mesh.hulls import Hulls
from backend.mesh.lods import budgets, levels
from backend.mesh.mesh import Mesh, TexturedMesh
from backend.mesh.unwrap import unwrap
from backend.pipelines.reconstruct import reconstruct
from backend.pipelines.run import Run
from backend.views.cameras import look_at
from backend.views.views import Frame
from protocol import recipes
from protocol.errors import KilnError
from tests import gltf
from tests.backend.ball import write_ball

FRAME = Frame(np.array([5.0, -3.0, 2.0]), 0.5, np.array([5.0, -3.0, 1.0]))
ENGINES = ("gltf", "godot", "unity", "unreal")


def options(**values) -> recipes.Game:
    return recipes.make("reconstruct", {f"game.{name}": value for name, value in values.items()}).game


@pytest.fixture(scope="module")
def full() -> TexturedMesh:
    """A cylinder with every map."""
    random = np.random.default_rng(0)
    shape = trimesh.creation.cylinder(0.4, 1.0, sections=24).subdivide()
    mesh = Mesh(shape.vertices.astype(np.float32), shape.faces.astype(np.int32))
    normals = vertex_normals(mesh).astype(np.float32)
    uv = ((mesh.vertices[:, :2] + [0.5, 0.5]) * (0.6 + 0.4 * mesh.vertices[:, 2:])).astype(np.float32)
    along = np.cross(normals, [0.3, 0.5, 0.8])
    tangents = np.concatenate([along / np.linalg.norm(along, axis=1, keepdims=True), np.ones((len(normals), 1))], 1)
    maps = {name: random.integers(0, 256, (64, 64, 3)).astype(np.uint8) for name in ("base_color", "normal_map", "emission")}
    opacity, material = (random.integers(0, 256, (64, 64, *more)).astype(np.uint8) for more in ((), (2,)))
    return TexturedMesh(
        mesh.vertices, normals, uv, mesh.faces, opacity=opacity, material=material, tangents=tangents.astype(np.float32), **maps
    )


@pytest.fixture(scope="module")
def chain(full):
    return levels(full, budgets(len(full.faces), 0.5, 2))


BOX = trimesh.creation.box((0.8, 0.8, 1.0))
HULLS = Hulls([Mesh(BOX.vertices.astype(np.float32), BOX.faces.astype(np.int32))] * 2, 0.05)


def made(full, chain, **values) -> game.GameAsset:
    p = options(**{"engine": "gltf", "lods": 2, **values})
    return game.GameAsset(full, chain if p.lods else [], HULLS if p.hulls else None, p, game.asset_name(p.name, "Old chair, 2"), [])


def document(path):
    data = path.read_bytes()
    return json.loads(data[20 : 20 + struct.unpack_from("<I", data, 12)[0]])


@pytest.mark.parametrize("engine", ENGINES)
def test_levels_hulls_and_names_are_as_asked_and_the_validator_finds_no_fault(full, chain, engine, tmp_path):
    report = made(full, chain, engine=engine).save(tmp_path / "game.glb", FRAME)
    names = [f"Old_chair_2_LOD{number}" for number in range(3)]
    hulls = {
        "gltf": ["Old_chair_2-collision-01", "Old_chair_2-collision-02"],
        "godot": ["Old_chair_2-01-convcolonly", "Old_chair_2-02-convcolonly"],
        "unity": ["Old_chair_2_Collider_01", "Old_chair_2_Collider_02"],
        "unreal": ["UCX_Old_chair_2_LOD0_01", "UCX_Old_chair_2_LOD0_02"],
    }[engine]
    read = trimesh.load(tmp_path / "game.glb", process=False).geometry
    assert [len(read[name].faces) for name in names] == [len(full.faces), *(len(level.faces) for level in chain)]
    assert [one["name"] for one in report["levels"]] == names and report["hulls"] == hulls
    assert [one["faces"] for one in report["levels"]] == [len(read[name].faces) for name in names]
    for name in names:
        assert np.asarray(read[name].visual.material.baseColorTexture).shape == (64, 64, 4) and report["texture_size"] == 64
    for name in hulls:
        assert read[name].is_convex
    told = document(tmp_path / "game.glb")
    assert [node["name"] for node in told["nodes"]] == names + hulls == [body["name"] for body in told["meshes"]]
    assert len(told["materials"]) == 1 and told["nodes"][0]["extensions"]["MSFT_lod"]["ids"] == [1, 2]
    assert told["nodes"][0]["extras"]["MSFT_screencoverage"] == [one["until"] for one in report["levels"]]
    assert told["scenes"][0]["nodes"] == [0, 3, 4]  # a reader that knows no levels shows the first
    assert gltf.faults(tmp_path / "game.glb") == []


def test_the_same_asset_is_the_same_file(full, chain, tmp_path):
    for name in ("one.glb", "other.glb"):
        made(full, chain).save(tmp_path / name, FRAME)
    assert (tmp_path / "one.glb").read_bytes() == (tmp_path / "other.glb").read_bytes()


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ({"pivot": "base"}, (-0.8, 0.0, -0.8), (0.8, 2.0, 0.8)),  # twice as large in metres as in the unit frame; Y up
        ({"pivot": "centre", "scale": 100.0}, (-80, -100, -80), (80, 100, 80)),
        ({"pivot": "world"}, (4.2, 1.0, 2.2), (5.8, 3.0, 3.8)),
        ({"pivot": "source", "up": "z"}, (-0.8, -0.8, 0.0), (0.8, 0.8, 2.0)),
    ],
)
def test_pivot_axes_and_units(full, chain, values, low, high, tmp_path):
    made(full, chain, **values).save(tmp_path / "game.glb", FRAME)
    for name, mesh in trimesh.load(tmp_path / "game.glb", process=False).geometry.items():
        if "LOD0" in name or "collision" in name:
            assert np.allclose(mesh.bounds, [low, high], rtol=1e-5, atol=1e-5) and mesh.volume > 0
    assert all(set(node) <= {"name", "mesh", "extensions", "extras"} for node in document(tmp_path / "game.glb")["nodes"])  # no transforms


@pytest.mark.parametrize(
    ("channels", "kept", "lost"),
    [
        (12, {"color": 3, "opacity": 1, "normals": 3, "surface": 2, "emission": 3}, []),
        (9, {"color": 3, "opacity": 1, "normals": 3, "surface": 2}, ["Emission"]),
        (8, {"color": 3, "opacity": 1, "normals": 3}, ["Roughness", "Emission"]),
        (6, {"color": 3, "opacity": 1, "surface": 2}, ["normal map", "Emission"]),
        (3, {"color": 3}, ["Opacity", "normal map", "Roughness", "Emission"]),
    ],
)
def test_maps_keep_to_the_channels(full, chain, channels, kept, lost, tmp_path):
    mesh, warnings = game.budgeted(full, channels)
    assert game.used_channels(mesh) == kept and len(warnings) == len(lost)
    assert all(word in sentence for word, sentence in zip(lost, warnings))
    report = dataclasses.replace(made(full, chain), mesh=mesh, warnings=warnings).save(tmp_path / "game.glb", FRAME)
    assert report["channels"] == kept
    told = document(tmp_path / "game.glb")
    material = told["materials"][0]
    pictures = 1 + ("normals" in kept) + ("surface" in kept) + ("emission" in kept)
    assert len(told["images"]) == pictures and ("alphaMode" in material) == ("opacity" in kept)
    if "surface" not in kept:
        assert material["pbrMetallicRoughness"]["roughnessFactor"] == pytest.approx(full.material[..., 0].mean() / 255, abs=0.003)
    assert gltf.faults(tmp_path / "game.glb") == []


def test_given_sizes_are_written_and_wrong_ones_refused(full, chain, tmp_path):
    report = made(full, chain, lod_sizes="0.5, 0.2").save(tmp_path / "game.glb", FRAME)
    assert [one["until"] for one in report["levels"]] == [0.5, 0.2, 0.0]
    assert recipes.lod_sizes(options(lods=2, lod_sizes="0.5 0.2 0.01")) == [0.5, 0.2, 0.01]
    for wrong in ("0.5", "0.2 0.5", "2 0.1", "half a third", "0.5 0.4 0.3 0.2"):
        with pytest.raises(KilnError, match="lod_sizes"):
            options(lods=2, lod_sizes=wrong)


def test_names_have_no_signs_that_engines_take_for_something(full):
    assert game.asset_name("SM_{name}", "wood/chair: No. 3 (old)") == "SM_wood_chair_No_3_old"
    assert game.asset_name("{name}", "") == "asset" and game.asset_name("{name}", "Stühle") == "Stühle"
    assert game.level_names("steering_wheel", 1, "godot") == ["steering_wheel_mesh"]  # Godot would make a vehicle's wheel of it
    assert game.level_names("steering_wheel", 1, "unity") == ["steering_wheel"]


def test_the_normal_map_of_the_dense_surface_shows_what_the_mesh_lost():
    def bumpy(points):
        return points * (0.7 + 0.02 * np.sin(12 * points).prod(1))[:, None]

    ball = trimesh.creation.icosphere(6)
    dense = Mesh(bumpy(ball.vertices).astype(np.float32), ball.faces.astype(np.int32))
    plain = TexturedMesh(**_uv_of(decimate(dense, 1000)))
    mapped = with_normals(plain, dense)
    assert np.array_equal(mapped.faces, plain.faces)
    camera = look_at((2.5, -1.5, 1.0), (0, 0, 0), 128, 0.7)
    exact = TexturedMesh(dense.vertices, vertex_normals(dense).astype(np.float32), dense.vertices[:, :2], dense.faces, plain.base_color)
    truth, there = raster.normals(exact, camera)
    errors = []
    for mesh in (plain, mapped):
        found, seen = raster.normals(mesh, camera)
        both = there & seen
        errors.append(np.degrees(np.arccos(np.clip((found[both] * truth[both]).sum(1), -1, 1))).mean())
    assert errors[1] < 0.35 * errors[0]


def _uv_of(mesh):
    source, uv, faces = unwrap(mesh, 256, 2)
    normals = vertex_normals(mesh)[source].astype(np.float32)
    return {
        "vertices": mesh.vertices[source],
        "normals": normals,
        "uv": uv,
        "faces": faces,
        "base_color": np.full((256, 256, 3), 128, np.uint8),
    }


SMALL = {
    "fit.splats": 2000, "fit.iterations": 150, "surface.grid": 40, "surface.faces": 600, "texture.size": 100, "texture.power_of_two": True,
}  # fmt: skip


def test_a_job_makes_game_glb_beside_the_mesh_and_goes_on_from_finished_stages(tmp_path):
    views = tmp_path / "views"
    views.mkdir()
    write_ball(views, size=64, count=14)
    table = json.loads((views / "transforms.json").read_text())
    for frame in table["frames"]:
        del frame["geometry_file_path"]  # colour alone: the normal map comes from the dense surface
    (views / "transforms.json").write_text(json.dumps(table))
    values = {**SMALL, "game.engine": "unreal", "game.lods": 2, "game.hulls": 4}
    results = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        run = Run(tmp_path / "stages", title="ball 1")
        reconstruct(run, views, recipes.make("reconstruct", values)).save(tmp_path / name)
        results.append(json.loads((tmp_path / name / "report.json").read_text("utf-8")))
    assert {"Extract surface", "Decimate", "Bake normals", "Levels of detail", "Collision hulls"} <= set(results[1]["cached_stages"])
    told = results[0]["game"]
    assert results[0]["warnings"] == []
    read = trimesh.load(tmp_path / "first" / "game.glb", process=False).geometry
    assert [len(read[f"ball_1_LOD{number}"].faces) for number in range(3)] == [one["faces"] for one in told["levels"]]
    assert told["levels"][0]["faces"] <= 600 and told["levels"][1]["faces"] <= 300 and told["levels"][2]["faces"] <= 150
    assert told["texture_size"] == 64 and told["channels"] == {"color": 3, "normals": 3} and told["hull_error"] <= 0.1
    assert read["ball_1_LOD0"].visual.material.baseColorTexture.size == read["ball_1_LOD0"].visual.material.normalTexture.size == (64, 64)
    assert (tmp_path / "first" / "game.glb").read_bytes() == (tmp_path / "second" / "game.glb").read_bytes()
    (tmp_path / "plain").mkdir()
    reconstruct(Run(tmp_path / "stages"), views, recipes.make("reconstruct", SMALL)).save(tmp_path / "plain")
    assert not (tmp_path / "plain" / "game.glb").exists()
    assert (tmp_path / "plain" / "mesh.glb").read_bytes() == (tmp_path / "first" / "mesh.glb").read_bytes()
    assert gltf.faults(tmp_path / "first" / "game.glb", tmp_path / "first" / "mesh.glb") == []
