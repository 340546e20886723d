"""What a parameter group is checked for, beside the ranges of its options."""

from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emerging_optimizers.distributed.dtensor import is_dtensor, local_of, spread_of
from emerging_optimizers.engine.executors import Way
from emerging_optimizers.engine.hooks import REPLACE, InPlaceLaw, Law, make_hook
from emerging_optimizers.engine.matrix_view import blocks
from emerging_optimizers.engine.options import Execution
from emerging_optimizers.engine.packing import INT8
from emerging_optimizers.engine.parts import rounded_parts
from emerging_optimizers.engine.rule import Rule, Where, reason, without_data
from emerging_optimizers.engine.units import state_dtype
from emerging_optimizers.engine.validate import label, misspelled
from emerging_optimizers.registry import name_of

_LAYOUT = attrgetter("layout")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Checked(NamedTuple):
    """A group whose options have been checked.

    Attributes:
        given: its values.
        values: how they compare.
        entries: how many it has.
        execution: what the user asked for.
        rule: its rule.
        law: by which its weights move; None: W <- keep W - lr direction.
        way: that its chunks take.
    """

    given: list[Any]
    values: tuple[Any, ...]
    entries: int
    execution: Execution
    rule: Rule
    law: Law | None
    way: Way


def identities(group: Mapping[str, Any], names: Iterable[str]) -> tuple[Any, ...]:
    """Values of a group as they compare; a tensor, which is not read, by which one it is."""
    return tuple(id(v) if isinstance(v, Tensor) else v for v in map(group.__getitem__, names))


def check_names(
    group: Mapping[str, Any], known: Iterable[str], fixed: Mapping[str, Any], owner: str, algorithm: str
) -> None:
    """Raise for an entry that is a misspelled option, or another value than the algorithm fixes."""
    for name, value in group.items():
        if name in fixed and value != fixed[name]:
            raise ValueError(
                f"{owner}: a parameter group sets {name}={value!r}, which is {fixed[name]!r} for {algorithm}; leave it "
                "out"
            )
        if meant := misspelled(name, known):
            raise ValueError(
                f"{owner}: a parameter group sets {name!r}, which is not an option; did you mean {meant!r}?"
            )


def check_rule(rule: Rule, law: Law | None, group: Mapping[str, Any], owner: str, execution: Execution) -> None:
    """Raise for options that the rule of a group cannot meet."""
    _check_hook(rule, group, owner)
    for name, value in (("cautious", True), ("weight_decay_method", "cautious")):
        if group[name] == value and rule.weight_law is REPLACE:
            raise ValueError(
                f"{owner}: {name}={value!r} is not possible: the optimizer makes the weight anew and has no update to "
                f"compare with it; leave {name!r} out"
            )
    _check_rounding(rule, group, owner)
    if execution == "compiled" and ("parameters" in rule.reads or isinstance(law, InPlaceLaw)):
        raise ValueError(
            f"{owner}: execution='compiled' cannot run a rule that is given by a Python function of one "
            "parameter; use execution='stacked' or 'per_matrix'"
        )


def check_obstacles(rule: Rule, group: Mapping[str, Any], owner: str) -> None:
    """Raise for a parameter of a group whose dtype or device stand in the rule's way."""
    for i, p in enumerate(group["params"]):
        if p.numel() and (obstacle := rule.obstacle(Where(p.dtype, p.device, max(2, p.ndim)))):
            raise ValueError(f"{owner}: {label(group, i, p)}: {obstacle}")


def _check_rounding(rule: Rule, group: Mapping[str, Any], owner: str) -> None:
    if group["state_dtype"] is None:
        return
    state = without_data(rule)
    if not rounded_parts(state, group["state_dtype"] == INT8):
        raise ValueError(
            f"{owner}: state_dtype={group['state_dtype']} is not possible: of its state "
            f"({', '.join(state._fields)}) nothing bears rounding; leave it None"
        )


def _check_hook(rule: Rule, group: Mapping[str, Any], owner: str) -> None:
    hook = make_hook(group["weight_update_hook"])
    if hook is None:
        return
    given = f"{owner}: weight_update_hook={group['weight_update_hook']!r} is not possible"
    if rule.weight_law is not None:
        raise ValueError(f"{given}: the optimizer has a law of its own for the weight; leave it None")
    if hook.matrices_only and rule.elementwise:
        raise ValueError(
            f"{given}: it is about singular values or rows, and this optimizer is element-wise; leave it None"
        )


def check_parameter(p: Tensor, rule: Rule, group: Mapping[str, Any], label: str, cls: type) -> None:
    """Raise for a parameter that cannot be updated, or whose weights or state cannot be kept as its group says."""
    owner = cls.__name__
    if p.dtype not in DTYPES:
        raise ValueError(f"{owner}: {label} has dtype {p.dtype}; allowed are {', '.join(map(str, DTYPES))}")
    if p.dtype == torch.float16 and group["weight_rounding"] == "compensated":
        raise ValueError(
            f"{owner}: weight_rounding='compensated' is not possible for {label}, which is torch.float16: with 16 bits "
            "more only bfloat16 is float32. Give weight_rounding='stochastic', or a bfloat16 parameter"
        )
    if p.layout != torch.strided:
        raise ValueError(f"{owner}: {label} has layout {p.layout}; only dense tensors can be updated")
    if is_dtensor(p):
        if group["offload"] is not None and p.device.type != "cpu":
            raise ValueError(
                f"{owner}: offload={group['offload']!r} is not possible for {label}, which is sharded and on {p.device}"
                "; leave it out, or give FSDP2 an offload_policy=CPUOffloadPolicy()"
            )
        spread_of(f"{owner}: {label}", p)
    if p.ndim < 2 and reason(rule, Where(p.dtype, p.device), ndim=p.ndim):
        raise ValueError(
            f"{owner} updates matrices, and {label} is not one. Give vectors and scalars to an "
            f"element-wise optimizer such as AdamW, or call create_optimizer({name_of(cls) or 'muon'!r}, model), "
            "which does that and keeps one optimizer."
        )


def check_view(p: Tensor, rule: Rule, view: Any, label: str, owner: str) -> None:
    """Raise for a view that does not fit a parameter."""
    if p.numel():
        try:
            blocks(p, rule.elementwise, view)
        except ValueError as wrong:
            raise ValueError(f"{owner}: {label}: {wrong}") from None


def check_gradients(group: Mapping[str, Any], rule: Rule, owner: str) -> None:
    """Raise for a gradient that cannot be used, or for which the group wants an error."""
    raises = group["nonfinite"] == "raise"
    gradients = (g for p in group["params"] if (g := p.grad) is not None)
    if not raises and set(map(_LAYOUT, gradients)) <= {torch.strided}:
        return
    for i, p in enumerate(group["params"]):
        if (grad := p.grad) is None:
            continue
        if grad.layout != torch.strided:
            raise ValueError(
                f"{owner}: the gradient of {label(group, i, p)} has layout {grad.layout}; only "
                "dense gradients can be used (nn.Embedding(sparse=False))"
            )
        if not raises:
            continue
        dtype = state_dtype(p)
        part = local_of(grad) if is_dtensor(grad) else grad  # each process looks at its own
        norm, limit = torch.linalg.vector_norm(part, dtype=dtype), rule.largest_norm(dtype)
        if not bool(norm <= limit):
            what = f"has a norm above {limit:.1e}" if bool(part.isfinite().all()) else "is not finite"
            raise ValueError(
                f"{owner}: the gradient of {label(group, i, p)} {what}, and its group says "
                "nonfinite='raise'; nothing has moved. nonfinite='skip' lets it sit the step out"
            )
