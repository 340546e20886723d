"""The retractions of `linalg.stiefel` under their published names: from a point against a momentum, by a step size."""

from torch import Tensor

from emerging_optimizers.linalg.coefficients import NSCoeffT
from emerging_optimizers.linalg.stiefel import RETRACTIONS, RetractionT
from emerging_optimizers.published.muon_utils import newton_schulz

__all__ = ["RetractionT", "cayley_retraction", "newton_schulz_retraction", "polar_retraction", "qr_retraction"]


def qr_retraction(point: Tensor, momentum: Tensor, step_size: float) -> Tensor:
    """Q of the QR decomposition of `point - step_size * momentum`, where R has a positive diagonal.

    Args:
        point: (M, K) or a stack, orthonormal columns.
        momentum: shaped like it.
        step_size: how far.

    Returns:
        A tensor like `point`, orthonormal columns.

    Example:
        >>> import torch
        >>> qr_retraction(torch.eye(2), torch.tensor([[0.0, 0.0], [-0.75, 0.0]]), step_size=1.0)
        tensor([[ 0.8000, -0.6000],
                [ 0.6000,  0.8000]])
    """
    return RETRACTIONS["qr"](point, -step_size * momentum)


def polar_retraction(point: Tensor, momentum: Tensor, step_size: float) -> Tensor:
    """The polar factor of `point - step_size * momentum`, by a singular value decomposition; otherwise as above.

    Example:
        >>> import torch
        >>> polar_retraction(torch.eye(2), torch.tensor([[0.0, 0.75], [-0.75, 0.0]]), step_size=1.0)
        tensor([[ 0.8000, -0.6000],
                [ 0.6000,  0.8000]])
    """
    return RETRACTIONS["polar"](point, -step_size * momentum)


def cayley_retraction(point: Tensor, momentum: Tensor, step_size: float) -> Tensor:
    """Along the curve of the Cayley transform, which solves a system of M equations; otherwise as above.

    Example:
        >>> import torch
        >>> cayley_retraction(torch.eye(2), torch.tensor([[0.0, 0.5], [-0.5, 0.0]]), step_size=1.0)
        tensor([[ 0.6000, -0.8000],
                [ 0.8000,  0.6000]])
    """
    return RETRACTIONS["cayley"](point, -step_size * momentum)


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
        TypeError: another dtype than float32, or another rank.
        ValueError: as in `newton_schulz`.

    Example:
        >>> import torch
        >>> x = newton_schulz_retraction(torch.eye(2), torch.tensor([[0.0, 0.75], [-0.75, 0.0]]), step_size=1.0)
        >>> x.round(decimals=3)
        tensor([[ 0.8000, -0.6000],
                [ 0.6000,  0.8000]])
    """
    return newton_schulz(point - step_size * momentum, steps=num_ns_steps, coefficient_type=coefficient_type)
