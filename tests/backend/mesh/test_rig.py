"""Rigs of meshes whose motion is known: made of rigid parts, of bones with weights, of a part that stretches."""

import numba
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from backend.mesh import rig
from backend.mesh.mesh import AnimatedMesh, TexturedMesh
from protocol import recipes

MOMENTS = 12


def tube(rings=25, sides=12, length=2.0, radius=0.15):
    """A tube along z from 0 to `length`, with a seam: the first and last column of its vertices lie at the same places."""
    turn = np.linspace(0, 2 * np.pi, sides + 1)
    turn[-1] = 0
    z = np.linspace(0, length, rings)
    vertices = np.stack([np.tile(np.cos(turn), rings) * radius, np.tile(np.sin(turn), rings) * radius, np.repeat(z, sides + 1)], 1)
    corner = (np.arange(rings - 1)[:, None] * (sides + 1) + np.arange(sides)).reshape(-1)
    faces = [np.stack([corner, corner + 1, corner + sides + 2], 1), np.stack([corner, corner + sides + 2, corner + sides + 1], 1)]
    return vertices.astype(np.float32), np.concatenate(faces).astype(np.int32)


def moving(rest, faces, moved):
    none = np.zeros_like(rest)
    mesh = TexturedMesh(rest, none, none[:, :2], faces, np.zeros((4, 4, 3), np.uint8))
    moved = np.asarray(moved, np.float32)
    return AnimatedMesh(mesh, moved, np.zeros_like(moved), np.arange(1.0, len(moved) + 1), 24.0)


def bending(rest, hinge=1.0, blend=0.25, most=1.2):
    """The upper part turns about x at `hinge`; weights pass from one bone to the other within `blend` of it."""
    share = np.clip((rest[:, 2] - hinge + blend) / (2 * blend), 0, 1)[:, None]
    pivot = np.array([0, 0, hinge])
    turns = [Rotation.from_rotvec([angle, 0, 0]) for angle in np.linspace(0, most, MOMENTS)]
    return [(1 - share) * rest + share * (turn.apply(rest - pivot) + pivot) for turn in turns]


def parts(places, moments=MOMENTS):
    """Tubes at `places`, each turning and moving in its own way."""
    random = np.random.default_rng(4)
    vertices, faces = tube(rings=6, length=0.5)
    rest = np.concatenate([vertices + place for place in places]).astype(np.float32)
    every = np.concatenate([faces + number * len(vertices) for number in range(len(places))])
    moved = np.empty((moments, *rest.shape))
    for number, place in enumerate(places):
        axis, way = random.normal(size=3), random.normal(size=3) * 0.3
        own = slice(number * len(vertices), (number + 1) * len(vertices))
        for moment in range(moments):
            share = moment / (moments - 1)
            moved[moment, own] = Rotation.from_rotvec(axis * share).apply(rest[own] - place) + place + way * share
    return rest, every, moved


def errors(found, mesh):
    """Mean distance at each moment, in diagonals."""
    size = np.linalg.norm(np.ptp(mesh.mesh.vertices, axis=0))
    rest = mesh.mesh.vertices
    return np.array([np.linalg.norm(rig.posed(found, rest, t) - there, axis=1).mean() for t, there in enumerate(mesh.vertices)]) / size


def matrices(quaternions):
    return Rotation.from_quat(np.roll(quaternions, -1, -1)).as_matrix()


@pytest.fixture(scope="module")
def bent():
    rest, faces = tube()
    mesh = moving(rest, faces, bending(rest))
    return mesh, rig.solve(mesh, recipes.Armature(bones=16))


def test_a_tube_bent_by_two_bones_is_followed_by_few(bent):
    mesh, found = bent
    assert errors(found, mesh).max() < 1e-3 and errors(found, mesh).mean() < 5e-4
    assert 2 <= len(found.parents) <= 4  # of the 16 allowed
    assert (found.scales == 1).all()


def test_the_joint_lies_at_the_hinge(bent):
    mesh, _ = bent
    found = rig.solve(mesh, recipes.Armature(bones=2))
    assert len(found.parents) == 2 and errors(found, mesh).mean() < 3e-3
    y, z = found.heads[1, 1:]
    assert abs(y) < 0.03 and abs(z - 1) < 0.1  # x is the hinge's own axis: any point on it is one


def test_at_most_four_weights_a_vertex_heaviest_first(bent):
    for found in (bent[1], rig.solve(moving(*swaying()), recipes.Armature(bones=24))):
        assert found.joints.shape == found.weights.shape == (found.joints.shape[0], 4)
        assert found.joints.min() >= 0 and found.joints.max() < len(found.parents)
        assert (found.weights >= 0).all() and np.allclose(found.weights.sum(1), 1, atol=1e-6)
        assert (np.diff(found.weights, axis=1) <= 1e-7).all()
        for joints, weights in zip(found.joints, found.weights):
            used = joints[weights > 0]
            assert len(set(used)) == len(used)


def swaying():
    """A tube whose bend grows along it: no number of bones is exact."""
    rest, faces = tube()
    moved = [rest + [0, 0, 0] for _ in range(MOMENTS)]
    for moment, there in enumerate(moved):
        angle = rest[:, 2] * 1.5 * np.sin(2 * np.pi * moment / MOMENTS)
        there[:, 1] = rest[:, 1] * np.cos(angle) - rest[:, 2] * np.sin(angle) * 0.5
    return rest, faces, moved


def test_more_bones_follow_better_and_the_budget_is_kept():
    mesh = moving(*swaying())
    found = {count: rig.solve(mesh, recipes.Armature(bones=count)) for count in (1, 3, 8)}
    assert all(len(one.parents) <= count for count, one in found.items())
    coarse, middle, fine = (errors(found[count], mesh).mean() for count in (1, 3, 8))
    assert fine < middle < coarse and fine < 0.005


def test_copies_along_a_seam_get_the_same_weights(bent):
    mesh, found = bent
    columns = 13
    first, last = np.arange(0, len(found.joints), columns), np.arange(columns - 1, len(found.joints), columns)
    assert np.array_equal(mesh.mesh.vertices[first], mesh.mesh.vertices[last])
    assert np.array_equal(found.joints[first], found.joints[last]) and np.array_equal(found.weights[first], found.weights[last])


def test_vertices_at_one_place_that_part_are_not_held_together():
    rest, faces, _ = parts(np.zeros((2, 3)))
    half = len(rest) // 2
    moved = np.repeat(rest[None], MOMENTS, 0)
    moved[:, half:, 0] += np.linspace(0, 2, MOMENTS)[:, None]
    mesh = moving(rest, faces, moved)
    found = rig.solve(mesh, recipes.Armature(bones=4))
    assert errors(found, mesh).max() < 1e-4


def test_rigid_parts_get_a_bone_each_and_nothing_else():
    places = np.array([[0, 0, 0], [1.5, 0, 0.2], [0, 1.5, 0.4]])
    mesh = moving(*parts(places))
    found = rig.solve(mesh, recipes.Armature(bones=12))
    assert len(found.parents) == 3 and errors(found, mesh).max() < 1e-4
    owners = found.joints[:, 0].reshape(3, -1)
    assert (owners == owners[:, :1]).all() and len(set(owners[:, 0])) == 3 and found.weights[:, 0].min() > 0.999
    assert (found.scales == 1).all()


def test_a_part_that_stretches_takes_one_bone_that_scales():
    rest, faces = tube()
    away = Rotation.from_rotvec([0.4, 0.7, 0.1])
    rest = away.apply(rest).astype(np.float32)  # along no axis of the world
    moved = [away.apply(away.inv().apply(rest) * [1 - 0.2 * share, 1 - 0.2 * share, 1 + share]) for share in np.linspace(0, 1, MOMENTS)]
    mesh = moving(rest, faces, moved)
    found = rig.solve(mesh, recipes.Armature(bones=8))
    assert len(found.parents) == 1 and errors(found, mesh).max() < 1e-3
    assert found.scales[-1, 0, 1] == pytest.approx(2, abs=0.02)  # along the bone
    along = (found.tails - found.heads)[0] / np.linalg.norm(found.tails - found.heads)
    assert abs(along @ away.apply([0, 0, 1])) > 0.999
    stiff = rig.solve(mesh, recipes.Armature(bones=1, scale=False))
    assert (stiff.scales == 1).all() and errors(stiff, mesh).max() > 0.02


def test_bones_stand_in_a_tree_and_point_along_their_second_axis(bent):
    places = np.array([[0, 0, 0], [1.5, 0, 0.2], [0, 1.5, 0.4], [1.5, 1.5, 0]])
    for found in (
        bent[1],
        rig.solve(moving(*swaying()), recipes.Armature(bones=12)),
        rig.solve(moving(*parts(places)), recipes.Armature()),
    ):
        count = len(found.parents)
        assert found.parents[0] == -1 and (found.parents[1:] >= 0).all() and (found.parents < np.arange(count)).all()
        along = found.tails - found.heads
        length = np.linalg.norm(along, axis=1)
        assert length.min() > 0 and np.allclose(matrices(found.axes)[:, :, 1] * length[:, None], along, atol=1e-6)
        for name in ("axes", "rotations"):
            assert np.allclose(np.linalg.norm(getattr(found, name), axis=-1), 1, atol=1e-6)


def test_a_posed_vertex_is_what_the_rig_s_equation_says():
    random = np.random.default_rng(7)
    turns = Rotation.random(4, random_state=1).as_quat(scalar_first=True)
    found = rig.Rig(
        heads=random.normal(size=(2, 3)), tails=random.normal(size=(2, 3)), axes=turns[:2], parents=np.array([-1, 0]),
        joints=np.array([[0, 1, 0, 0]]), weights=np.array([[0.7, 0.3, 0, 0]]), rotations=turns[None, 2:],
        translations=random.normal(size=(1, 2, 3)), scales=random.uniform(0.5, 2, (1, 2, 3)),
    )  # fmt: skip
    point = random.normal(size=3)
    expected = np.zeros(3)
    for bone, weight in enumerate((0.7, 0.3)):
        axes, turn = matrices(found.axes[bone]), matrices(found.rotations[0, bone])
        own = axes.T @ (point - found.heads[bone]) * found.scales[0, bone]
        expected += weight * (turn @ axes @ own + found.heads[bone] + found.translations[0, bone])
    assert np.allclose(rig.posed(found, point[None], 0)[0], expected)


def test_a_mesh_of_one_moment_or_without_motion_has_a_rig():
    rest, faces = tube()
    for moved in ([rest], [rest] * 3):
        found = rig.solve(moving(rest, faces, moved), recipes.Armature())
        assert len(found.parents) == 1 and np.allclose(rig.posed(found, rest, 0), rest, atol=1e-5)


def test_the_number_of_threads_changes_no_bit():
    rest, faces = tube(rings=15)
    mesh = moving(rest, faces, bending(rest, hinge=1.2))
    threads = numba.get_num_threads()
    found = []
    try:
        for count in {1, threads}:
            numba.set_num_threads(count)
            found.append(rig.solve(mesh, recipes.Armature(bones=6)))
    finally:
        numba.set_num_threads(threads)
    found.append(rig.solve(mesh, recipes.Armature(bones=6)))
    for other in found[1:]:
        for name, values in vars(found[0]).items():
            assert np.array_equal(values, getattr(other, name)), name


def test_a_report_that_raises_ends_it():
    class Enough(Exception):
        pass

    told = []

    def report(fraction, text="", preview=None):
        told.append(fraction)
        if fraction > 0.5:
            raise Enough

    rest, faces = tube()
    with pytest.raises(Enough):
        rig.solve(moving(rest, faces, bending(rest)), recipes.Armature(), report)
    assert told == sorted(told) and len(told) > 10
