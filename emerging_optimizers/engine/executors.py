"""How a rule is called. `stacked` and `per_matrix` differ in the chunks that buckets cut, not here."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from emerging_optimizers.engine.rule import Phase, Rule, Step
from emerging_optimizers.engine.scalars import as_tensors
from emerging_optimizers.linalg.precision import fp32_matmul_precision

Execution = Literal["stacked", "per_matrix", "compiled"]


def call(rule: Rule, grad: Tensor, state: Any, t: Any, phase: Phase, execution: Execution) -> Step:
    """One update of a chunk."""
    with nullcontext() if rule.elementwise else fp32_matmul_precision(rule.matmul_precision):
        if execution != "compiled":
            return rule.update(grad, state, t, phase)
        with _many_graphs():
            step: Step = _compiled(rule, phase)(grad, state, as_tensors(t, grad.device))
        return step


def prepare(rule: Rule, state: Any, phase: Phase, execution: Execution) -> Any:
    """The state of a chunk as its next update finds it."""
    with fp32_matmul_precision(rule.matmul_precision):
        if execution != "compiled":
            return rule.prepare(state, phase)
        with _many_graphs():
            return _compiled_prepare(rule, phase)(state)


def _many_graphs() -> AbstractContextManager[None]:
    """One graph for each (rule, phase, shape): a known number, which may exceed what dynamo takes for a mistake."""
    return torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=65536)


@cache
def _compiled(rule: Rule, phase: Phase) -> Any:
    # Only the pure rule is compiled. The weight is written by the engine: compiled, `add_(a @ b, alpha=-lr)` loses
    # its alpha and a float learning rate freezes at its second value (torch 2.13).
    def update(grad: Tensor, state: Any, t: Any) -> Step:
        return rule.update(grad, state, t, phase)

    return torch.compile(update, fullgraph=True, dynamic=False)


@cache
def _compiled_prepare(rule: Rule, phase: Phase) -> Any:
    def prepare(state: Any) -> Any:
        return rule.prepare(state, phase)

    return torch.compile(prepare, fullgraph=True, dynamic=False)
