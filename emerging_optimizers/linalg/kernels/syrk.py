"""Symmetric products of a stack, where half of the result need not be computed."""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def syrk(a_BMK: Tensor, c_BMM: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    r"""D = :math:`\alpha A A^\top + \beta C`, of which only the lower triangle's tiles are computed, and mirrored.

    For symmetric A that is :math:`\alpha A^2 + \beta C`: with C = A, the polynomial of Newton-Schulz.

    Args:
        a_BMK: (B, M, K), bfloat16, float16 or float32, with any strides. Sums are float32. Products of float32 are
            TF32 where torch's matmul precision is "high" or "medium".
        c_BMM: (B, M, M), symmetric, in the dtype of A; None: nothing is added. The upper triangle is not read.
        alpha: a number.
        beta: a number.

    Returns:
        (B, M, M), symmetric bit for bit off the diagonal tiles, in the dtype of A; no gradient flows through it.

    Raises:
        ValueError: this device or dtype has no kernel (`why_no_syrk`), or shapes do not fit.
    """
    out: Tensor = _syrk(a_BMK, c_BMM, float(alpha), float(beta))
    return out


def why_no_syrk(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is in the way of `syrk` on a device; None: nothing.

    Example:
        >>> why_no_syrk(torch.device("meta"), torch.float32)
        'the kernel for symmetric products needs a CUDA device, and the tensors are on meta'
    """
    if dtype not in DTYPES:
        return f"the kernel for symmetric products takes bfloat16, float16 and float32, and the products are {dtype}"
    if device.type != "cuda" and not (device.type == "cpu" and interprets()):
        return f"the kernel for symmetric products needs a CUDA device, and the tensors are on {device}"
    if not _has_triton():
        return "the kernel for symmetric products needs triton, which is not installed (pip install triton)"
    return None


def no_syrk(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `use_syrk=True` cannot be met, in a user's words; None: it can."""
    wrong = why_no_syrk(device, dtype)
    return wrong and f"use_syrk=True is not possible: {wrong}. Give use_syrk=False for plain products"


def interprets() -> bool:
    """Whether triton runs its kernels in Python, on the host; for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


# Opaque to torch.compile, which need not follow the checks and the launch, and to fake tensors, which need no kernel.
@torch.library.custom_op("emerging_optimizers::syrk", mutates_args=())
def _syrk(a_BMK: Tensor, c_BMM: Tensor | None, alpha: float, beta: float) -> Tensor:
    wrong = why_no_syrk(a_BMK.device, a_BMK.dtype)
    if wrong is not None:
        raise ValueError(f"syrk: {wrong}; use alpha * A @ A.mT + beta * C")
    M = a_BMK.size(-2)
    if a_BMK.ndim != 3:
        raise ValueError(f"syrk takes a stack (B, M, K); given is {tuple(a_BMK.shape)}")
    if c_BMM is not None and (c_BMM.shape != (a_BMK.size(0), M, M) or c_BMM.dtype != a_BMK.dtype):
        raise ValueError(
            f"syrk: C of shape {tuple(c_BMM.shape)} and {c_BMM.dtype} does not fit A of shape {tuple(a_BMK.shape)} "
            f"and {a_BMK.dtype}; give (B, M, M) in the same dtype"
        )
    from emerging_optimizers.linalg.kernels.syrk_triton import launch

    return launch(a_BMK, c_BMM, alpha, beta, tf32=torch.backends.cuda.matmul.fp32_precision == "tf32")


@_syrk.register_fake
def _(a_BMK: Tensor, c_BMM: Tensor | None, alpha: float, beta: float) -> Tensor:
    return a_BMK.new_empty(a_BMK.size(0), a_BMK.size(1), a_BMK.size(1))
