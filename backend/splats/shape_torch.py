"""The terms of `shape.py` in torch, over several views at once, for the fit on a GPU. Values are the means over the views of what they are
there; torch finds the gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float

from .raster_cpu import LOG_SCALE, MEAN, NEAR, OPACITY, QUATERNION
from .shape import _INSIDE, ON_SURFACE, ShapeWeights


def in_cameras(means: Float[torch.Tensor, "3 n"], cameras: Float[torch.Tensor, "v 23"]) -> Float[torch.Tensor, "v 3 n"]:
    return cameras[:, :9].reshape(-1, 3, 3) @ means + cameras[:, 9:12, None]


def shape_of(
    parameters: Float[torch.Tensor, "rows n"],
    cameras: Float[torch.Tensor, "v 23"],
    alpha: Float[torch.Tensor, "v h w"],
    depth: Float[torch.Tensor, "v h w"] | None,
    normals: Float[torch.Tensor, "v h w 3"] | None,
    weights: ShapeWeights,
) -> Float[torch.Tensor, ""]:
    """`shape.add_shape`: flatness, hull, and (with `depth` and `normals`, 0 where unknown) the angle to the surface."""
    log_scales = parameters[LOG_SCALE:OPACITY]
    least, thin = log_scales.min(0)
    loss = weights.flat * least.exp().mean()
    with_normals = weights.normal > 0 and depth is not None and normals is not None
    if weights.hull <= 0 and not with_normals:
        return loss
    views, height, width = alpha.shape
    x, y, z = in_cameras(parameters[MEAN:QUATERNION].detach(), cameras).unbind(1)
    ahead = z.clamp_min(float(NEAR))
    u = cameras[:, 12, None] * x / ahead + cameras[:, 14, None]
    v = cameras[:, 13, None] * y / ahead + cameras[:, 15, None]
    inside = (z > float(NEAR)) & (u >= 0) & (v >= 0) & (u < width) & (v < height)
    pixel = torch.where(inside, v.clamp(0, height - 1).long() * width + u.clamp(0, width - 1).long(), 0)
    if weights.hull > 0:
        outside = inside & (alpha.reshape(views, -1).gather(1, pixel) <= _INSIDE)
        loss = loss + weights.hull * (outside * parameters[OPACITY].sigmoid()).mean()
    if with_normals:
        here = depth.reshape(views, -1).gather(1, pixel)
        wanted = normals.reshape(views, -1, 3).gather(1, pixel[..., None].expand(-1, -1, 3))
        counts = inside & (here > 0) & ((here - z).abs() <= ON_SURFACE) & ((wanted * wanted).sum(-1) >= 0.25)
        along = torch.einsum("vni,in->vn", wanted, axes_of(parameters[QUATERNION:LOG_SCALE], thin))
        loss = loss + weights.normal * torch.where(counts, 1 - along * along, 0).mean()
    return loss


def axes_of(quaternions: Float[torch.Tensor, "4 n"], axis: torch.Tensor) -> Float[torch.Tensor, "3 n"]:
    """One column of each rotation matrix."""
    w, x, y, z = quaternions / quaternions.square().sum(0).clamp_min(1e-20).sqrt()
    columns = torch.stack([
        1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y),
        2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x),
        2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y),
    ]).reshape(3, 3, -1)  # fmt: skip
    return columns.gather(0, axis[None, None].expand(1, 3, -1))[0]


@torch.no_grad()
def surface_of_pictures(
    cameras: Float[torch.Tensor, "v 23"], planes: Float[torch.Tensor, "v 5 h w"]
) -> tuple[Float[torch.Tensor, "v h w"], Float[torch.Tensor, "v h w 3"]]:
    """`shape.surface_of_picture` of several views."""
    height, width = planes.shape[2:]
    solid = planes[:, 4] > 0.5
    depth = torch.where(solid, planes[:, 3] / planes[:, 4].clamp_min(1e-6), 0)
    u = torch.arange(width, device=planes.device) + 0.5
    v = torch.arange(height, device=planes.device)[:, None] + 0.5
    fx, fy, cx, cy = (cameras[:, k, None, None] for k in range(12, 16))
    local = torch.stack([(u - cx) / fx * depth, (v - cy) / fy * depth, depth], -1)
    points = local @ cameras[:, :9].reshape(-1, 1, 3, 3)  # turned back; the eye's place does not change differences
    normals = torch.zeros_like(points)
    across, down = points[:, 1:-1, 2:] - points[:, 1:-1, :-2], points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
    normals[:, 1:-1, 1:-1] = torch.nn.functional.normalize(torch.linalg.cross(across, down), dim=-1)
    whole = torch.zeros_like(solid)
    beside = solid[:, 1:-1, 2:] & solid[:, 1:-1, :-2] & solid[:, 2:, 1:-1] & solid[:, :-2, 1:-1]
    whole[:, 1:-1, 1:-1] = beside & solid[:, 1:-1, 1:-1]
    return depth, normals * whole[..., None]


def distortion_of(
    draw: Callable,
    parameters: Float[torch.Tensor, "rows n"],
    cameras: Float[torch.Tensor, "v 23"],
    width: int,
    height: int,
    room=None,
) -> Float[torch.Tensor, ""]:
    """`shape.add_distortion` for a weight of 1: a second picture, of the centres' depths and their squares."""
    distance = cameras[:, 16:19].norm(dim=-1)
    z = in_cameras(parameters[MEAN:QUATERNION], cameras)[:, 2] - distance[:, None]
    none = torch.zeros_like(z)
    planes = draw(parameters, cameras, width, height, None, room, torch.stack([z, z * z, none, none], -1))
    return (planes[:, 4] * planes[:, 1] - planes[:, 0] ** 2).mean()
