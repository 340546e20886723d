"""The routes of Newton-Schulz and of orthogonal iteration: how many matrices in a call, which steps on the small Gram
matrix, whose symmetric products, whose QR.

What a table does not name takes the plain path. Measured by `make bench` (docs/performance.md) and, for the accuracy,
by tests/linalg/test_kernels.py.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from emerging_optimizers.linalg.kernels.syrk import why_no_syrk

# Bytes of the stack in one call for each thread of a CPU: its Gram matrices then stay in the second-level cache. 200
# matrices of 256 x 256 in bfloat16 take 0.7 of the time of one call for all of them, with 1 MiB 1.06 times as long as
# with 2 MiB; in float32 they take 0.93 of it with 1 MiB. Two threads that share out matrices instead of each product
# take 0.80 of their time on GPT-2, 0.78 on ViT-S.
CPU_CALL_BYTES: dict[torch.dtype, int] = {torch.bfloat16: 2 * 2**20}
CPU_CALL_BYTES_ELSE = 2**20


class GramRoute(NamedTuple):
    """Where steps on the Gram matrix pay, and how many may follow one another there.

    Attributes:
        aspect: from this ratio of the longer to the shorter side on.
        shorter: from this length of the shorter side on.
        first: steps on the first Gram matrix.
        later: steps on each later one.
    """

    aspect: float
    shorter: int
    first: int
    later: int


# Two steps on one Gram matrix square the rounding of the first: in bfloat16 harmless only where three more steps
# follow to contract it (within 1.2 x the error of the plain iteration; two such pairs: up to 15 x). At 4:1 that saves a
# tenth of the products. In float32 every pair and triple is within 4e-6 of the plain iteration; a third is saved.
GRAM: dict[tuple[str, torch.dtype], GramRoute] = {
    ("cpu", torch.bfloat16): GramRoute(aspect=2.5, shorter=512, first=2, later=1),
    ("cpu", torch.float32): GramRoute(aspect=2.5, shorter=64, first=3, later=2),
}


# From which shorter side on the kernel for symmetric products (`syrk`) is taken without being asked for. Nothing has
# been measured: to fill it, `make bench-gpu ARGS="--arm Muon --arm 'Muon, syrk'"` and `python benchmarks/syrk.py` on
# each kind of device. Until then only `use_syrk=True` takes it.
SYRK: dict[tuple[str, torch.dtype], int] = {}


def takes_syrk(x_BMN: Tensor) -> bool:
    """Whether the symmetric products of these matrices, M <= N, go to the kernel by themselves.

    Example:
        >>> takes_syrk(torch.empty(1, 64, 256))
        False
    """
    shorter = SYRK.get((x_BMN.device.type, x_BMN.dtype))
    return shorter is not None and x_BMN.size(-2) >= shorter and why_no_syrk(x_BMN.device, x_BMN.dtype) is None


class BlockRoute(NamedTuple):
    """Where a symmetric product by blocks pays: a quarter of the work is saved by mirroring a quarter of the result.

    Attributes:
        depth: from this length of the rows that are multiplied on; what mirroring costs does not depend on it.
        rows: from this many of them on.
        least: rows of the smallest block.
    """

    depth: int
    rows: int
    least: int


# In float32 products of 512, 768, 768 x 3072 and 1536 take 0.84, 0.86, 0.76 and 0.70 of their time; smaller ones gain
# nothing. In bfloat16 with matrix units a product is as fast as its mirroring: 512 x 4608 takes 0.79, 768 x 3072 0.77,
# 1536 0.85, 4096 0.75 to 0.85; 512 x 2048 and 1024 gain nothing, and 384 x 1152 takes up to 1.4 times as long.
BLOCKS: dict[tuple[str, torch.dtype], BlockRoute] = {
    ("cpu", torch.bfloat16): BlockRoute(depth=1536, rows=512, least=192),
    ("cpu", torch.float32): BlockRoute(depth=384, rows=384, least=192),
}


def least_block(x_BMK: Tensor) -> int | None:
    """Rows of the smallest block of a symmetric product X Y^T; None: the whole of it.

    Example:
        >>> least_block(torch.empty(1, 768, 3072)), least_block(torch.empty(1, 256, 256))
        (192, None)
    """
    route = BLOCKS.get((x_BMK.device.type, x_BMK.dtype))
    if route is None or x_BMK.size(-1) < route.depth or x_BMK.size(-2) < route.rows:
        return None
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x_BMK.requires_grad):
        return None  # the blocks are written in place
    return route.least


def gram_blocks(x_BMN: Tensor, dtype: torch.dtype, steps: int) -> tuple[int, ...]:
    """How the steps, computed in `dtype`, fall on Gram matrices of wide matrices; each on its own: the plain iteration.

    Example:
        >>> gram_blocks(torch.empty(1, 64, 256), torch.float32, steps=5)
        (3, 2)
    """
    route = GRAM.get((x_BMN.device.type, dtype))
    M, N = x_BMN.shape[-2:]
    if route is None or route.shorter > M or route.aspect * M > N:
        return (1,) * steps
    blocks: list[int] = []
    while (left := steps - sum(blocks)) > 0:
        blocks.append(min(left, route.later if blocks else route.first))
    return tuple(blocks)


def calls(x_BMN: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A stack cut into what one call takes when it computes in `dtype`.

    Example:
        >>> parts = calls(torch.empty(5000, 256, 256, dtype=torch.bfloat16), torch.bfloat16)
        >>> len(parts[0]) // torch.get_num_threads()
        16
    """
    if x_BMN.device.type != "cpu" or torch.compiler.is_compiling():
        return (x_BMN,)
    size = x_BMN.size(-2) * x_BMN.size(-1) * dtype.itemsize
    limit = CPU_CALL_BYTES.get(dtype, CPU_CALL_BYTES_ELSE)
    return torch.split(x_BMN, torch.get_num_threads() * max(1, limit // max(1, size)))


OrthonormalizerT = Literal["householder", "cholesky"]
# How orthogonal iteration makes its columns orthonormal, by device; Householder's QR where nothing is said. On a CPU
# `cholesky_qr` takes 2.8 to 4.3 times as long (64 to 1024, one and several). On CUDA devices, where QR is a loop over
# matrices and `cholesky_qr` is mostly products, nothing has been measured: `make bench-gpu ARGS="--arm SOAP --arm
# 'SOAP, Cholesky QR'"`, on workloads of many small matrices and of few large ones.
ORTHONORMALIZERS: dict[str, OrthonormalizerT] = {}


def orthonormalizer(x_BNN: Tensor) -> OrthonormalizerT:
    """The one for these matrices. In a compiled graph Householder's: there the precision of products cannot be raised.

    Example:
        >>> orthonormalizer(torch.empty(1, 64, 64))
        'householder'
    """
    return "householder" if torch.compiler.is_compiling() else ORTHONORMALIZERS.get(x_BNN.device.type, "householder")
