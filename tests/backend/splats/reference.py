"""Splatting as one dense autograd expression: gsplat's plain-torch projection, covariance and spherical harmonics, and every Gaussian
composed over every pixel in depth order."""

import numpy as np
import torch
from gsplat.cuda._torch_impl import _fully_fused_projection, _quat_scale_to_covar_preci, _spherical_harmonics, _world_to_cam

from backend.splats.model import Splats
from backend.views.cameras import Camera


def tensors(splats: Splats) -> list[torch.Tensor]:
    fields = (splats.means, splats.quaternions, splats.log_scales, splats.opacity_logits, splats.sh)
    return [torch.tensor(field, dtype=torch.float64, requires_grad=True) for field in fields]


def composed(parameters: list[torch.Tensor], camera: Camera, features: torch.Tensor | None = None):
    """Feature planes (red, green, blue, depth or the given ones), H x W x F, and alpha, in double precision on black.

    A Gaussian's depth at a pixel is the mean of z given the pixel, for the Gaussian carried to (x, y in pixels, z) by the projection's
    derivative: z + cov(z, xy) cov(xy, xy)^-1 (pixel - centre).
    """
    means, quaternions, log_scales, logits, sh = parameters
    covariance, _ = _quat_scale_to_covar_preci(quaternions, log_scales.exp(), compute_preci=False)
    view = torch.tensor(camera.camera_from_world)[None]
    intrinsics = torch.tensor([[camera.fx, 0, camera.cx], [0, camera.fy, camera.cy], [0, 0, 1.0]], dtype=torch.float64)[None]
    _, centres, depths, conics, _ = _fully_fused_projection(means, covariance, view, intrinsics, camera.width, camera.height, eps2d=0.1)
    slopes = torch.zeros(len(means), 2, dtype=torch.float64)
    if features is None:
        in_camera, turned = _world_to_cam(means, covariance, view)
        slopes = _depth_slopes(in_camera[0], turned[0], camera, conics[0])
        directions = means - torch.tensor(camera.centre)
        degree = round(sh.shape[1] ** 0.5) - 1
        colors = torch.clamp_min(_spherical_harmonics(degree, directions, sh) + 0.5, 0.0)
        features = torch.cat([colors, depths[0][:, None]], 1)
    order = torch.argsort(depths[0].detach())
    order = order[depths[0].detach()[order] > 0.01]
    y, x = torch.meshgrid(torch.arange(camera.height) + 0.5, torch.arange(camera.width) + 0.5, indexing="ij")
    transmittance = torch.ones(camera.height, camera.width, dtype=torch.float64)
    picture = torch.zeros(camera.height, camera.width, features.shape[1], dtype=torch.float64)
    alpha = torch.zeros(camera.height, camera.width, dtype=torch.float64)
    going = torch.ones(camera.height, camera.width, dtype=torch.bool)
    for g in order.tolist():
        dx, dy = x - centres[0, g, 0], y - centres[0, g, 1]
        a, b, c = conics[0, g]
        sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
        opaque = torch.clamp_max(torch.sigmoid(logits[g]) * torch.exp(-sigma), 0.999)
        opaque = torch.where(opaque >= 1 / 255, opaque, 0.0)
        left = transmittance * (1 - opaque)
        going = going & (left > 1e-4)
        weight = torch.where(going, transmittance * opaque, 0.0)
        last = features[g, -1] + slopes[g, 0] * dx + slopes[g, 1] * dy
        picture = picture + weight[..., None] * torch.cat([features[g, :-1].expand(*weight.shape, -1), last[..., None]], -1)
        alpha = alpha + weight
        transmittance = torch.where(going, left, transmittance)
    return picture, alpha


def _depth_slopes(points, covariances, camera, conics):
    """The derivative of a pinhole projection by hand: gsplat's gives the picture's covariance alone."""
    x, y, z = points.T
    slack_x, slack_y = 0.15 * camera.width / camera.fx, 0.15 * camera.height / camera.fy
    x = z * torch.clamp(x / z, -camera.cx / camera.fx - slack_x, (camera.width - camera.cx) / camera.fx + slack_x)
    y = z * torch.clamp(y / z, -camera.cy / camera.fy - slack_y, (camera.height - camera.cy) / camera.fy + slack_y)
    none = torch.zeros_like(z)
    derivative = torch.stack([camera.fx / z, none, -camera.fx * x / z**2, none, camera.fy / z, -camera.fy * y / z**2], -1).reshape(-1, 2, 3)
    mixed = torch.einsum("nij,nj->ni", derivative, covariances[:, :, 2])
    a, b, c = conics.T
    return torch.stack([a * mixed[:, 0] + b * mixed[:, 1], b * mixed[:, 0] + c * mixed[:, 1]], -1)


def cloud(count: int, degree: int, seed: int, size: float = 0.08) -> Splats:
    """Random Gaussians in the unit ball."""
    random = np.random.default_rng(seed)
    return Splats(
        means=random.normal(0, 0.4, (count, 3)).astype(np.float32),
        quaternions=random.normal(0, 1, (count, 4)).astype(np.float32),
        log_scales=(np.log(size) + random.normal(0, 0.6, (count, 3))).astype(np.float32),
        opacity_logits=random.normal(0.5, 1.5, count).astype(np.float32),
        sh=random.normal(0, 0.6, (count, (degree + 1) ** 2, 3)).astype(np.float32),
    )
