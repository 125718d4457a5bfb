"""The surface moved by the views (IM-3D, appendix A.5): marching cubes' mesh becomes a deformable tetrahedral grid (DMTet, Shen et al.
2021) that is optimised until its silhouettes are the views' and what one view shows of the surface looks the same in its neighbours.

No texture is optimised beside the shape. Each step draws one view through the surface from the pictures of its neighbours: the place
that a pixel shows is looked up in them, as in multi-view stereo on meshes (Delaunoy and Pollefeys 2014), so that colour pulls at the
shape with all the detail of the pictures. They are compared by local structure (SSIM without its term of brightness) beside plain
colour: views that do not quite agree still share it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numba
import numpy as np
import torch
from jaxtyping import Float, Int

from backend.mesh.clean import drop_pieces
from backend.mesh.decimate import decimate
from backend.mesh.differentiable import Lens, Seen, see, vertex_normals
from backend.mesh.mesh import Mesh
from backend.mesh.tetrahedra import Grid, cut, grid_around
from backend.progress import Progress, silent
from backend.splats.model import Splats
from backend.views.views import Views
from protocol import recipes
from protocol.errors import KilnError


@dataclass(frozen=True)
class Settings:
    """Numbers of the optimisation that no user needs. Lengths in cubes of the grid.

    rings: of tetrahedra around those that the surface cuts: the room that it has to move.
    hold: steps between two marches; in between the surface keeps its topology.
    rate, decay: Adam's rate of the signed distances, and its factor at the end. offset_share: rate of the nodes' offsets by it.
    floor: what is added to each gradient's size before Adam divides by it, in root mean squares of these sizes: where the views say
        nothing, noise is not blown up to full steps.
    silhouette, structure, colour: weights of the losses, each a sum over one view's pixels. robust: difference of cover from which on it
        counts linearly: views of a generator do not agree on their outlines.
    fair: weight of the field's squared curvature, summed over the nodes at the surface. still: of the squared offsets.
    sources, among: views that a view is compared with in a step, drawn from so many nearest ones.
    window: pixels along a side of the windows of local structure.
    """

    rings: int = 2
    hold: int = 5
    rate: float = 0.04
    decay: float = 0.1
    offset_share: float = 0.3
    floor: float = 1.0
    silhouette: float = 4.0
    structure: float = 1.0
    colour: float = 1.0
    robust: float = 0.25
    fair: float = 1.5
    still: float = 0.1
    sources: int = 2
    among: int = 4
    window: int = 7


SETTINGS = Settings()
FINEST = 256  # cubes along the longest side, at most
FARTHEST = 0.25  # cubes: offset of a node along each axis; tetrahedra keep their orientation up to half the shortest edge
SOLID = 0.99  # alpha from which on a pixel shows the subject alone
GRAZING = 0.25  # cosine of the angle to the surface's normal below which a view is not asked for colour
SLACK = 0.015  # unit frame: what lies as much behind what a view shows is hidden from it
FEWEST = 50  # pixels that two views have to share
SMALLEST = 1e-4  # share of the area: smaller pieces are dropped
KEEP1, KEEP2 = 0.9, 0.99  # Adam's
C2 = 0.03**2  # SSIM's constant for pictures in [0, 1]


def refine(
    surface: Mesh,
    splats: Splats | None,
    views: Views,
    p: recipes.RefineSurface,
    faces: int,
    seed: int,
    device: str = "cpu",
    progress: Progress = silent,
    settings: Settings = SETTINGS,
) -> Mesh:
    """The surface (closed, unit frame) as the views' colour and alpha have it, closed, of at most `faces` triangles.

    device: torch's. Held-out views, depth and normals are not looked at, and the splats not needed: they gave `surface`. The given surface
    comes back, decimated, where its silhouettes are nearer to the views' than those of the refined one: parts thinner than the grid may be
    lost. Same seed, same mesh, bit by bit on the CPU. Raises `KilnError("bad-input")` for fewer than two views.
    """
    seen = views.for_fitting
    if len(seen) < 2:
        raise KilnError("bad-input", f"{len(seen)} views are too few to refine a surface.", "Give at least 3 from different sides.")
    torch_threads, kernel_threads = torch.get_num_threads(), numba.get_num_threads()
    try:
        # Short kernels by turns of torch and of numba: each one's idle threads would spin in the other's way
        torch.set_num_threads(1)
        numba.set_num_threads(1)
        return _refined(surface, seen, p, faces, seed, progress, device, settings)
    finally:
        torch.set_num_threads(torch_threads)
        numba.set_num_threads(kernel_threads)


def _refined(
    surface: Mesh, seen: Views, p: recipes.RefineSurface, faces: int, seed: int, progress: Progress, device: str, settings: Settings
) -> Mesh:
    grid, distance = grid_around(surface, _cube(surface, p.grid), settings.rings, _part(progress, 0.0, 0.05))
    field, pictures = _Field(grid, distance, device, settings), _Pictures(seen, device, settings, seed)
    pictures.look(*_tensors(surface, device), _part(progress, 0.05, 0.1))
    before = pictures.mismatch
    reported = time.monotonic()
    for step in range(p.iterations):
        if step % settings.hold == 0:
            field.march()
            if len(field.faces) == 0:  # thinner than the grid all over
                return decimate(surface, faces)
        if step == 0 or time.monotonic() - reported > 0.3:
            reported = time.monotonic()
            progress(0.1 + 0.75 * step / p.iterations, f"step {step} of {p.iterations}")
        values, offsets = field.leaves()
        vertices = field.vertices(values, offsets)
        loss = pictures.loss(vertices, field.faces, vertex_normals(vertices.detach(), field.faces))
        field.step(torch.autograd.grad(loss, [values, offsets]), step / p.iterations)
    field.march()
    progress(0.85, "Removing floaters")
    made = field.mesh()
    if len(made.faces) == 0:
        return decimate(surface, faces)
    made = drop_pieces(made, SMALLEST)
    made = decimate(made, faces, _part(progress, 0.87, 0.95))
    pictures.look(*_tensors(made, device), _part(progress, 0.95, 1.0))
    return made if pictures.mismatch <= before else decimate(surface, faces)


def _part(progress: Progress, start: float, stop: float) -> Progress:
    return lambda done, text="", preview=None: progress(start + (stop - start) * done, text)


def _cube(mesh: Mesh, cells: int) -> float:
    """Side of the grid's cubes by which a ball of the mesh's area is `cells` of them across: thin subjects, which have little surface, get
    finer ones."""
    a, b, c = (mesh.vertices[mesh.faces[:, k]].astype(np.float64) for k in range(3))
    area = float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2)
    return max(float(np.sqrt(area / np.pi)) / cells, float(np.ptp(mesh.vertices, axis=0).max()) / FINEST)


def _tensors(mesh: Mesh, device: str) -> tuple[Float[torch.Tensor, "n 3"], Int[torch.Tensor, "f 3"]]:
    return torch.tensor(mesh.vertices, dtype=torch.float32, device=device), torch.tensor(mesh.faces, device=device).long()


class _Field:
    """Signed distances at the grid's nodes, in cubes, and the nodes' offsets: what is optimised."""

    def __init__(self, grid: Grid, distance: Float[np.ndarray, "n"], device: str, settings: Settings):
        self.grid, self.device, self.settings = grid, device, settings
        self.values = torch.tensor(distance / grid.cube, dtype=torch.float32, device=device)
        self.nodes = torch.tensor(grid.nodes, dtype=torch.float32, device=device)
        self.offsets = torch.zeros_like(self.nodes)
        self.free = torch.tensor(~grid.border, device=device)
        # Mean over the 14 neighbours less the node's own value: 0 of a field that is linear in space, as these lie evenly around it
        count, pairs = len(self.values), torch.tensor(grid.edges.T, device=device)
        pairs = torch.cat([pairs, pairs.flip(0)], 1)
        pairs = pairs[:, self.free[pairs[0]]]
        own = torch.nonzero(self.free).T.expand(2, -1)
        entries = torch.cat([torch.full((pairs.shape[1],), 1 / 14, device=device), -torch.ones(own.shape[1], device=device)])
        places = torch.cat([pairs, own], 1)
        self.bend, self.unbend = (
            torch.sparse_coo_tensor(at, entries, (count, count), check_invariants=False).coalesce() for at in (places, places.flip(0))
        )
        self.first, self.second = (torch.zeros((count, 4), device=device) for _ in range(2))
        self.steps = 0

    def march(self) -> None:
        self.cut = cut(self.grid, (self.values < 0).cpu().numpy(), self.device)
        self.near = torch.zeros(len(self.values), dtype=torch.bool, device=self.device)
        self.near[self.cut.edges.reshape(-1)] = True

    @property
    def faces(self) -> Int[torch.Tensor, "f 3"]:
        return self.cut.faces

    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.values.clone().requires_grad_(), self.offsets.clone().requires_grad_()

    def vertices(self, values: Float[torch.Tensor, "n"], offsets: Float[torch.Tensor, "n 3"]) -> Float[torch.Tensor, "v 3"]:
        return self.cut.vertices(self.nodes + torch.tanh(offsets) * (self.grid.cube * FARTHEST), values)

    def step(self, gradients: tuple[torch.Tensor, ...], done: float) -> None:
        """One step of Adam by the pictures' gradients and those of the field's own terms."""
        s = self.settings
        curved = torch.mv(self.bend, self.values) * self.near
        values = gradients[0] + 2 * s.fair * torch.mv(self.unbend, curved)
        offsets = gradients[1] + 2 * s.still * self.offsets
        gradient = torch.cat([values[:, None], offsets], 1) * self.free[:, None]
        self.steps += 1
        self.first.mul_(KEEP1).add_(gradient, alpha=1 - KEEP1)
        self.second.mul_(KEEP2).addcmul_(gradient, gradient, value=1 - KEEP2)
        size = (self.second / (1 - KEEP2**self.steps)).sqrt()
        floor = torch.stack([part[self.near].square().mean().sqrt() for part in (size[:, :1], size[:, 1:])])[[0, 1, 1, 1]]
        move = s.rate * s.decay**done / (1 - KEEP1**self.steps) * self.first / (size + s.floor * floor + 1e-20)
        self.values = self.values - move[:, 0]
        self.offsets = self.offsets - s.offset_share * move[:, 1:]

    def mesh(self) -> Mesh:
        vertices = self.vertices(self.values, self.offsets)
        return Mesh(vertices.cpu().numpy().astype(np.float32), self.faces.cpu().numpy().astype(np.int32))


class _Pictures:
    """The views, and what the surface looks like from each."""

    def __init__(self, seen: Views, device: str, settings: Settings, seed: int):
        self.settings, self.random, self.left = settings, np.random.default_rng(seed), list[int]()
        self.lenses = [Lens.of(camera, device) for camera in seen.cameras]
        self.images = torch.tensor(seen.on_black(), dtype=torch.float32, device=device)
        self.alpha = torch.tensor(seen.alpha, dtype=torch.float32, device=device)
        mixed = (self.alpha <= SOLID).float()[:, None]
        self.solid = torch.nn.functional.max_pool2d(mixed, 3, 1, 1)[:, 0] == 0  # with all its neighbours
        eyes = np.stack([camera.centre for camera in seen.cameras])
        eyes /= np.linalg.norm(eyes, axis=1, keepdims=True)
        alike = eyes @ eyes.T
        np.fill_diagonal(alike, -np.inf)
        self.nearest = np.argsort(-alike, axis=1, kind="stable")[:, : min(settings.among, len(eyes) - 1)]

    def look(self, vertices: Float[torch.Tensor, "n 3"], faces: Int[torch.Tensor, "f 3"], progress: Progress) -> None:
        """Depth of a surface in all views, and by how many pixels its silhouettes miss theirs."""
        normals, shown = vertex_normals(vertices, faces), []
        for number, lens in enumerate(self.lenses):
            progress(number / len(self.lenses), "Looking at the surface")
            shown.append(see(vertices, faces, normals, lens))
        self.depths = torch.stack([one.depth for one in shown])
        self.mismatch = float(sum((one.cover - alpha).abs().sum() for one, alpha in zip(shown, self.alpha, strict=True)))

    def loss(
        self, vertices: Float[torch.Tensor, "n 3"], faces: Int[torch.Tensor, "f 3"], normals: Float[torch.Tensor, "n 3"]
    ) -> Float[torch.Tensor, ""]:
        """Of one view, every one in its turn."""
        s = self.settings
        if not self.left:
            self.left = self.random.permutation(len(self.lenses)).tolist()
        index = self.left.pop()
        shown = see(vertices, faces, normals, self.lenses[index])
        self.depths[index] = shown.depth
        total = s.silhouette * torch.nn.functional.smooth_l1_loss(shown.cover, self.alpha[index], reduction="sum", beta=s.robust)
        sources = self.random.permutation(self.nearest[index])[: s.sources].tolist()
        for source in sources:
            total = total + self._difference(shown, index, source) / len(sources)
        return total

    def _difference(self, shown: Seen, index: int, source: int) -> Float[torch.Tensor, ""]:
        """Between what a view shows of the surface and what another shows of the same places, over the pixels that both see."""
        s, lens = self.settings, self.lenses[source]
        height, width = self.alpha.shape[1:]
        chosen = (shown.facing > GRAZING) & self.solid[index].reshape(-1)[shown.pixels]
        places, pixels = shown.places[chosen], shown.pixels[chosen]
        screen, depth = lens.project(places)
        with torch.no_grad():
            column, row = (screen - 0.5).round().long().T
            visible = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            at = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            first = self.depths[source].reshape(-1)[at]
            visible &= (first > 0) & (depth < first + SLACK) & self.solid[source].reshape(-1)[at]
            back = torch.nn.functional.normalize(lens.centre - places, dim=1)
            visible &= (back * shown.normals[chosen]).sum(1) > GRAZING
        screen, pixels = screen[visible], pixels[visible]
        if len(pixels) < FEWEST:
            return shown.cover.sum() * 0
        scale = torch.tensor([2 / width, 2 / height], device=screen.device)
        picture = self.images[source].permute(2, 0, 1)[None]
        found = torch.nn.functional.grid_sample(picture, (screen * scale - 1)[None, None], align_corners=False)[0, :, 0]
        row, column = torch.div(pixels, width, rounding_mode="floor"), pixels % width
        top, left = int(row.min()), int(column.min())
        tall, wide = int(row.max()) + 1 - top, int(column.max()) + 1 - left
        place = (row - top) * wide + column - left
        drawn = torch.zeros((3, tall * wide), device=screen.device).index_copy(1, place, found).reshape(3, tall, wide)
        mask = torch.zeros(tall * wide, device=screen.device).index_fill(0, place, 1).reshape(1, tall, wide)
        truth = self.images[index, top : top + tall, left : left + wide].permute(2, 0, 1) * mask
        colour = ((drawn - truth).square() + 1e-4).sqrt()
        return ((s.structure * _structure(drawn, truth, mask, s.window) + s.colour * colour) * mask).mean(0).sum()


def _structure(
    a: Float[torch.Tensor, "c h w"], b: Float[torch.Tensor, "c h w"], mask: Float[torch.Tensor, "1 h w"], window: int
) -> Float[torch.Tensor, "c h w"]:
    """1 less SSIM's terms of contrast and structure (Wang et al. 2004) over the pixels of the mask in square windows."""
    means = torch.nn.functional.avg_pool2d(torch.cat([mask, a, b, a * a + b * b, a * b])[None], window, 1, window // 2)[0]
    mean_a, mean_b, squares, products = (means[1:] / means[:1].clamp_min(1e-6)).reshape(4, len(a), *a.shape[1:])
    return 1 - (2 * (products - mean_a * mean_b) + C2) / (squares - mean_a**2 - mean_b**2 + C2)
