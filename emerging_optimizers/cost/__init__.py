"""What an optimizer will cost: memory, operations and time of a step, before anything is allocated.

The optimizer itself runs, on fake tensors: shapes, dtypes and devices without data. What it allocates and computes is
counted, so nothing here knows an update rule. Seconds come from timing each distinct operation on the device; what a
step touches for the first time, weights and gradients and state, comes from memory, the rest from the caches.
"""

import copy
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from emerging_optimizers.columns import in_columns
from emerging_optimizers.cost.meter import WARM_STEPS, Meter
from emerging_optimizers.cost.repeats import Repeats
from emerging_optimizers.cost.timings import Timings
from emerging_optimizers.engine import RuleOptimizer
from emerging_optimizers.engine.fused import squares
from emerging_optimizers.engine.validate import place
from emerging_optimizers.linalg.precision import newton_schulz_in_words
from emerging_optimizers.registry import entry
from emerging_optimizers.routing import create_optimizer
from emerging_optimizers.routing.routed import devices_that_cast

LONGEST_PERIOD = 100


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
        alike = Counter(self.by_parameter.values())
        rows = [("count", "shape", "state", "GFLOP a step", "time of a step")]
        rows += [(f"{count} x", *_texts(cost, count)) for cost, count in alike.items()]
        rows += [("all", *_texts(self)), ("temporaries", "", f"{self.peak_bytes / 1e6:,.3f} MB", "", "")]
        return "\n".join([*in_columns(rows, right=(2, 3, 4)), *filter(None, [self.products])])


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
        optimizer: a name of `list_optimizers()`, in any case, made by `create_optimizer` with `options`; or a function,
            such as a class, from the module or the parameters to a torch optimizer.
        device: where the step would run, and one that is there; None: where the parameters are.
        seconds: time the operations; a large one by a smaller one that does the same, in no more than 64 MiB on a CPU,
            1 GiB on CUDA.
        **options: see `create_optimizer`.

    Returns:
        Bytes and operations are counted, not modelled, and nothing is allocated in proportion to the parameters.
        Seconds are those of the operations and, on a CPU, of the look whether gradients are finite and of what Python
        does for each parameter. Left out: what the guards cost beyond that, the caches of torch's allocator and the
        workspaces of LAPACK and cuSOLVER. Against their own times (a CPU, one thread), those by a smaller call are 1.0
        times for products of 2048 and 3072, 0.9 to 1.2 for QR of 1536 to 3072, 1.0 to 1.25 for eigh of 1024 to 2048;
        calls over elements whose results are longer than 32 MiB take up to 4 times what is said, for the pages of new
        memory. A whole step of an element-wise optimizer takes 0.8 to 1.4 times what is said, and 2 to 3 times with
        `cautious=True` on a matrix of 64 MiB, whose temporaries are new memory.

    Raises:
        TypeError: `options` beside a function, or neither a name nor a function.
        ValueError: the device is not there, the step depends on values of the weights (Spectron, MuonHyperball), it is
            compiled, or what `create_optimizer` raises.

    Example:
        >>> cost = estimate(nn.Linear(64, 32, bias=False), "adamw", seconds=False)
        >>> cost.state_bytes, cost.flops
        (16388, 0.0)
    """
    if options and not isinstance(optimizer, str):
        raise TypeError(f"estimate: {next(iter(options))!r} belongs to a name; give it to the function instead")
    if not (isinstance(optimizer, str) or callable(optimizer)):
        raise TypeError(
            f"estimate: optimizer is a {type(optimizer).__name__}; give a name of list_optimizers() or a function that "
            "makes one of the parameters, such as lambda params: AdamW(params, lr=1e-3)"
        )
    kind = "cpu" if device is None else torch.device(device).type
    if kind not in ("cpu", "meta") and not torch.get_device_module(kind).is_available():
        raise ValueError(
            f"estimate: device={str(device)!r} is not there (torch {torch.__version__} finds none), and without it "
            "torch takes no view, not even of tensors without data; run this where it is, or give device='cpu', where "
            "the state has the same bytes"
        )
    target = model_or_params if isinstance(model_or_params, nn.Module) else list(model_or_params)
    # A rate may be a tensor.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        copied = copy.deepcopy(target, {id(x): _fake(x, device) for x in _tensors(target)})
        try:
            made = _made(optimizer, copied, tree_map_only(Tensor, partial(_fake, device=device), options))
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


def _made(optimizer: Any, target: Any, options: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimizer whose step is counted."""
    made: torch.optim.Optimizer
    if not isinstance(optimizer, str):
        made = optimizer(target)
    else:  # the rate changes no cost; some have none to start from
        known = entry(optimizer)
        more = {"lr": 1e-3} if known.start is None and known.in_adams_unit else {}
        if "precondition_frequency" in options:
            more |= {"refresh_ramp": 0}  # what it is about is a step far behind the ramp
        made = create_optimizer(optimizer, target, **{**more, **options})
    if getattr(made, "execution", None) == "compiled":
        raise ValueError(
            "estimate: with execution='compiled' a step is not made of operations that can be timed one by one; leave "
            "it out (the state has the same bytes), and time a step on real weights"
        )
    return made


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

    repeats = Repeats(optimizer)

    def run(active: list[Tensor]) -> Meter:
        for p in parameters:
            p.grad = None
        for p in active:
            p.grad = torch.empty_like(p)
        repeats.meter = None
        with Meter(()):
            for _ in range(WARM_STEPS):
                optimizer.step()
        with Meter(tree_leaves([parameters, [p.grad for p in active], list(optimizer.state.values())])) as meter:
            repeats.meter = meter
            for _ in range(steps):
                meter.touched.clear()
                squares([p.grad for p in active if p in looked and p.grad is not None])
                optimizer.step()
        return meter

    def total(meter: Meter, active: list[Tensor]) -> float:
        on_host = sum(p.device.type == "cpu" for p in active) if isinstance(optimizer, RuleOptimizer) else 0
        return timings.total(meter.counts.operations) / steps + on_host * timings.parameter

    def cost(meter: Meter, active: list[Tensor]) -> dict[str, Any]:
        return {
            "elements": sum(p.numel() for p in active),
            "state_bytes": sum(
                x.numel() * x.element_size() for p in active for x in optimizer.state[p].values() if torch.is_tensor(x)
            ),
            "flops": meter.counts.flops / steps,
            "seconds": total(meter, active) if seconds else None,
        }

    timings = Timings()
    everyone = run(parameters)
    alone: dict[Any, Meter] = {}
    by_parameter = {}
    for p in parameters:
        key = (p.shape, p.dtype, groups[p])
        if key not in alone:
            alone[key] = everyone if len(parameters) == 1 else run([p])
        by_parameter[names[p]] = Cost(shape=tuple(p.shape), **cost(alone[key], [p]))
    products = newton_schulz_in_words(devices_that_cast(optimizer)) if isinstance(optimizer, RuleOptimizer) else ""
    return Estimate(
        shape=None,
        peak_bytes=everyone.peak,
        by_parameter=by_parameter,
        products=products.strip(),
        **cost(everyone, parameters),
    )


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


def _texts(cost: Cost, count: int = 1) -> tuple[str, str, str, str]:
    return (
        "" if cost.shape is None else "x".join(map(str, cost.shape)) or "1",
        f"{count * cost.state_bytes / 1e6:,.3f} MB",
        f"{count * cost.flops / 1e9:,.3f}",
        "-" if cost.seconds is None else _time_in_words(count * cost.seconds),
    )


def _time_in_words(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.2f} ms"
