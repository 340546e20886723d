"""Operations of a matrix's step, counted from its rule: by this processes share out matrices.

The rule runs on tensors of the meta device, so the count is the same in every process and on every machine.
"""

from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from emerging_optimizers.engine.hooks import HOOKS, WeightUpdateHook, make_hook
from emerging_optimizers.engine.rule import Rule, advance
from emerging_optimizers.engine.scalars import GIVEN, make_scalars
from emerging_optimizers.engine.schedule import Phase
from emerging_optimizers.linalg.flops import FlopCounter

META = torch.device("meta")


def step_flops(rule: Rule, shape: tuple[int, int], options: Mapping[str, Any]) -> float:
    """Operations of one matrix's step in the long run: the mean over a period in which its phases repeat.

    Counted are products and factorizations, see `linalg.flops`, of the rule and of the law by which the weight moves.
    An element is worth one operation at least, so that matrices without a product are told apart. What has a Python
    function of the user's is not run, and taken for M N min(M, N), as is a rule whose course depends on values.

    Args:
        rule: of the matrix.
        shape: (M, N).
        options: of its parameter group; the values of tensors are not read.

    Example:
        >>> from emerging_optimizers.orthogonalized_optimizers import Muon
        >>> group = Muon([torch.nn.Parameter(torch.zeros(2, 3))]).param_groups[0]
        >>> step_flops(Muon._rule(group), (2, 3), group)  # five steps of X X^T, its square, and their product with X
        320.0
    """
    M, N = shape
    guess = float(M * N * min(M, N))
    if any(callable(getattr(rule, field.name)) for field in fields(rule)):
        return guess
    hook = make_hook(options.get("weight_update_hook"))
    law = rule.weight_law or (hook if isinstance(hook, tuple(HOOKS.values())) else None)
    named = tuple((name, _plain(options[name])) for name in rule.reads if name not in GIVEN)
    try:
        counted = _count(rule, law, (M, N), named)
    except RuntimeError:  # a tensor of the meta device has no values
        return guess
    return max(counted, float(M * N))


def _plain(value: Any) -> Any:
    """An option that compares by value."""
    if isinstance(value, Tensor):
        return 0.5
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


@lru_cache(maxsize=1024)
def _count(
    rule: Rule, law: WeightUpdateHook[Any] | None, shape: tuple[int, int], options: tuple[tuple[str, Any], ...]
) -> float:
    stack = (1, *shape)
    grad, weight = torch.empty(stack, device=META), torch.empty(stack, device=META)
    step = torch.empty((1,) * len(stack), dtype=torch.float64, device=META)
    given: dict[str, Any] = {"step": step, "weight": weight, "parameters": [*weight], "l2": None}
    extra = {name: value for name, value in given.items() if name in rule.reads}
    if "weight" in extra:
        extra["weight_dtype"] = weight.dtype
    t = make_scalars(rule.reads, dict(options), extra)
    state = rule.init(stack, grad.dtype, META)

    def of(phase: Phase) -> float:
        with FlopCounter() as counter, torch.no_grad():
            out = advance(rule, grad, state, t, phase)
            if law is not None:
                law.move(weight, out.direction, 0.5, 0.5)
        return counter.flops

    schedule = rule.schedule
    reuse = of(Phase.REUSE)
    if schedule.first is None:
        return reuse
    if not schedule.behind:
        return reuse + (of(Phase.REFRESH) - reuse) / schedule.period
    with FlopCounter() as behind, torch.no_grad():
        rule.refresh(state, Phase.REFRESH)
    return reuse + behind.flops / schedule.period
