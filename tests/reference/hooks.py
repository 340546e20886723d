"""Laws by which a weight moves, from the docstrings of the library's hooks; singular values by SVD."""

from typing import Any

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    """x / ||x||_F, or zero."""
    return x / x.norm() if x.norm() > 0 else x


def capped(matrix: Tensor, beta: float) -> Tensor:
    """Every singular value at most beta."""
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U @ torch.diag(sigma.clamp(max=beta)) @ Vh


def move(W: Tensor, decayed: Tensor, U: Tensor, lr: float, hook: Any) -> Tensor:
    """The new weight, from the old one, the decayed one and the update; `hook` is (name, *arguments) or None."""
    name, *a = (hook,) if isinstance(hook, str) or hook is None else hook
    Y = decayed - lr * U
    if name is None:
        return Y
    if name == "hyperball":
        radius = a[0] if a and a[0] else W.norm()
        return radius * unit(decayed - lr * radius * unit(U))
    if name == "relative_update":
        return decayed - lr * decayed.norm() * unit(U)
    if name == "radial_brake":
        outward, inward = a[:2] if a else (0.5, 1.0)
        change = Y.norm() - decayed.norm()
        return (decayed.norm() + (outward if change > 0 else inward) * change) * unit(Y)
    if name == "update_floor":
        least = a[0] * W.norm()
        return decayed - lr * (least * unit(U) if U.norm() < least else U)
    if name == "row_update_floor":
        new = [move(w, k, u, lr, ("update_floor", a[0])) for w, k, u in zip(W, decayed, U, strict=True)]
        return torch.stack(new)
    if name == "spectral_clip":
        return decayed - lr * capped(U, a[0])
    if name == "spectral_weight_decay":
        return (1 - a[1]) * Y + a[1] * capped(Y, a[0])
    raise ValueError(f"unknown hook {hook!r}")
