"""The tetrahedral grid, what a camera sees of a mesh with gradients, and a surface that is moved by views."""

import dataclasses

import numpy as np
import pytest
import torch
import trimesh

from backend.mesh import raster
from backend.mesh.differentiable import RAYS, Lens, first_hits_in_torch, see, vertex_normals
from backend.mesh.mesh import Mesh
from backend.mesh.refine import refine
from backend.mesh.tetrahedra import EDGES, cut, distance_to, grid_around, whole_grid
from backend.views.cameras import look_at
from protocol import recipes
from tests.backend.mesh.scenes import capture

RADIUS = 0.6


def ball(detail: int, radius: float = RADIUS) -> Mesh:
    made = trimesh.creation.icosphere(detail, radius=radius)
    return Mesh(made.vertices.astype(np.float32), made.faces.astype(np.int32))


def checked(vertices, faces) -> trimesh.Trimesh:
    """The mesh, closed, turned outwards, without faces that share an edge with two others."""
    made = trimesh.Trimesh(np.asarray(vertices), np.asarray(faces), process=False)
    assert made.is_watertight and made.is_winding_consistent and made.volume > 0
    return made


def volumes(nodes, cells):
    a, b, c, d = (nodes[cells[:, k]] for k in range(4))
    return np.einsum("nk,nk->n", np.cross(b - a, c - a), d - a) / 6


class TestGrid:
    def test_its_tetrahedra_fill_what_their_diamonds_fill_and_are_all_alike(self):
        grid = whole_grid(np.array([1.0, -2.0, 0.5]), 0.5, (3, 4, 5))
        found = volumes(grid.nodes, grid.cells)
        diamonds = 2 * 4 * 5 + 3 * 3 * 5 + 3 * 4 * 4  # faces between two of the cubes
        assert np.allclose(found, 0.5**3 / 12)  # two pyramids, cut in four
        assert len(found) == 4 * diamonds

    def test_no_two_tetrahedra_overlap(self):
        grid = whole_grid(np.zeros(3), 1.0, (3, 3, 3))
        corners = grid.nodes[grid.cells]
        points = np.random.default_rng(0).uniform(1, 2, (300, 3))  # the cube in the middle is filled
        frames = np.linalg.inv(np.swapaxes(corners[:, 1:] - corners[:, :1], 1, 2))
        shares = np.einsum("mij,pmj->pmi", frames, points[:, None] - corners[:, 0])
        inside = (shares > 0).all(2) & (shares.sum(2) < 1)
        assert (inside.sum(1) == 1).all()

    def test_edges_belong_to_their_tetrahedra(self):
        grid = whole_grid(np.zeros(3), 1.0, (2, 3, 2))
        assert (grid.edges[grid.cell_edges] == np.sort(grid.cells[:, EDGES], 2)).all()
        assert len(np.unique(grid.edges, axis=0)) == len(grid.edges)

    def test_it_knows_how_far_its_nodes_are_from_the_surface_and_on_which_side(self):
        grid, distance = grid_around(ball(4), 0.1, 2)
        true = np.linalg.norm(grid.nodes, axis=1) - RADIUS
        assert np.abs(distance - true).max() < 0.003  # the facets of the ball
        assert distance.min() < -0.15 and distance.max() > 0.15

    def test_it_reaches_all_around_what_the_surface_cuts(self):
        grid, distance = grid_around(ball(3), 0.1, 1)
        crossed = (distance[grid.edges] < 0).sum(1) == 1
        assert not grid.border[grid.edges[crossed]].any()

    def test_distance_is_exact_above_a_large_triangle(self):
        mesh = Mesh(np.array([[0, 0, 0], [4, 0, 0], [0, 4, 0]], np.float32), np.array([[0, 1, 2]], np.int32))
        points = np.array([[1, 1, 0.5], [-3, 0, 4], [2, -1, 0], [6, 0, 0]])
        assert np.allclose(distance_to(mesh, points, 0.5), [0.5, 5, 1, 2])


class TestMarchingTetrahedra:
    def test_a_plane_is_found_exactly(self):
        grid = whole_grid(np.zeros(3), 1.0, (4, 4, 4))
        normal = np.array([0.3, -0.5, 0.81]) / np.linalg.norm([0.3, -0.5, 0.81])
        values = (grid.nodes - 2.05) @ normal
        surface = cut(grid, values < 0)
        vertices = surface.vertices(torch.tensor(grid.nodes), torch.tensor(values)).numpy()
        assert np.abs((vertices - 2.05) @ normal).max() < 2e-3  # LEAST
        a, b, c = (vertices[surface.faces[:, k]] for k in range(3))
        areas = np.cross(b - a, c - a)
        assert (areas @ normal > -1e-6).all()

    def test_a_ball_is_closed_and_looks_outwards(self):
        grid, distance = grid_around(ball(5), 0.1, 1)
        surface = cut(grid, distance < 0)
        made = checked(surface.vertices(torch.tensor(grid.nodes), torch.tensor(distance)), surface.faces)
        assert made.euler_number == 2
        assert made.volume == pytest.approx(4 / 3 * np.pi * RADIUS**3, rel=0.01)

    def test_any_signs_make_a_closed_manifold(self):
        grid = whole_grid(np.zeros(3), 1.0, (6, 6, 6))
        random = np.random.default_rng(3)
        inside = (random.random(len(grid.places)) < 0.4) & ~grid.border
        surface = cut(grid, inside)
        values = np.where(inside, -1.0, 1.0) * random.uniform(0.2, 1, len(inside))
        checked(surface.vertices(torch.tensor(grid.nodes), torch.tensor(values)), surface.faces)

    def test_gradients_are_those_of_finite_differences(self):
        grid, distance = grid_around(ball(3), 0.3, 1)
        surface = cut(grid, distance < 0)
        pull = torch.tensor(np.random.default_rng(0).normal(0, 1, (len(surface.edges), 3)))
        values, nodes = torch.tensor(distance / 0.3), torch.tensor(grid.nodes)
        one, other = surface.edges[0]
        values[one], values[other] = -0.4, 0.3  # away from zero, where the vertex is held

        def moved(at, of_place):
            return (surface.vertices(of_place, at) * pull).sum()

        leaves = [values.clone().requires_grad_(), nodes.clone().requires_grad_()]
        by_value, by_place = torch.autograd.grad(moved(*leaves), leaves)
        for node in (one, other):
            step = torch.zeros_like(values)
            step[node] = 1e-6
            found = (moved(values + step, nodes) - moved(values - step, nodes)) / 2e-6
            assert by_value[node].item() == pytest.approx(found.item(), rel=1e-5)
            for axis in range(3):
                aside = torch.zeros_like(nodes)
                aside[node, axis] = 1e-6
                found = (moved(values, nodes + aside) - moved(values, nodes - aside)) / 2e-6
                assert by_place[node, axis].item() == pytest.approx(found.item(), rel=1e-5, abs=1e-8)


class TestWhatACameraSees:
    camera = look_at((0.3, -3, 0.5), (0, 0, 0), 64, 0.6)

    def seen(self, vertices, mesh):
        faces = torch.tensor(mesh.faces).long()
        return see(vertices, faces, vertex_normals(vertices.detach(), faces), Lens.of(self.camera, "cpu"))

    @pytest.mark.parametrize("direction", [(1, 0, 0), (0, 0, 1), (0, 1, 0)])
    def test_a_moving_silhouette_has_the_gradient_of_finite_differences(self, direction):
        mesh = ball(4)
        across = torch.arange(64) / 64
        weights = torch.sin(3 * across)[:, None] + torch.cos(5 * across)[None]  # smooth, or the rays' steps would show
        along, vertices = torch.tensor(direction, dtype=torch.float32), torch.tensor(mesh.vertices)
        shift = torch.zeros((), requires_grad=True)
        (self.seen(vertices + shift * along, mesh).cover * weights).sum().backward()
        step = 0.03
        ahead, behind = ((self.seen(vertices + s * step * along, mesh).cover * weights).sum() for s in (1, -1))
        assert shift.grad.item() == pytest.approx((ahead - behind).item() / (2 * step), rel=0.05)

    def test_a_growing_ball_has_the_gradient_of_finite_differences(self):
        mesh = ball(4)
        vertices, size = torch.tensor(mesh.vertices), torch.ones((), requires_grad=True)
        self.seen(vertices * size, mesh).cover.sum().backward()
        ahead, behind = (self.seen(vertices * s, mesh).cover.sum().item() for s in (1.02, 0.98))
        assert size.grad.item() == pytest.approx((ahead - behind) / 0.04, rel=0.03)

    def test_the_place_that_a_pixel_shows_moves_along_its_ray_as_far_as_the_surface_lets_it(self):
        mesh = ball(4)
        vertices, size = torch.tensor(mesh.vertices), torch.ones((), requires_grad=True)
        shown = self.seen(vertices * size, mesh)
        middle = torch.argmax(shown.facing)
        for axis in range(3):
            (pull,) = torch.autograd.grad(shown.places[middle, axis], size, retain_graph=True)
            ray = shown.places[middle].detach() - torch.tensor(self.camera.centre, dtype=torch.float32)
            assert pull.item() == pytest.approx((-RADIUS * ray / ray.norm())[axis].item(), abs=0.01)
        depth = self.seen(vertices * 1.01, mesh).depth.reshape(-1)[shown.pixels[middle]].item()
        assert depth - shown.depth.reshape(-1)[shown.pixels[middle]].item() == pytest.approx(-0.01 * RADIUS, rel=0.05)

    def test_a_gpu_would_find_the_faces_that_the_z_buffer_finds(self):
        random = np.random.default_rng(1)
        vertices = random.uniform(-0.6, 0.6, (90, 3))
        faces = np.arange(90, dtype=np.int32).reshape(-1, 3)
        screen, inverse = raster.project(vertices, self.camera.scaled(RAYS))
        wanted = raster.z_buffer(screen, inverse, faces, 64 * RAYS, 64 * RAYS)[1]
        found = first_hits_in_torch(torch.tensor(screen), torch.tensor(inverse), torch.tensor(faces).long(), 64 * RAYS, 64 * RAYS)
        assert (wanted >= 0).mean() > 0.1
        assert (found.numpy() == wanted).mean() > 0.9999  # a ray through an edge may go either way


@pytest.fixture(scope="module")
def views():
    def color(points):
        return 0.5 + 0.2 * np.sin(14 * points) + 0.2 * np.sin(23 * points[..., [1, 2, 0]])

    made = capture(lambda p: np.linalg.norm(p, axis=-1) - RADIUS, color, count=16, size=80)
    return dataclasses.replace(made, depth=None, normals=None)


def dented() -> Mesh:
    mesh = ball(4)
    out = mesh.vertices / RADIUS
    for place, depth in (((0.6, -0.8, 0), 0.08), ((-0.8, 0, 0.6), -0.06), ((0, 0.6, -0.8), 0.07)):
        out = out * (1 - depth * np.exp(-np.sum((mesh.vertices / RADIUS - place) ** 2, 1) / 0.3))[:, None]
    return Mesh((out * RADIUS).astype(np.float32), mesh.faces)


def error(mesh: Mesh) -> float:
    """Mean distance of the surface to the ball's."""
    points = trimesh.sample.sample_surface(trimesh.Trimesh(mesh.vertices, mesh.faces, process=False), 20_000, seed=0)[0]
    return float(np.abs(np.linalg.norm(points, axis=1) - RADIUS).mean())


WANTED = recipes.RefineSurface(on=True, iterations=80, grid=16)


@pytest.fixture(scope="module")
def refined(views):
    return refine(dented(), None, views, WANTED, 2000, 0)


class TestRefine:
    def test_views_pull_a_dented_ball_back_into_shape(self, refined):
        assert error(refined) < error(dented()) / 2

    def test_the_result_is_closed_and_within_its_faces(self, refined):
        checked(refined.vertices, refined.faces)
        assert len(refined.faces) <= 2000
        assert refined.vertices.dtype == np.float32 and refined.faces.dtype == np.int32

    def test_the_same_seed_gives_the_same_mesh(self, views):
        short = dataclasses.replace(WANTED, iterations=10)
        one, two, other = (refine(dented(), None, views, short, 2000, seed) for seed in (5, 5, 6))
        assert np.array_equal(one.vertices, two.vertices) and np.array_equal(one.faces, two.faces)
        assert not np.array_equal(one.vertices, other.vertices)

    def test_held_out_views_are_not_looked_at(self, views):
        short = dataclasses.replace(WANTED, iterations=10)
        spoilt = dataclasses.replace(views, images=np.where(views.holdout[:, None, None, None], 0.9, views.images).astype(np.float32))
        assert np.array_equal(
            refine(dented(), None, spoilt, short, 2000, 0).vertices, refine(dented(), None, views, short, 2000, 0).vertices
        )

    def test_views_that_do_not_agree_leave_it_near_where_it_was(self, views):
        random = np.random.default_rng(0)
        noise = random.random(views.images.shape).astype(np.float32)
        made = refine(ball(4), None, dataclasses.replace(views, images=noise), WANTED, 2000, 0)
        assert error(made) < 0.02

    def test_it_stops_when_the_report_raises(self, views):
        class Stop(Exception):
            pass

        def report(fraction, text="", preview=None):
            raise Stop

        with pytest.raises(Stop):
            refine(dented(), None, views, WANTED, 2000, 0, progress=report)
