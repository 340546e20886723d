"""The float32 matmul precision as a context."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

FP32MatmulPrecT = Literal["highest", "high", "medium"]


@contextmanager
def fp32_matmul_precision(precision: FP32MatmulPrecT = "highest") -> Iterator[None]:
    """Run a block at a float32 matmul precision and put the caller's precision back after it.

    Inside a compiled graph this does nothing: the precision in force when the graph was entered holds.

    Args:
        precision: "highest" (float32), "high" (TF32 where the device has it) or "medium" (bfloat16 where the
            backend has it).

    Raises:
        ValueError: for any other name; nothing has been changed.

    Example:
        >>> with fp32_matmul_precision("high"):
        ...     torch.get_float32_matmul_precision()
        'high'
    """
    if precision not in get_args(FP32MatmulPrecT):
        raise ValueError(f"precision={precision!r} is not one of {', '.join(get_args(FP32MatmulPrecT))}")
    if torch.compiler.is_compiling():
        yield
        return
    cuda, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # untyped in torch
    saved = (cuda.fp32_precision, mkldnn.fp32_precision)
    try:
        previous = torch.get_float32_matmul_precision()
    except RuntimeError:  # a backend was set by itself: torch names the global precision once they agree with it
        cuda.fp32_precision = mkldnn.fp32_precision = "ieee"
        previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)
        cuda.fp32_precision, mkldnn.fp32_precision = saved
