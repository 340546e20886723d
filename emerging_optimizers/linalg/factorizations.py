"""Factorizations of a stack, where a matrix that fails stays alone with it.

LAPACK and cuSOLVER raise for a whole stack where one matrix of it does not converge, or leave NaN in that matrix's
factors without a word. Every factorization that a rule takes goes through `factorized`, which tries such a matrix again
in float64, gives it stand-ins where that fails too, and notes it for whoever listens (`noting`): the engine, which lets
that matrix sit the step out.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple

import torch
from torch import Tensor

KindT = Literal["eigh", "svd", "qr", "cholesky"]


class Failures:
    """Which matrices of a stack could not be factorized.

    Attributes:
        looks: whether the host may look at a value on a CPU.
        rows: those of which the host knows.
        flags: (B,) on the device, of factorizations for which nobody waits.
    """

    def __init__(self, looks: bool) -> None:
        self.looks = looks
        self.rows: set[int] = set()
        self.flags: Tensor | None = None

    def note(self, flags: Tensor) -> None:
        """Add some flags that the host has not read."""
        self.flags = flags if self.flags is None else self.flags | flags

    def mask(self, count: int, device: torch.device) -> Tensor | None:
        """Where there are failures among `count` matrices, (B,); None: nowhere."""
        if not self.rows:
            return self.flags
        failed = torch.zeros(count, dtype=torch.bool, device=device)
        failed[sorted(self.rows)] = True
        return failed if self.flags is None else failed | self.flags


_LISTENER: ContextVar[Failures | None] = ContextVar("failures", default=None)


@contextmanager
def noting(looks: bool = True) -> Iterator[Failures]:
    """Collect what fails inside.

    Example:
        >>> with noting() as failures:
        ...     _ = factorized("svd", torch.tensor([[[1.0]], [[torch.nan]]]))
        >>> failures.rows
        {1}
    """
    failures = Failures(looks)
    token = _LISTENER.set(failures)
    try:
        yield failures
    finally:
        _LISTENER.reset(token)


def note(rows: Iterable[int]) -> None:
    """Tell whoever collects failures of matrices that were worked on elsewhere."""
    if (listener := _LISTENER.get()) is not None:
        listener.rows.update(rows)


def factorized(kind: KindT, x_BMN: Tensor) -> Sequence[Tensor]:
    """The factors of a stack.

    If the stack's one call raises, each matrix is tried alone, and the stack again without those that fail: what the
    others get is bit for bit what they would have got. A matrix that fails is taken in float64. If that fails too, its
    factors are stand-ins, and it is noted. Memory that runs out is no failure of a matrix, and is raised.

    Args:
        kind: "eigh": eigenvalues (B, N) in descending order and eigenvectors (B, N, N) as columns; the stand-ins are
            the diagonal and the identity. "svd": U (B, M, K), S (B, K) and V^T (B, K, N). "qr": Q (B, M, K), and R
            (B, M, N) over the reflectors below its diagonal. "cholesky": L (B, N, N). Of these three the stand-ins are
            NaN.
        x_BMN: (B, M, N), float32 or float64.

    On an accelerator "eigh" and "svd" wait for the device anyway, as they do in torch. "qr" and "cholesky" do not:
    there nothing is tried again, and a matrix that fails is flagged on the device.

    Example:
        >>> values, vectors = factorized("eigh", torch.diag(torch.tensor([1.0, 3.0, 2.0]))[None])
        >>> values
        tensor([[3., 2., 1.]])
    """
    if torch.compiler.is_compiling():
        found: list[Tensor] = _opaque(x_BMN, kind)
        return found
    function = _KINDS[kind].function
    if x_BMN.is_meta:  # shapes alone; torch's geqrf does not take them, but where operations are counted
        try:
            return function(x_BMN)
        except NotImplementedError:  # torch has no shapes of it
            return _KINDS[kind].stand_ins(x_BMN)
    if x_BMN.untyped_storage().device.type == "meta":  # without data, and counted (`estimate`)
        return function(x_BMN)
    listener = _LISTENER.get()
    if not _KINDS[kind].waits and (x_BMN.device.type != "cpu" or not (listener is None or listener.looks)):
        parts = function(x_BMN)
        if listener is not None:
            listener.note(~_are_finite(parts))
        return parts
    try:
        parts = function(x_BMN)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return _mended(kind, x_BMN, None)
    # One sum is cheaper than a look at each number; it overflows, if it does, into a closer look.
    return parts if all(math.isfinite(part.sum().item()) for part in parts) else _mended(kind, x_BMN, parts)


# Opaque to torch.compile, which could look at no value and catch no error in a graph, and would call the same routines.
@torch.library.custom_op("emerging_optimizers::factorized", mutates_args=())
def _opaque(x_BMN: Tensor, kind: str) -> list[Tensor]:
    return [part.contiguous() for part in factorized(kind, x_BMN)]  # type: ignore[arg-type]  # a schema has no Literal


@_opaque.register_fake
def _(x_BMN: Tensor, kind: str) -> list[Tensor]:
    return [part.contiguous() for part in _KINDS[kind].stand_ins(x_BMN)]  # type: ignore[index]  # as above


def _mended(kind: KindT, x_BMN: Tensor, parts: Sequence[Tensor] | None) -> Sequence[Tensor]:
    """The factors where some matrices have failed: not finite in `parts`, or None where the call has raised."""
    if parts is None:
        bad = [i for i in range(len(x_BMN)) if _of_one(kind, x_BMN[i : i + 1]) is None]
    else:
        bad = (~_are_finite(parts)).nonzero().flatten().tolist()
    if not bad:
        return _KINDS[kind].function(x_BMN) if parts is None else parts
    stand_ins = _KINDS[kind].stand_ins(x_BMN)
    if len(bad) == len(x_BMN):
        parts = stand_ins
    elif parts is None:
        parts = _KINDS[kind].function(x_BMN.index_fill(0, torch.tensor(bad, device=x_BMN.device), 0))
    listener = _LISTENER.get()
    for i in bad:
        again = _of_one(kind, x_BMN[i : i + 1].double())
        for part, value in zip(parts, stand_ins if again is None else again, strict=True):
            part[i] = value[i if again is None else 0]
        if again is None and listener is not None:
            listener.rows.add(i)
    return parts


def _of_one(kind: KindT, x_1MN: Tensor) -> Sequence[Tensor] | None:
    """The factors of one matrix; None: it fails."""
    try:
        parts = _KINDS[kind].function(x_1MN)
    except RuntimeError as error:  # torch.linalg.LinAlgError is one, and so is what some builds of LAPACK raise for NaN
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return None
    return parts if bool(_are_finite(parts)) else None


def _are_finite(parts: Sequence[Tensor]) -> Tensor:
    """Which matrices have finite factors, (B,)."""
    finite = parts[0].flatten(1).isfinite().all(dim=1)
    for part in parts[1:]:
        finite = finite & part.flatten(1).isfinite().all(dim=1)
    return finite


class _Kind(NamedTuple):
    function: Callable[[Tensor], Sequence[Tensor]]
    stand_ins: Callable[[Tensor], Sequence[Tensor]]
    waits: bool  # for the device, in torch


def _eigh(k_BNN: Tensor) -> Sequence[Tensor]:
    values, vectors = torch.linalg.eigh(k_BNN)
    return values.flip(-1), vectors.flip(-1)


def diagonal_and_identity(k_BNN: Tensor) -> Sequence[Tensor]:
    """What stands in for eigenvalues and eigenvectors."""
    N = k_BNN.size(-1)
    identity = torch.eye(N, dtype=k_BNN.dtype, device=k_BNN.device)
    # diagonal() warns when torch 2.13 compiles it
    return k_BNN.flatten(-2)[..., :: N + 1].clone(), identity.repeat(len(k_BNN), 1, 1)


def _svd(x_BMN: Tensor) -> Sequence[Tensor]:
    return torch.linalg.svd(x_BMN, full_matrices=False)


def _no_svd(x_BMN: Tensor) -> Sequence[Tensor]:
    B, M, N = x_BMN.shape
    K = min(M, N)
    return tuple(x_BMN.new_full(shape, torch.nan) for shape in ((B, M, K), (B, K), (B, K, N)))


def _qr(x_BMN: Tensor) -> Sequence[Tensor]:
    # R over the reflectors. linalg.qr always copies R out of them, which takes an eighth of its time.
    packed, scales = torch.geqrf(x_BMN)
    K = min(x_BMN.shape[-2:])
    return torch.linalg.householder_product(packed[..., :K], scales), packed


def _no_qr(x_BMN: Tensor) -> Sequence[Tensor]:
    K = min(x_BMN.shape[-2:])
    return x_BMN.new_full((*x_BMN.shape[:-1], K), torch.nan), torch.full_like(x_BMN, torch.nan)


def _cholesky(k_BNN: Tensor) -> Sequence[Tensor]:
    L, info = torch.linalg.cholesky_ex(k_BNN)
    return (L / (info == 0).view(-1, 1, 1),)  # what fails is not finite, without a number from the host


def _no_cholesky(k_BNN: Tensor) -> Sequence[Tensor]:
    return (torch.full_like(k_BNN, torch.nan),)


_KINDS: dict[KindT, _Kind] = {
    "eigh": _Kind(_eigh, diagonal_and_identity, waits=True),
    "svd": _Kind(_svd, _no_svd, waits=True),
    "qr": _Kind(_qr, _no_qr, waits=False),
    "cholesky": _Kind(_cholesky, _no_cholesky, waits=False),
}
