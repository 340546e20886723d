"""The triton kernel of `syrk`; imported when it is first needed, since most machines have no triton."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emerging_optimizers.linalg.kernels.syrk import interprets

# By dtype, and for float32 by what multiplies it: side of a tile of the result, depth of one load, warps, stages of
# the pipeline. Not measured yet: those that fit into the shared memory of an 80-series card or later and keep its
# tensor cores fed by the usual account. `benchmarks/syrk.py` tries their neighbours.
TILES: dict[str, tuple[int, int, int, int]] = {
    "bf16": (128, 64, 8, 3),
    "tf32": (128, 32, 8, 3),
    "ieee": (64, 16, 4, 2),
}


@triton.jit
def _syrk(
    a,
    c,
    d,
    M,
    alpha,
    beta,
    a_matrix,
    a_row,
    a_column,
    c_matrix,
    c_row,
    c_column,
    K: tl.constexpr,  # a model has few lengths, and the compiler unrolls and drops masks for the one that it knows
    ADDS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDENS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    side = tl.cdiv(M, TILE)
    tiles = side * (side + 1) // 2
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    # The tiles of the lower triangle, row by row: i (i + 1) / 2 come before row i. The root may round either way.
    tile = tl.program_id(0) % tiles
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) / 2.0).to(tl.int32)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    j = tile - i * (i + 1) // 2

    within = tl.arange(0, TILE)
    rows, columns = i * TILE + within, j * TILE + within
    # Places are counted in int64: a stack may have more than 2^31 numbers.
    wide_rows, wide_columns = rows.to(tl.int64), columns.to(tl.int64)
    a += matrix * a_matrix
    sum_TT = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, K, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        inside = depth[None, :] < K
        along = depth.to(tl.int64)[None, :] * a_column
        left_TD = tl.load(a + wide_rows[:, None] * a_row + along, mask=(rows[:, None] < M) & inside, other=0.0)
        right_TD = tl.load(a + wide_columns[:, None] * a_row + along, mask=(columns[:, None] < M) & inside, other=0.0)
        if WIDENS:
            left_TD, right_TD = left_TD.to(tl.float32), right_TD.to(tl.float32)
        sum_TT = tl.dot(left_TD, tl.trans(right_TD), sum_TT, input_precision=PRECISION)
    sum_TT *= alpha

    inside = (rows[:, None] < M) & (columns[None, :] < M)
    if ADDS:
        places = wide_rows[:, None] * c_row + wide_columns[None, :] * c_column
        sum_TT += beta * tl.load(c + matrix * c_matrix + places, mask=inside, other=0.0).to(tl.float32)
    d += matrix * M * M
    out_TT = sum_TT.to(d.dtype.element_ty)
    tl.store(d + wide_rows[:, None] * M + wide_columns[None, :], out_TT, mask=inside)
    if i != j:
        mirrored = (columns[:, None] < M) & (rows[None, :] < M)
        tl.store(d + wide_columns[:, None] * M + wide_rows[None, :], tl.trans(out_TT), mask=mirrored)


def launch(a_BMK: Tensor, c_BMM: Tensor | None, alpha: float, beta: float, *, tf32: bool, tiles: Any = None) -> Tensor:
    """alpha A A^T + beta C, new and contiguous; `tiles` in the place of what `TILES` says."""
    B, M, K = a_BMK.shape
    d_BMM = torch.empty(B, M, M, dtype=a_BMK.dtype, device=a_BMK.device)
    if not d_BMM.numel():
        return d_BMM
    precision = "tf32" if tf32 or a_BMK.dtype != torch.float32 else "ieee"  # of float32; others have one only
    kind = "bf16" if a_BMK.dtype.itemsize == 2 else precision
    tile, depth, warps, stages = tiles or TILES[kind]
    side = triton.cdiv(M, tile)
    c = a_BMK if c_BMM is None else c_BMM
    with torch.cuda.device_of(a_BMK):  # does nothing for the interpreter's
        _syrk[(B * side * (side + 1) // 2,)](
            *(a_BMK, c, d_BMM, M, alpha, beta, *a_BMK.stride(), *c.stride()),
            K=K,
            ADDS=c_BMM is not None,
            PRECISION=precision,
            # triton 3.6's interpreter multiplies the bits of bfloat16 as if they were integers.
            WIDENS=interprets() and a_BMK.dtype == torch.bfloat16,
            TILE=tile,
            DEPTH=depth,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,  # triton 3.9 warns where it is not said, and 3.10 changes the default
        )
    return d_BMM
