"""What a camera sees of a triangle mesh, differentiable by its vertices: how much of each pixel the mesh covers, and which place on the
surface the pixel's centre shows. A z-buffer decides what is seen; the gradients are those of the exact integrals, not of a blurred picture.

The area that a silhouette encloses changes by the motion of its edge (the boundary term of Reynolds' transport theorem, as in Li et al.
2018, section 4). Between two neighbouring rays of which one meets the mesh and one does not, the edge moves with the surface that the
meeting ray saw last. Inside, the place that a fixed ray meets moves along the ray, by what the surface moves along its normal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from backend.mesh import raster
from backend.views.cameras import Camera

RAYS = 3  # along a pixel's side; odd, so that one goes through its centre
STEEPEST = 0.15  # least cosine between ray and normal for which a place moves along the ray
SLACK = 1e-7  # of inverse depth, relative: two triangles that share an edge are equally near on it
BATCH = 4_000_000  # pairs of ray and triangle that are looked at together on a GPU


@dataclass(frozen=True)
class Lens:
    """A camera as tensors."""

    camera: Camera
    turn: Float[torch.Tensor, "3 3"]  # world to camera axes
    shift: Float[torch.Tensor, "3"]
    focal: Float[torch.Tensor, "2"]
    middle: Float[torch.Tensor, "2"]
    centre: Float[torch.Tensor, "3"]

    @staticmethod
    def of(camera: Camera, device: str) -> Lens:
        def tensor(values):
            return torch.as_tensor(np.asarray(values, np.float32), device=device)

        pose = camera.camera_from_world
        return Lens(
            camera, tensor(pose[:3, :3]), tensor(pose[:3, 3]), tensor([camera.fx, camera.fy]), tensor([camera.cx, camera.cy]),
            tensor(camera.centre),
        )  # fmt: skip

    def project(self, points: Float[torch.Tensor, "n 3"]) -> tuple[Float[torch.Tensor, "n 2"], Float[torch.Tensor, "n"]]:
        """Pixel coordinates and depth along the axis; depth is at least NEAREST."""
        local = points @ self.turn.T + self.shift
        depth = local[:, 2].clamp_min(raster.NEAREST)
        return local[:, :2] / depth[:, None] * self.focal + self.middle, depth


@dataclass(frozen=True)
class Seen:
    """cover: share of each pixel that the mesh fills, from RAYS x RAYS rays, with gradients. depth: along the axis at pixels' centres, 0
    where nothing is. Of the pixels whose centre meets the mesh: pixels, their number (row * width + column); places, where, with
    gradients; normals, there; facing, the cosine between the normal and the direction to the eye."""

    cover: Float[torch.Tensor, "h w"]
    depth: Float[torch.Tensor, "h w"]
    pixels: Int[torch.Tensor, "p"]
    places: Float[torch.Tensor, "p 3"]
    normals: Float[torch.Tensor, "p 3"]
    facing: Float[torch.Tensor, "p"]


def see(vertices: Float[torch.Tensor, "n 3"], faces: Int[torch.Tensor, "f 3"], normals: Float[torch.Tensor, "n 3"], lens: Lens) -> Seen:
    """normals: of the vertices, unit length; no gradients go to them."""
    height, width = lens.camera.height, lens.camera.width
    screen, depth = lens.project(vertices)
    rays = _first_hits(screen.detach(), depth.detach(), faces, width, height)
    cover = _cover(vertices, screen.detach(), depth.detach(), faces, rays, lens)
    centre = rays[RAYS // 2 :: RAYS, RAYS // 2 :: RAYS].reshape(-1)
    pixels = torch.nonzero(centre >= 0)[:, 0]
    hit = faces[centre[pixels]]
    shares = _shares(screen.detach(), depth.detach(), hit, torch.stack([pixels % width, pixels // width], 1) + 0.5)
    places = (vertices[hit] * shares[..., None]).sum(1)
    facing_normals = torch.nn.functional.normalize((normals[hit] * shares[..., None]).sum(1), dim=1)
    still = places.detach()
    ray = torch.nn.functional.normalize(still - lens.centre, dim=1)
    facing = -(facing_normals * ray).sum(1)
    along = ((places - still) * facing_normals).sum(1) / facing.clamp_min(STEEPEST)
    z = torch.zeros(height * width, dtype=depth.dtype, device=depth.device)
    z[pixels] = (still @ lens.turn.T + lens.shift)[:, 2]
    return Seen(cover, z.reshape(height, width), pixels, still - along[:, None] * ray, facing_normals, facing)


def vertex_normals(vertices: Float[torch.Tensor, "n 3"], faces: Int[torch.Tensor, "f 3"]) -> Float[torch.Tensor, "n 3"]:
    """Unit normals, of the faces around each vertex by their areas."""
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    areas = torch.linalg.cross(b - a, c - a)
    sums = torch.zeros_like(vertices)
    for k in range(3):
        sums = sums.index_add(0, faces[:, k], areas)
    return torch.nn.functional.normalize(sums, dim=1, eps=1e-20)


def _cover(vertices, screen, depth, faces, rays, lens):
    height, width = lens.camera.height, lens.camera.width
    solid = rays >= 0
    cover = solid.reshape(height, RAYS, width, RAYS).to(vertices.dtype).mean((1, 3)).reshape(-1)
    for axis in range(2):  # across columns, then rows: what lies between two rays of different kind
        one, two = (solid[:, :-1], solid[:, 1:]) if axis == 0 else (solid[:-1], solid[1:])
        row, column = torch.nonzero(one != two, as_tuple=True)
        if len(row) == 0:
            continue
        step = (1, 0) if axis == 0 else (0, 1)
        first = solid[row, column]  # the mesh is on the near side and grows towards larger coordinates
        inner_row, inner_column = torch.where(first, row, row + step[1]), torch.where(first, column, column + step[0])
        hit = faces[rays[inner_row, inner_column].long()]
        at = torch.stack([(inner_column + 0.5) / RAYS, (inner_row + 0.5) / RAYS], 1)
        shares = _shares(screen, depth, hit, at)
        place = lens.project((vertices[hit] * shares[..., None]).sum(1))[0][:, axis]
        grown = (place - place.detach()) * torch.where(first, 1.0, -1.0) / RAYS  # pixels' areas
        near = torch.div(row, RAYS, rounding_mode="floor") * width + torch.div(column, RAYS, rounding_mode="floor")
        far = torch.div(row + step[1], RAYS, rounding_mode="floor") * width + torch.div(column + step[0], RAYS, rounding_mode="floor")
        cover = cover.index_add(0, near, grown / 2).index_add(0, far, grown / 2)
    return cover.reshape(height, width)


def _shares(screen, depth, corners, at):
    """Perspective-correct weights of triangles' corners at places on the screen, inside them or on their edges."""
    a, b, c = (screen[corners[:, k]].double() - at for k in range(3))

    def cross(p, q):
        return p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0]

    shares = torch.stack([cross(b, c), cross(c, a), cross(a, b)], 1) / depth[corners].double()
    total = shares.sum(1, keepdim=True)
    shares = shares / torch.where(total == 0, torch.ones_like(total), total)
    shares = torch.where(total == 0, torch.full_like(shares, 1 / 3), shares).clamp(0, 1)
    return (shares / shares.sum(1, keepdim=True)).to(screen.dtype)


def _first_hits(screen, depth, faces, width, height):
    """The face that each of RAYS x RAYS rays a pixel meets first, -1 for none."""
    fine = screen.double() * RAYS
    inverse = torch.where(depth > raster.NEAREST, 1 / depth.double(), 0.0)
    if screen.is_cuda:
        return first_hits_in_torch(fine, inverse, faces, width * RAYS, height * RAYS)
    found = raster.z_buffer(fine.numpy(), inverse.numpy(), faces.numpy(), width * RAYS, height * RAYS)[1]
    return torch.from_numpy(found).long()


def first_hits_in_torch(screen, inverse, faces, width, height):
    """`raster.z_buffer`'s faces, on any device: every triangle is tried at all rays in the rectangle around it."""
    corners, q = screen[faces], inverse[faces]
    low = (corners.amin(1) - 0.5).ceil().clamp_min(0)
    high = torch.minimum((corners.amax(1) - 0.5).floor(), torch.tensor([width - 1, height - 1], device=screen.device, dtype=screen.dtype))
    sizes = (high - low + 1).clamp_min(0).long()
    counts = sizes[:, 0] * sizes[:, 1] * (q > 0).all(1)
    nearest = torch.zeros(width * height, dtype=screen.dtype, device=screen.device)
    found = torch.full((width * height,), len(faces), dtype=torch.long, device=screen.device)
    ends = torch.cumsum(counts, 0)
    parts = torch.div(ends - 1, BATCH, rounding_mode="floor") if len(faces) else ends
    pieces = []
    for part in torch.unique(parts).tolist():
        chosen = torch.nonzero((parts == part) & (counts > 0))[:, 0]
        if len(chosen) == 0:
            continue
        face = torch.repeat_interleave(chosen, counts[chosen])
        starts = torch.cumsum(counts[chosen], 0) - counts[chosen]
        number = torch.arange(len(face), device=face.device) - torch.repeat_interleave(starts, counts[chosen])
        wide = sizes[face, 0]
        x, y = low[face, 0] + number % wide, low[face, 1] + torch.div(number, wide, rounding_mode="floor")
        at = torch.stack([x, y], 1) + 0.5
        a, b, c = (corners[face, k] - at for k in range(3))
        wa, wb, wc = (p[:, 0] * r[:, 1] - p[:, 1] * r[:, 0] for p, r in ((b, c), (c, a), (a, b)))
        inside = ((wa >= 0) & (wb >= 0) & (wc >= 0)) | ((wa <= 0) & (wb <= 0) & (wc <= 0))
        total = wa + wb + wc
        inside &= total != 0
        value = ((wa * q[face, 0] + wb * q[face, 1] + wc * q[face, 2]) / total)[inside]
        ray = (y * width + x).long()[inside]
        nearest = nearest.scatter_reduce(0, ray, value, "amax")
        pieces.append((ray, value, face[inside]))
    for ray, value, face in pieces:  # of equals, the first
        first = value >= nearest[ray] * (1 - SLACK)
        found = found.scatter_reduce(0, ray[first], face[first], "amin")
    return torch.where(found == len(faces), -1, found).reshape(height, width)
