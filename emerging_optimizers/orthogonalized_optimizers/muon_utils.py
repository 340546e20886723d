"""Newton-Schulz and scale factors under the published names."""

from collections.abc import Iterator, Sequence
from itertools import chain, cycle, islice, repeat

import torch
from torch import Tensor

from emerging_optimizers.linalg.coefficients import CoeffIterMode, NSCoeffT, coefficients
from emerging_optimizers.linalg.newton_schulz import newton_schulz as _newton_schulz
from emerging_optimizers.linalg.scaling import MuonScaleT
from emerging_optimizers.linalg.scaling import muon_scale_factor as get_muon_scale_factor

__all__ = [
    "CoeffIterMode",
    "MuonScaleT",
    "NSCoeffT",
    "get_coefficient_iterator",
    "get_muon_scale_factor",
    "newton_schulz",
]


def newton_schulz(
    x: Tensor,
    steps: int,
    coefficient_type: NSCoeffT = "quintic",
    custom_coefficient_sets: Sequence[tuple[float, float, float]] | None = None,
    eps: float = 1e-7,
    transpose: bool | None = None,
) -> Tensor:
    """Orthogonalize one (M, N) matrix or a (B, M, N) stack; see `linalg.newton_schulz` for the equation.

    The products are bfloat16 where the global float32 matmul precision is "medium", as published.

    Raises:
        TypeError: not 2-D or 3-D, or not float32.
        ValueError: unknown coefficients, or a number of steps that they do not allow.

    Example:
        >>> newton_schulz(torch.eye(2), steps=8, coefficient_type="polar_express").round(decimals=2).abs()
        tensor([[1., 0.],
                [0., 1.]])
    """
    if x.ndim not in (2, 3):
        raise TypeError(f"newton_schulz takes (M, N) or (B, M, N); given is {tuple(x.shape)}")
    if x.dtype != torch.float32:
        raise TypeError(f"newton_schulz takes float32; given is {x.dtype}")
    medium = torch.get_float32_matmul_precision() == "medium"
    sets = coefficients(coefficient_type, steps, custom_coefficient_sets)
    stack = x if x.ndim == 3 else x[None]
    out = _newton_schulz(stack, sets, compute_dtype=torch.bfloat16 if medium else None, eps=eps, transpose=transpose)
    return out if x.ndim == 3 else out[0]


def get_coefficient_iterator(
    steps: int, coefficient_sets: Sequence[tuple[float, float, float]], mode: CoeffIterMode = "cycle"
) -> Iterator[tuple[float, float, float]]:
    """`steps` coefficient tuples: the sets again and again, or the last one repeated past the end.

    Raises:
        ValueError: no sets, or an unknown mode.
    """
    if not coefficient_sets:
        raise ValueError("coefficient_sets is empty; give at least one (a, b, c)")
    if mode not in ("cycle", "repeat_last"):
        raise ValueError(f"mode={mode!r} is not one of 'cycle', 'repeat_last'")
    endless = cycle(coefficient_sets) if mode == "cycle" else chain(coefficient_sets, repeat(coefficient_sets[-1]))
    return islice(endless, steps)
