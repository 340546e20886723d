"""What a step computes and touches, counted on fake tensors."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emerging_optimizers.linalg.flops import call_without_data, flops_of

WARM_STEPS = 3  # state, the first basis, the first of the later ones
ALIGNED = 64


@dataclass
class Counts:
    """Calls and their operations of arithmetic."""

    operations: Counter["Operation"] = field(default_factory=Counter)
    flops: float = 0.0

    def add(self, other: "Counts", times: int = 1) -> None:
        """What another has, so often."""
        self.flops += times * other.flops
        for operation, count in other.operations.items():
            self.operations[operation] += times * count


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Counts operations, and the bytes of what was not there before while it is alive."""

    def __init__(self, there: Iterable[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.counts = Counts()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._there = {x.untyped_storage()._cdata for x in there if isinstance(x, Tensor)}
        self.touched: dict[int, set[tuple[int, int]]] = {}  # extents, by storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = call_without_data(func, args, kwargs)
        if func.namespace in ("prim", "profiler"):  # looks at attributes, and marks: outside of a mode no calls
            return out
        self.counts.operations[Operation.of(func, args, kwargs, self._is_cold)] += 1
        for x in () if func.is_view else tree_leaves([args, kwargs]):
            if isinstance(x, Tensor):
                self.touched.setdefault(x.untyped_storage()._cdata, set()).add(_extent(x))
        self.counts.flops += flops_of(func, args, kwargs, out)
        self._alive = {k: held for k, held in self._alive.items() if not held[0].expired()}  # type: ignore[no-untyped-call]  # as above
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (key := (storage := x.untyped_storage())._cdata) not in self._there:
                held = (StorageWeakRef(storage), storage.nbytes())  # type: ignore[no-untyped-call]  # as above
                self._alive.setdefault(key, held)
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out

    @contextmanager
    def apart(self) -> Iterator[Counts]:
        """Count what runs inside by itself, and not here."""
        here, self.counts = self.counts, Counts()
        try:
            yield self.counts
        finally:
            self.counts = here

    def _is_cold(self, x: Tensor) -> bool:
        """Whether it was there before the step, which has not touched it yet."""
        begin, end = _extent(x)
        key = x.untyped_storage()._cdata
        return key in self._there and not any(a <= begin and end <= b for a, b in self.touched.get(key, ()))


def _extent(x: Tensor) -> tuple[int, int]:
    """From where to where a tensor lies in its storage."""
    begin = int(x.storage_offset())
    return begin, begin + _span(x.shape, x.stride())


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements of memory from the first of a tensor to behind its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if 0 not in shape else 0


@dataclass(frozen=True)
class Like:
    """A tensor without its data."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    cold: bool

    @property
    def nbytes(self) -> int:
        """Of the memory over which it lies."""
        return _span(self.shape, self.stride) * self.dtype.itemsize

    def capped(self, side: int) -> "Like":
        """One without a longer side, whose axes lie in memory in the same order."""
        shape = tuple(min(size, side) for size in self.shape)
        stride, inner = list(self.stride), 1
        for axis in sorted(range(len(shape)), key=lambda i: (self.stride[i], -i)):
            if stride[axis]:
                stride[axis], inner = inner, inner * shape[axis]
        return replace(self, shape=shape, stride=tuple(stride))

    def empty(self, device: torch.device | None = None) -> Tensor:
        """One whose data says nothing."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device or self.device)

    def make(self) -> Tensor:
        """One with data: positive, so that a root of it is finite; a square one also has a Cholesky factor.

        Whole numbers are zero, which is a place in anything; what is true selects everything.
        """
        x = self.empty()
        if not x.is_floating_point():
            return x.fill_(x.dtype == torch.bool)
        x.uniform_(0.5, 1)
        if x.ndim > 1 and x.size(-1) == x.size(-2):
            x.diagonal(dim1=-2, dim2=-1).add_(x.size(-1))
        return x


@dataclass(frozen=True)
class Operation:
    """A call, without its data; equal ones cost the same."""

    func: Any
    args: Any
    kwargs: Any

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: Any, is_cold: Callable[[Tensor], bool]) -> "Operation":
        def frozen(x: Any) -> Any:
            match x:
                case Tensor():
                    cold = not func.is_view and is_cold(x)
                    return Like(tuple(x.shape), x.stride(), x.dtype, x.device, cold)
                case list() | tuple():
                    return (type(x).__name__, *map(frozen, x))
                case float():
                    return 0.5 if x else x  # a coefficient changes from step to step; 0 can say that a part is absent
                case _:
                    return x

        return cls(func, tuple(map(frozen, args)), tuple((key, frozen(x)) for key, x in kwargs.items()))

    def capped(self, side: int) -> "Operation":
        """The same call on tensors, and for sizes, of which no side is longer."""

        def smaller(x: Any) -> Any:
            match x:
                case Like():
                    return x.capped(side)
                case ("list" | "tuple" | "Size", *items):
                    return (x[0], *(min(i, side) if type(i) is int else smaller(i) for i in items))
                case _:
                    return x

        return Operation(self.func, tuple(map(smaller, self.args)), tuple((k, smaller(x)) for k, x in self.kwargs))

    def work(self) -> tuple[float, int]:
        """Operations of arithmetic, and bytes that are read or written; nothing is computed."""
        with FakeTensorMode():
            args, kwargs = self.make(lambda like: like.empty())
            out = call_without_data(self.func, args, kwargs)
            touched = [x for x in tree_leaves([args, kwargs, out]) if isinstance(x, Tensor)]
            moved = 0 if self.func.is_view else sum(_span(x.shape, x.stride()) * x.dtype.itemsize for x in touched)
            return flops_of(self.func, args, kwargs, out), moved

    def tensors(self) -> list[Like]:
        """In the order in which `make` asks for them."""
        found: list[Like] = []
        self.make(found.append)
        return found

    def make(self, take: Callable[[Like], Any]) -> tuple[list[Any], dict[str, Any]]:
        """Arguments with the tensors that `take` gives."""

        def thawed(x: Any) -> Any:
            match x:
                case Like():
                    return take(x)
                case ("list" | "tuple" | "Size", *items):
                    return [thawed(item) for item in items]
                case _:
                    return x

        return [thawed(x) for x in self.args], {key: thawed(x) for key, x in self.kwargs}
