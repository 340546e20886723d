"""The retractions of `linalg.stiefel` under their published names: from a point against a momentum, by a step size."""

from math import prod

import torch
from torch import Tensor

from emerging_optimizers.linalg.coefficients import NSCoeffT
from emerging_optimizers.linalg.stiefel import RETRACTIONS, RetractionT
from emerging_optimizers.published.muon_utils import newton_schulz

__all__ = ["RetractionT", "cayley_retraction", "newton_schulz_retraction", "polar_retraction", "qr_retraction"]


def qr_retraction(point: Tensor, momentum: Tensor, step_size: float) -> Tensor:
    """Q of the QR decomposition of `point - step_size * momentum`, where R has a positive diagonal.

    Args:
        point: (M, K) or a stack, orthonormal columns, float32 or float64.
        momentum: shaped like it.
        step_size: how far.

    Returns:
        A tensor like `point`, orthonormal columns.

    Raises:
        TypeError: other dtypes, or two.
        ValueError: shapes that differ, or that are not those of matrices; here also more columns than rows.

    Example:
        >>> import torch
        >>> qr_retraction(torch.eye(2), torch.tensor([[0.0, 0.0], [-0.75, 0.0]]), step_size=1.0)
        tensor([[ 0.8000, -0.6000],
                [ 0.6000,  0.8000]])
    """
    return _retract("qr", point, momentum, step_size)


def polar_retraction(point: Tensor, momentum: Tensor, step_size: float) -> Tensor:
    """The polar factor of `point - step_size * momentum`, by a singular value decomposition; otherwise as above.

    Example:
        >>> import torch
        >>> polar_retraction(torch.eye(2), torch.tensor([[0.0, 0.75], [-0.75, 0.0]]), step_size=1.0)
        tensor([[ 0.8000, -0.6000],
                [ 0.6000,  0.8000]])
    """
    return _retract("polar", point, momentum, step_size)


def cayley_retraction(point: Tensor, momentum: Tensor, step_size: float) -> Tensor:
    """Along the curve of the Cayley transform, which solves a system of M equations; otherwise as above.

    Example:
        >>> import torch
        >>> cayley_retraction(torch.eye(2), torch.tensor([[0.0, 0.5], [-0.5, 0.0]]), step_size=1.0)
        tensor([[ 0.6000, -0.8000],
                [ 0.8000,  0.6000]])
    """
    return _retract("cayley", point, momentum, step_size)


def newton_schulz_retraction(
    point: Tensor,
    momentum: Tensor,
    step_size: float,
    coefficient_type: NSCoeffT = "polar_express",
    num_ns_steps: int = 8,
) -> Tensor:
    """The polar factor of `point - step_size * momentum` by the published `newton_schulz`, float32; otherwise as above.

    Args:
        point: (M, K) or a stack, orthonormal columns.
        momentum: shaped like it.
        step_size: how far.
        coefficient_type: as in `newton_schulz`.
        num_ns_steps: as `steps` there.

    Raises:
        TypeError: another dtype than float32.
        ValueError: shapes as above; otherwise as in `newton_schulz`.

    Example:
        >>> import torch
        >>> x = newton_schulz_retraction(torch.eye(2), torch.tensor([[0.0, 0.75], [-0.75, 0.0]]), step_size=1.0)
        >>> x.round(decimals=3)
        tensor([[ 0.8000, -0.6000],
                [ 0.6000,  0.8000]])
    """
    stack, direction = _stack("newton_schulz", point, momentum, step_size)
    return newton_schulz(stack + direction, steps=num_ns_steps, coefficient_type=coefficient_type).view(point.shape)


def _retract(how: RetractionT, point: Tensor, momentum: Tensor, step_size: float) -> Tensor:
    return RETRACTIONS[how](*_stack(how, point, momentum, step_size)).view(point.shape)


def _stack(how: RetractionT, point: Tensor, momentum: Tensor, step_size: float) -> tuple[Tensor, Tensor]:
    """Point and direction as stacks (B, M, K), once they have been looked at."""
    given = f"{how}_retraction: point is {point.dtype} of shape {tuple(point.shape)}"
    if point.ndim < 2 or momentum.shape != point.shape:
        raise ValueError(
            f"{given} and momentum has shape {tuple(momentum.shape)}; give two matrices (M, K) of one shape, or two "
            "stacks of them"
        )
    if point.dtype not in (torch.float32, torch.float64) or momentum.dtype != point.dtype:
        raise TypeError(f"{given} and momentum is {momentum.dtype}; give both in float32, or both in float64")
    if how == "qr" and point.size(-1) > point.size(-2):
        raise ValueError(f"{given}, which has more columns than rows; give the transposes of both")
    shape = (prod(point.shape[:-2]), *point.shape[-2:])
    return point.reshape(shape), (-step_size * momentum).reshape(shape)
