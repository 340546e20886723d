"""Scale factors of an orthogonalized update, from the shape of its matrix; and matrices normalized by norms alone."""

import math
from typing import Literal, get_args

from torch import Tensor
from torch.linalg import vector_norm

MuonScaleT = Literal["shape_scaling", "spectral", "unit_rms_norm"]


def muon_scale_factor(size_out: int, size_in: int, mode: MuonScaleT = "spectral") -> float:
    """What an orthogonalized (size_out, size_in) update is multiplied by.

    "spectral": sqrt(max(out, in)), so that the update's RMS is 1 (Liu et al. 2025, Moonlight, arXiv 2502.16982,
    up to its 0.2); "shape_scaling": sqrt(max(1, out / in)) (Jordan et al. 2024, Muon); "unit_rms_norm":
    sqrt(out / in), the RMS-to-RMS operator norm (Pethick et al. 2025, Scion, arXiv 2502.07529).

    Raises:
        ValueError: for another mode.

    Example:
        >>> muon_scale_factor(1024, 256, "shape_scaling")
        2.0
    """
    if mode == "spectral":
        return math.sqrt(max(size_out, size_in))
    if mode == "shape_scaling":
        return math.sqrt(max(1.0, size_out / size_in))
    if mode == "unit_rms_norm":
        return math.sqrt(size_out / size_in)
    raise ValueError(f"scale_mode={mode!r} is not one of {', '.join(get_args(MuonScaleT))}")


def clip_rms(x_BMN: Tensor, limit: float) -> Tensor:
    """Each matrix scaled down to an RMS of at most `limit`; 0: as it is.

    Example:
        >>> import torch
        >>> clip_rms(torch.full((1, 2, 2), 4.0), limit=2.0)
        tensor([[[2., 2.],
                 [2., 2.]]])
    """
    if limit == 0:
        return x_BMN
    rms = x_BMN.square().mean(dim=(-2, -1), keepdim=True).sqrt()
    return x_BMN * (limit / (rms + 1e-7)).clamp_max(1)


def unit_norm(x: Tensor, dim: int | tuple[int, ...], eps: float = 0.0) -> Tensor:
    """x / max(||x||, eps) over `dim`; a zero vector stays zero.

    Example:
        >>> import torch
        >>> unit_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), dim=-1)
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    norm = vector_norm(x, dim=dim, keepdim=True).clamp_min(eps)
    return x / norm.masked_fill(norm == 0, 1)


def with_norm_of(model_BMN: Tensor, x_BMN: Tensor) -> Tensor:
    """Each matrix of x at the Frobenius norm of the model's; a zero matrix stays zero.

    Example:
        >>> import torch
        >>> with_norm_of(torch.tensor([[[6.0, 8.0]]]), torch.tensor([[[0.0, 2.0]]]))
        tensor([[[ 0., 10.]]])
    """
    norm_B11 = vector_norm(x_BMN, dim=(-2, -1), keepdim=True)
    return x_BMN * (vector_norm(model_BMN, dim=(-2, -1), keepdim=True) / norm_B11.masked_fill(norm_B11 == 0, 1))
