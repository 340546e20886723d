"""What an optimizer will cost: memory, operations and time of a step, before anything is allocated.

The optimizer itself runs, on fake tensors: shapes, dtypes and devices without data. What it allocates and computes is
counted, so nothing here knows an update rule. Seconds come from timing each distinct operation on the device; what a
step touches for the first time, weights and gradients and state, comes from memory, the rest from the caches.
"""

import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

from emerging_optimizers.engine import RuleOptimizer
from emerging_optimizers.engine.fused import squares
from emerging_optimizers.engine.validate import place
from emerging_optimizers.linalg.precision import newton_schulz_in_words
from emerging_optimizers.registry import entry
from emerging_optimizers.routing import create_optimizer
from emerging_optimizers.routing.routed import devices_that_cast

WARM_STEPS = 3  # state, the first basis, the first of the later ones
LONGEST_PERIOD = 50
COLD_BYTES = 64 * 2**20  # no less than caches hold
ALIGNED = 64
LEAST_CALLS, MOST_CALLS = 3, 21
# Operations of LAPACK's routines for a matrix (m, n) with m >= n; Golub and Van Loan, Matrix Computations.
FACTORIZATIONS: Mapping[str, Callable[[int, int], float]] = {
    "linalg_qr": lambda m, n: 4 * (m * n**2 - n**3 / 3),
    "geqrf": lambda m, n: 2 * (m * n**2 - n**3 / 3),
    "linalg_householder_product": lambda m, n: 2 * (m * n**2 - n**3 / 3),
    "_linalg_eigh": lambda m, n: 9 * n**3,
    "_linalg_svd": lambda m, n: 14 * m * n**2 + 8 * n**3,
    "linalg_cholesky_ex": lambda m, n: n**3 / 3,
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a step costs in the long run: the mean over the period in which its phases repeat."""

    shape: tuple[int, ...] | None
    """Of the parameter; None: of several."""
    elements: int
    state_bytes: int
    """Of the optimizer's state, moments and factors and all."""
    flops: float
    """Operations of matrix products and factorizations, two a multiply-add."""
    seconds: float | None
    """Predicted time of a step; None: not asked for."""


@dataclass(frozen=True, kw_only=True)
class Estimate(Cost):
    """The cost of all parameters, and of each as if it were alone: those that share a call are cheaper together."""

    peak_bytes: int
    """The most that a step holds at a time beside weights, gradients and state."""
    by_parameter: Mapping[str, Cost] = field(default_factory=dict)
    products: str = ""
    """In which dtype Newton-Schulz multiplies, where that follows from the device ("medium")."""

    def __str__(self) -> str:
        rows = [("parameter", "shape", "state bytes", "GFLOP a step", "ms a step")]
        rows += [(name, *_texts(cost)) for name, cost in self.by_parameter.items()]
        rows += [("all", *_texts(self)), ("a step's temporaries", "", f"{self.peak_bytes:,}", "", "")]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        sides = ("<", "<", ">", ">", ">")
        layout = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
        return "\n".join(layout.format(*row).rstrip() for row in rows) + self.products


def estimate(
    model_or_params: nn.Module | Iterable[Any],
    optimizer: str | Callable[[Any], torch.optim.Optimizer],
    device: torch.device | str | None = None,
    *,
    seconds: bool = True,
    **options: Any,
) -> Estimate:
    """What a step of an optimizer will cost, without running one on real weights.

    Args:
        model_or_params: a module, which may be on the meta device, or what any torch optimizer takes.
        optimizer: a name of `list_optimizers()`, made by `create_optimizer` with `options`; or a function, such as a
            class, from the module or the parameters to a torch optimizer.
        device: where the step would run, and one that is there; None: where the parameters are.
        seconds: time the operations; needs the memory of the largest one's operands.
        **options: see `create_optimizer`.

    Returns:
        Bytes and operations are counted, not modelled. Seconds are those of the operations and, on a CPU, of the look
        whether gradients are finite and of what Python does for each parameter. Left out: what the guards cost beyond
        that, the caches of torch's allocator and the workspaces of LAPACK and cuSOLVER.

    Raises:
        TypeError: `options` beside a function.
        ValueError: the device is not there, the step depends on values of the weights (Spectron, MuonHyperball), or
            what `create_optimizer` raises.

    Example:
        >>> cost = estimate(nn.Linear(64, 32, bias=False), "adamw", seconds=False)
        >>> cost.state_bytes, cost.flops
        (16388, 0.0)
    """
    if options and not isinstance(optimizer, str):
        raise TypeError(f"estimate: {next(iter(options))!r} belongs to a name; give it to the function instead")
    kind = "cpu" if device is None else torch.device(device).type
    if kind not in ("cpu", "meta") and not torch.get_device_module(kind).is_available():
        raise ValueError(
            f"estimate: device={str(device)!r} is not there (torch {torch.__version__} finds none), and without it "
            "torch takes no view, not even of tensors without data; run this where it is, or give device='cpu', where "
            "the state has the same bytes"
        )
    target = model_or_params if isinstance(model_or_params, nn.Module) else list(model_or_params)
    with FakeTensorMode(), torch.no_grad():
        copied = copy.deepcopy(target, {id(x): _fake(x, device) for x in _tensors(target)})
        try:
            if isinstance(optimizer, str):  # the rate, which one has none to start from, changes no cost
                rate = {"lr": 1e-3} if entry(optimizer).start is None else {}
                made = create_optimizer(optimizer, copied, **{**rate, **options})
            else:
                made = optimizer(copied)
            looked: set[Tensor] = set()
            for group in made.param_groups if isinstance(made, RuleOptimizer) else ():
                if group["nonfinite"] == "skip":
                    looked.update(p for p in group["params"] if p.device.type == "cpu")
                group |= {"nonfinite": "propagate", "spike_guard": None}  # the guards look at values
                if "refresh_ramp" in group:
                    group["refresh_ramp"] = 0  # which ends
            return _measure(made, seconds, looked)
        except DataDependentOutputException as error:
            raise ValueError(
                f"estimate: {optimizer!r} looks at values of the weights, and here are none; time a step on real ones"
            ) from error


def _measure(optimizer: torch.optim.Optimizer, seconds: bool, looked: Container[Tensor]) -> Estimate:
    names = _names(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    groups = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    period = max(
        (optimizer._checked_rule(i).schedule.period for i in range(len(optimizer.param_groups)))
        if isinstance(optimizer, RuleOptimizer)
        else (1,)
    )
    steps = min(period, LONGEST_PERIOD)

    def run(active: list[Tensor]) -> _Meter:
        for p in parameters:
            p.grad = None
        for p in active:
            p.grad = torch.empty_like(p)
        for _ in range(WARM_STEPS):
            optimizer.step()
        with _Meter(tree_leaves([parameters, [p.grad for p in active], list(optimizer.state.values())])) as meter:
            for _ in range(steps):
                meter.touched.clear()
                squares([p.grad for p in active if p in looked and p.grad is not None])
                optimizer.step()
        return meter

    def total(meter: _Meter, active: list[Tensor]) -> float:
        on_host = sum(p.device.type == "cpu" for p in active) if isinstance(optimizer, RuleOptimizer) else 0
        return timings.total(meter.operations) / steps + on_host * timings.parameter

    def cost(meter: _Meter, active: list[Tensor]) -> dict[str, Any]:
        return {
            "elements": sum(p.numel() for p in active),
            "state_bytes": sum(
                x.numel() * x.element_size() for p in active for x in optimizer.state[p].values() if torch.is_tensor(x)
            ),
            "flops": meter.flops / steps,
            "seconds": total(meter, active) if seconds else None,
        }

    timings = _Timings()
    everyone = run(parameters)
    alone: dict[Any, _Meter] = {}
    by_parameter = {}
    for p in parameters:
        key = (p.shape, p.dtype, groups[p])
        if key not in alone:
            alone[key] = run([p])
        by_parameter[names[p]] = Cost(shape=tuple(p.shape), **cost(alone[key], [p]))
    products = newton_schulz_in_words(devices_that_cast(optimizer)) if isinstance(optimizer, RuleOptimizer) else ""
    return Estimate(
        shape=None,
        peak_bytes=everyone.peak,
        by_parameter=by_parameter,
        products=products,
        **cost(everyone, parameters),
    )


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Counts operations, and the bytes of what was not there before while it is alive."""

    def __init__(self, there: Iterable[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.operations: Counter[Any] = Counter()
        self.flops = 0.0
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._there = {x.untyped_storage()._cdata for x in there if isinstance(x, Tensor)}
        self.touched: dict[int, set[tuple[int, int]]] = {}  # extents, by storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace in ("prim", "profiler"):  # looks at attributes, and marks: outside of a mode no calls
            return out
        self.operations[_Operation.of(func, args, kwargs, self._is_cold)] += 1
        for x in () if func.is_view else tree_leaves([args, kwargs]):
            if isinstance(x, Tensor):
                self.touched.setdefault(x.untyped_storage()._cdata, set()).add(_extent(x))
        self.flops += _flops(func, args, kwargs, out)
        self._alive = {k: held for k, held in self._alive.items() if not held[0].expired()}  # type: ignore[no-untyped-call]  # as above
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (key := (storage := x.untyped_storage())._cdata) not in self._there:
                held = (StorageWeakRef(storage), storage.nbytes())  # type: ignore[no-untyped-call]  # as above
                self._alive.setdefault(key, held)
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out

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


@register_flop_formula(torch.ops.emerging_optimizers.syrk)
def _syrk_flops(a_shape: tuple[int, int, int], *_: Any, **__: Any) -> int:
    B, M, K = a_shape
    return B * M * (M + 1) * K  # half of a full product


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    name = func.overloadpacket.__name__
    if name in FACTORIZATIONS:
        *batch, m, n = args[0].shape
        return torch.Size(batch).numel() * FACTORIZATIONS[name](max(m, n), min(m, n))
    count = flop_registry.get(func.overloadpacket)
    return count(*args, **kwargs, out_val=out) if count else 0.0


@dataclass(frozen=True)
class _Like:
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

    def make(self) -> Tensor:
        """One with data: positive, so that a root of it is finite."""
        x = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return x.uniform_(0.5, 1) if x.is_floating_point() else x.fill_(1)


@dataclass(frozen=True)
class _Operation:
    """A call, without its data; equal ones cost the same."""

    func: Any
    args: Any
    kwargs: Any

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: Any, is_cold: Callable[[Tensor], bool]) -> "_Operation":
        def frozen(x: Any) -> Any:
            match x:
                case Tensor():
                    cold = not func.is_view and is_cold(x)
                    return _Like(tuple(x.shape), x.stride(), x.dtype, x.device, cold)
                case list() | tuple():
                    return (type(x).__name__, *map(frozen, x))
                case float():
                    return 0.5 if x else x  # a coefficient changes from step to step; 0 can say that a part is absent
                case _:
                    return x

        return cls(func, tuple(map(frozen, args)), tuple((key, frozen(x)) for key, x in kwargs.items()))

    def tensors(self) -> list[_Like]:
        """In the order in which `make` asks for them."""
        found: list[_Like] = []
        self.make(found.append)
        return found

    def make(self, take: Callable[[_Like], Any]) -> tuple[list[Any], dict[str, Any]]:
        """Arguments with the tensors that `take` gives."""

        def thawed(x: Any) -> Any:
            match x:
                case _Like():
                    return take(x)
                case ("list" | "tuple" | "Size", *items):
                    return [thawed(item) for item in items]
                case _:
                    return x

        return [thawed(x) for x in self.args], {key: thawed(x) for key, x in self.kwargs}


class _Timings:
    """Seconds of operations, each measured once."""

    def __init__(self) -> None:
        self._known: dict[_Operation, float] = {}
        self._memory: dict[torch.device, Tensor] = {}

    def total(self, operations: Mapping[_Operation, int]) -> float:
        """Of all of them."""
        return sum(count * self._seconds(operation) for operation, count in operations.items())

    def _seconds(self, operation: _Operation) -> float:
        if operation not in self._known:
            with _disable_current_modes():
                self._known[operation] = self._time(operation)
        return self._known[operation]

    @cached_property
    def parameter(self) -> float:
        """What Python does for a parameter: a step on many of one element, less its operations."""
        count, taken = 256, []
        with _disable_current_modes(), torch.no_grad():
            ps = [nn.Parameter(torch.zeros(1)) for _ in range(count)]
            optimizer = create_optimizer("adamw", ps, lr=1e-3)
            for p in ps:
                p.grad = torch.ones(1)
            for _ in range(WARM_STEPS + 9):
                begun = time.perf_counter()
                optimizer.step()
                taken.append(time.perf_counter() - begun)
            with _Meter(()) as meter:
                optimizer.step()
        step = statistics.median(taken[WARM_STEPS:])
        return max(0.0, step - self.total(meter.operations)) / count

    def _time(self, operation: _Operation) -> float:
        """Median of a few calls, after one that is not counted."""
        likes = operation.tensors()
        device = likes[0].device if likes else torch.device("cpu")
        cold = [x for x in likes if x.cold and x.nbytes and x.dtype.is_floating_point]
        # As in a step, which walks through weights and state: each call's part lies behind that of the call before.
        region = COLD_BYTES // max(1, len(cold)) // ALIGNED * ALIGNED
        walks = sum(x.nbytes for x in cold) >= 2**16 and all(x.nbytes * LEAST_CALLS < region for x in cold)
        made = [None if walks and x in cold else x.make() for x in likes]
        calls = min(region // x.nbytes for x in cold) if walks else MOST_CALLS
        memory = self._refilled(device) if walks else None

        def arguments(call: int) -> tuple[list[Any], dict[str, Any]]:
            starts = iter(range(0, COLD_BYTES, region))
            kept = iter(made)

            def take(like: _Like) -> Tensor:
                if (x := next(kept)) is not None:
                    return x
                assert memory is not None
                start = next(starts) + call * like.nbytes // ALIGNED * ALIGNED
                return memory[start : start + like.nbytes].view(like.dtype).as_strided(like.shape, like.stride)

            return operation.make(take)

        def wait() -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        taken: list[float] = []
        for call in range(min(calls, MOST_CALLS)):
            if call > LEAST_CALLS and sum(taken) > 0.01:
                break
            args, kwargs = arguments(call)
            wait()
            begun = time.perf_counter()
            operation.func(*args, **kwargs)
            wait()
            taken.append(time.perf_counter() - begun)
        return statistics.median(taken[1:])

    def _refilled(self, device: torch.device) -> Tensor:
        """Bytes that read as positive numbers of any dtype; writing them has pushed all else out of the caches."""
        if device not in self._memory:
            self._memory[device] = torch.empty(COLD_BYTES // 4, dtype=torch.int32, device=device)
        return self._memory[device].fill_(0x3F403F40).view(torch.uint8)


def _fake(x: Tensor, device: torch.device | str | None) -> Tensor:
    where = torch.device(device) if device is not None else x.device
    copied = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu" if where.type == "meta" else where)
    return nn.Parameter(copied, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else copied


def _tensors(target: Any) -> list[Tensor]:
    if isinstance(target, nn.Module):
        return [*target.parameters(), *target.buffers()]
    return [x for x in tree_leaves(target) if isinstance(x, Tensor)]


def _names(optimizer: torch.optim.Optimizer) -> dict[Tensor, str]:
    groups = enumerate(optimizer.param_groups)
    return {p: place(group, index, i) for index, group in groups for i, p in enumerate(group["params"])}


def _texts(cost: Cost) -> tuple[str, str, str, str]:
    return (
        "" if cost.shape is None else " ".join(map(str, cost.shape)),
        f"{cost.state_bytes:,}",
        f"{cost.flops / 1e9:.3f}",
        "-" if cost.seconds is None else f"{cost.seconds * 1e3:.2f}",
    )
