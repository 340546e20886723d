"""Newton-Schulz, on one process and on shards, and scale factors under the published names."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain, cycle, islice, repeat
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from emerging_optimizers.distributed.groups import gather, get_pg_rank, get_pg_size
from emerging_optimizers.engine.options import WHOLE
from emerging_optimizers.linalg.coefficients import CoeffIterMode, NSCoeffT, coefficients
from emerging_optimizers.linalg.kernels.syrk import no_syrk
from emerging_optimizers.linalg.newton_schulz import newton_schulz as _newton_schulz
from emerging_optimizers.linalg.newton_schulz import newton_schulz_step as _newton_schulz_step
from emerging_optimizers.linalg.newton_schulz import unit_norm_of_parts
from emerging_optimizers.linalg.precision import fp32_matmul_precision, reduced_dtype
from emerging_optimizers.linalg.scaling import MuonScaleT
from emerging_optimizers.linalg.scaling import muon_scale_factor as get_muon_scale_factor

__all__ = [
    "CoeffIterMode",
    "MuonScaleT",
    "NSCoeffT",
    "batched_newton_schulz_step",
    "batched_newton_schulz_step_tsyrk",
    "distributed_normalize_p2",
    "get_coefficient_iterator",
    "get_muon_scale_factor",
    "newton_schulz",
    "newton_schulz_step",
    "newton_schulz_step_tsyrk",
    "newton_schulz_tp",
]

TPModeT = Literal["duplicated", "distributed"]


def newton_schulz(
    x: Tensor,
    steps: int,
    coefficient_type: NSCoeffT = "quintic",
    custom_coefficient_sets: Sequence[tuple[float, float, float]] | None = None,
    eps: float = 1e-7,
    transpose: bool | None = None,
    tp_group: dist.ProcessGroup | None = None,
    use_syrk: bool = False,
    normalize_in_double: bool = False,
) -> Tensor:
    """Orthogonalize one (M, N) matrix or a (B, M, N) stack; see `linalg.newton_schulz` for the equation.

    Where the global float32 matmul precision is "medium", the products are bfloat16 on a device that multiplies it fast
    and float32 on others (`linalg.precision`; published: bfloat16 everywhere). The processes of `tp_group` on CPUs take
    float32 if one of them does.

    Args:
        x: (M, N) or (B, M, N), float32.
        steps: >= 1.
        coefficient_type: as in `Muon`.
        custom_coefficient_sets: the (a, b, c) for coefficient_type="custom", cycled.
        eps: lower bound of the norm that divides.
        transpose: iterate on the transposed matrices; None: where M > N.
        tp_group: x is one process's part of the columns (with `transpose`: of the rows); sums go over this group.
        use_syrk: symmetric products by a triton kernel that computes half of them, on CUDA devices.
        normalize_in_double: the result does not depend on the scale of x, however small; `eps` is not used.

    Returns:
        The shape of x, float32.

    Raises:
        TypeError: not 2-D or 3-D, or not float32.
        ValueError: unknown coefficients, or a number of steps that they do not allow; `use_syrk` off CUDA devices or
            without triton.

    Example:
        >>> newton_schulz(torch.eye(2), steps=8, coefficient_type="polar_express").round(decimals=2).abs()
        tensor([[1., 0.],
                [0., 1.]])
    """
    if x.ndim not in (2, 3):
        raise TypeError(f"newton_schulz takes (M, N) or (B, M, N); given is {tuple(x.shape)}")
    if x.dtype != torch.float32:
        raise TypeError(f"newton_schulz takes float32; given is {x.dtype}")
    medium, total = torch.get_float32_matmul_precision() == "medium", _total(tp_group)
    dtype = reduced_dtype(x.device) if medium else x.dtype
    if use_syrk and (wrong := no_syrk(x.device, dtype)):
        raise ValueError(f"newton_schulz: {wrong}")
    if total is not None and medium and x.device.type == "cpu":
        # The processes add up Gram matrices in that dtype, and may sit on unlike CPUs.
        dtype = torch.float32 if total(torch.tensor(float(dtype == torch.float32))) else dtype
    with fp32_matmul_precision("medium") if medium else nullcontext():  # "highest" where `reduced_precision` says so
        out = _newton_schulz(
            x if x.ndim == 3 else x[None],
            coefficients(coefficient_type, steps, custom_coefficient_sets),
            compute_dtype=dtype,
            eps=None if normalize_in_double else eps,
            transpose=transpose,
            total=total,
            use_syrk=use_syrk,
        )
    return out if x.ndim == 3 else out[0]


def newton_schulz_tp(
    x: Tensor,
    steps: int,
    coefficient_type: NSCoeffT,
    tp_group: dist.ProcessGroup | None,
    partition_dim: int | None = None,
    tp_mode: TPModeT = "duplicated",
    use_syrk: bool = False,
) -> Tensor:
    """Orthogonalize a matrix, or each of a stack, of which every process holds an equal part of the rows or columns.

    Args:
        x: this process's part, (M / P, N) or (M, N / P), or (B, M / P, N) or (B, M, N / P); float32.
        steps: >= 1.
        coefficient_type: as in `Muon`.
        tp_group: the P processes. None, or a group of one: `newton_schulz`.
        partition_dim: 0, the rows are spread over the processes, or 1, the columns, counted within a matrix: of a
            stack, too. None: x is whole.
        tp_mode: "duplicated": every process gathers the matrix and orthogonalizes all of it, one exchange in all;
            "distributed": every process iterates on its part, an exchange a step of a square matrix as long as the
            side that is not spread, which is wasteful where that is the longer side.
        use_syrk: as in `newton_schulz`.

    Returns:
        This process's part of what is orthogonalized, in the shape of x.

    Raises:
        TypeError: not 2-D or 3-D, or not float32.
        ValueError: another `partition_dim` or `tp_mode`, and as `newton_schulz`.

    Example:
        >>> newton_schulz_tp(torch.eye(2), 8, "polar_express", tp_group=None).round(decimals=2).abs()
        tensor([[1., 0.],
                [0., 1.]])
    """
    if partition_dim not in (None, 0, 1):
        raise ValueError(f"newton_schulz_tp: partition_dim={partition_dim!r} is not allowed; give None, 0 or 1")
    if tp_mode not in get_args(TPModeT):
        raise ValueError(f"newton_schulz_tp: tp_mode={tp_mode!r} is not one of {', '.join(get_args(TPModeT))}")
    size = get_pg_size(tp_group)
    if partition_dim is None or size == 1:
        return newton_schulz(x, steps, coefficient_type, use_syrk=use_syrk)
    if x.ndim not in (2, 3):
        raise TypeError(
            f"newton_schulz_tp takes a part of one matrix, (M, N), or of a stack, (B, M, N); given is {tuple(x.shape)}"
        )
    if tp_mode == "distributed":
        return newton_schulz(
            x, steps, coefficient_type, transpose=partition_dim == 0, tp_group=tp_group, use_syrk=use_syrk
        )
    dim = partition_dim - 2  # of a stack, too
    whole = newton_schulz(gather(x, dim, tp_group), steps, coefficient_type, use_syrk=use_syrk)
    return whole.chunk(size, dim)[get_pg_rank(tp_group)]


def newton_schulz_step(X: Tensor, a: float, b: float, c: float, tp_group: dist.ProcessGroup | None = None) -> Tensor:
    """One step on one matrix: (a I + b A + c A^2) X with A = X X^T.

    Args:
        X: (M, N), or with a group this process's part of the columns.
        a: of X.
        b: of A X.
        c: of A^2 X.
        tp_group: sum A over this group.

    Returns:
        (M, N).

    Example:
        >>> newton_schulz_step(torch.tensor([[0.5]]), 1.5, -0.5, 0.0)
        tensor([[0.6875]])
    """
    return _newton_schulz_step(X[None], a, b, c, _total(tp_group))[0]


def batched_newton_schulz_step(
    X: Tensor, a: float, b: float, c: float, tp_group: dist.ProcessGroup | None = None
) -> Tensor:
    """`newton_schulz_step` on a stack.

    Args:
        X: (B, M, N).
        a: of X.
        b: of A X.
        c: of A^2 X.
        tp_group: sum A over this group.

    Returns:
        (B, M, N).

    Example:
        >>> batched_newton_schulz_step(torch.tensor([[[0.5]]]), 1.5, -0.5, 0.0)
        tensor([[[0.6875]]])
    """
    return _newton_schulz_step(X, a, b, c, _total(tp_group))


def newton_schulz_step_tsyrk(
    X: Tensor, a: float, b: float, c: float, tp_group: dist.ProcessGroup | None = None
) -> Tensor:
    """`newton_schulz_step` with its symmetric products by the triton kernel, in the dtype of X.

    Args:
        X: (M, N), bfloat16, float16 or float32, on a CUDA device; or with a group this process's part of the columns.
        a: of X.
        b: of A X.
        c: of A^2 X.
        tp_group: sum A over this group.

    Returns:
        (M, N).

    Raises:
        ValueError: another dtype, another device, or no triton.
    """
    return batched_newton_schulz_step_tsyrk(X[None], a, b, c, tp_group)[0]


def batched_newton_schulz_step_tsyrk(
    X: Tensor, a: float, b: float, c: float, tp_group: dist.ProcessGroup | None = None
) -> Tensor:
    """`newton_schulz_step_tsyrk` on a stack.

    Args:
        X: (B, M, N), as there.
        a: of X.
        b: of A X.
        c: of A^2 X.
        tp_group: sum A over this group.

    Returns:
        (B, M, N).

    Raises:
        ValueError: another dtype, another device, or no triton.
    """
    return _newton_schulz_step(X, a, b, c, _total(tp_group), use_syrk=True)


def distributed_normalize_p2(
    x: Tensor, eps: float, group: dist.ProcessGroup, normalize_in_double: bool = False
) -> Tensor:
    """A matrix, or each of a stack, of which every process holds a part, divided by its Frobenius norm.

    Args:
        x: this process's part, (M, N) or (B, M, N).
        eps: lower bound of the norm; not used with `normalize_in_double`.
        group: the processes.
        normalize_in_double: for any norm but zero, however small. The squares are summed in float64 in any case.

    Returns:
        The shape of x.
    """
    stack = unit_norm_of_parts(x if x.ndim == 3 else x[None], None if normalize_in_double else eps, _sum_over(group))
    return stack if x.ndim == 3 else stack[0]


def _total(group: dist.ProcessGroup | None) -> Callable[[Tensor], Tensor] | None:
    return None if group is None or get_pg_size(group) == 1 else _sum_over(group)


def _sum_over(group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    def total(x: Tensor) -> Tensor:
        dist.all_reduce(x, group=group)
        return x

    return total


def get_coefficient_iterator(
    steps: int, coefficient_sets: Sequence[tuple[float, float, float]], mode: CoeffIterMode = "cycle"
) -> Iterator[tuple[float, float, float]]:
    """`steps` coefficient tuples: the sets again and again, or the last one repeated past the end.

    Raises:
        ValueError: no sets, an unknown mode, or a negative number of steps.
    """
    if not WHOLE.holds(steps):
        raise ValueError(f"steps={steps!r} is not allowed; give {WHOLE.allowed}")
    if not coefficient_sets:
        raise ValueError("coefficient_sets is empty; give at least one (a, b, c)")
    if mode not in ("cycle", "repeat_last"):
        raise ValueError(f"mode={mode!r} is not one of 'cycle', 'repeat_last'")
    endless = cycle(coefficient_sets) if mode == "cycle" else chain(coefficient_sets, repeat(coefficient_sets[-1]))
    return islice(endless, steps)
