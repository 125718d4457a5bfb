"""Muon: momentum whose matrices are brought near to orthogonal ones before they are added (Jordan and others, 2024).

Hidden matrices learn in fewer samples than by Adam, which is what counts where a core sees ten samples a second. Everything that is not
a matrix inside the network (biases, norms, the first and the last layer) stays with AdamW.
"""

from __future__ import annotations

import torch
from jaxtyping import Float

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that drives singular values towards 1 (Jordan's)


def orthogonal(matrix: Float[torch.Tensor, "m n"], steps: int = 5) -> Float[torch.Tensor, "m n"]:
    """U V^T of the matrix's singular value decomposition, roughly: singular values come to lie between 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    x = (matrix.T if matrix.shape[0] > matrix.shape[1] else matrix).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Steps are scaled to the size of AdamW's, so one learning rate serves both. Convolutions are matrices of outputs by everything else;
    of Wan's causal ones only the present's tap is (autoencoder.py)."""

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                target, gradient = parameter, parameter.grad
                if parameter.ndim == 5:
                    target, gradient = parameter[:, :, -1], gradient[:, :, -1]
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(gradient)
                state["momentum"].mul_(group["momentum"]).add_(gradient)
                ahead = gradient + group["momentum"] * state["momentum"]  # Nesterov's
                update = orthogonal(ahead.flatten(1))
                target.mul_(1 - group["lr"] * group["weight_decay"])
                target.add_(update.view_as(target), alpha=-group["lr"] * 0.2 * max(update.shape) ** 0.5)


def split(named, inside) -> tuple[list, list]:
    """Parameters for Muon and for AdamW: matrices whose name `inside` accepts, and the rest."""
    matrices, rest = [], []
    for name, parameter in named:
        if parameter.requires_grad:
            (matrices if parameter.ndim >= 2 and min(parameter.flatten(1).shape) > 1 and inside(name) else rest).append(parameter)
    return matrices, rest
