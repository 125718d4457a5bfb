"""Nodes carry what is bound to them, and a sequence of splats says the same as the motion that it came from."""

import numpy as np
from scipy.spatial.transform import Rotation

from backend.splats.model import Splats
from backend.splats.motion import Binding, Motion, matrices, product
from backend.splats.render import render
from backend.splats.sequence import SplatSequence
from backend.splats.start import on_surface
from tests.backend.splats import two_balls


def quaternions(count: int) -> np.ndarray:
    """Unit, w first."""
    return np.roll(Rotation.random(count, np.random.RandomState(0)).as_quat(), 1, axis=1)


def test_quaternions_agree_with_scipy():
    first, second = quaternions(12)[:6], quaternions(12)[6:]
    both = [Rotation.from_quat(np.roll(one, -1, axis=1)) for one in (first, second)]
    assert np.allclose(matrices(first), both[0].as_matrix())
    assert np.allclose(matrices(product(first, second)), (both[0] * both[1]).as_matrix())


def test_a_rigid_subject_is_carried_rigidly_whatever_the_weights():
    turn, shift = quaternions(1)[0], np.array([0.3, -0.2, 0.1])
    random = np.random.default_rng(1)
    nodes, points = random.normal(0, 0.5, (5, 3)), random.normal(0, 0.5, (40, 3)).astype(np.float32)
    rotation = matrices(turn)
    translations = nodes @ rotation.T + shift - nodes
    weights = random.random((40, 3))
    binding = Binding(random.integers(0, 5, (40, 3)), weights / weights.sum(1, keepdims=True))
    # A quaternion and its negative are one rotation: the blend must not care.
    turns = np.tile(turn, (2, 5, 1)) * np.where(random.random((2, 5, 1)) < 0.5, -1, 1)
    motion = Motion(0, nodes, turns, np.stack([np.zeros((5, 3)), translations]), points, binding)
    assert np.abs(motion.carry(points, binding, 1) - (points @ rotation.T + shift)).max() < 1e-6
    assert np.abs(matrices(motion.turns(binding, 1)) - rotation).max() < 1e-6


def test_points_near_the_surface_move_with_the_part_that_they_belong_to():
    motion = two_balls.motion(4)
    rest, ball = two_balls.points(500)
    binding = motion.bind(rest)
    assert np.allclose(binding.weights.sum(1), 1, atol=1e-6)
    for moment in range(4):
        off = np.abs(motion.carry(rest, binding, moment) - two_balls.carried(rest, ball, moment)).max(1)
        assert (off < 1e-5).mean() > 0.99  # where the balls nearly touch, the nearest anchor of few may be the other's


def test_each_moment_of_a_sequence_has_its_changes_and_no_others():
    count, random = 7, np.random.default_rng(0)
    still = Splats(
        *(random.normal(0, 1, shape).astype(np.float32) for shape in ((count, 3), (count, 4), (count, 3), (count,), (count, 4, 3)))
    )
    turns = quaternions(3 * count).reshape(3, count, 4).astype(np.float32)
    means, colors = (random.normal(0, 1, (3, count, 3)).astype(np.float32) for _ in range(2))
    sequence = SplatSequence(still, means, turns, colors=colors)
    assert len(sequence) == 3
    here = sequence.at(2)
    assert np.array_equal(here.means, means[2]) and here.log_scales is still.log_scales and here.opacity_logits is still.opacity_logits
    unit = still.quaternions / np.linalg.norm(still.quaternions, axis=1, keepdims=True)
    turned = here.quaternions / np.linalg.norm(here.quaternions, axis=1, keepdims=True)
    assert np.abs(matrices(turned) - matrices(turns[2]) @ matrices(unit)).max() < 1e-5
    assert np.allclose(here.sh[:, 0], still.sh[:, 0] + colors[2]) and np.array_equal(here.sh[:, 1:], still.sh[:, 1:])
    assert not np.shares_memory(here.sh, still.sh)
    grown = SplatSequence(still, means, turns, log_scales=np.ones((3, count, 3), np.float32), opacity_logits=np.full((3, count), -2.0)).at(
        0
    )
    assert np.allclose(grown.log_scales, still.log_scales + 1) and np.allclose(grown.opacity_logits, still.opacity_logits - 2)


def test_a_sequence_drawn_at_a_moment_shows_that_moment():
    """Splats of the balls at rest, carried by the true motion, look like the balls at that moment."""
    views, motion = two_balls.views(3, fitted=10), two_balls.motion(3)
    still = on_surface(views.at(0), 2000, 0, np.random.default_rng(0))
    binding = motion.bind(still.means)
    means = np.stack([motion.carry(still.means, binding, one) for one in range(3)])
    sequence = SplatSequence(still, means, np.stack([motion.turns(binding, one) for one in range(3)]))
    held = views.scored_at(2)
    errors = [float(((render(one, held.cameras[0]).color - held.on_black()[0]) ** 2).mean()) for one in (sequence.at(2), sequence.at(0))]
    assert errors[0] < 0.01 and errors[1] > 3 * errors[0]
