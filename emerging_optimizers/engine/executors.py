"""How a rule is called: which way the chunks of a group take, and the calls. `stacked` and `per_matrix` differ in the
chunks that buckets cut, not here.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emerging_optimizers.engine.hooks import InPlaceLaw, Law
from emerging_optimizers.engine.options import Execution
from emerging_optimizers.engine.rows import CutRows
from emerging_optimizers.engine.rule import Kernel, PicksRows, Rule, Step, advance, kernel_of
from emerging_optimizers.engine.scalars import as_tensors
from emerging_optimizers.engine.schedule import Phase
from emerging_optimizers.linalg.eight_bits import BLOCK, dequantise, quantise_
from emerging_optimizers.linalg.precision import FP32MatmulPrecT, fp32_matmul_precision

BACKEND = "inductor"  # of torch.compile; most tests take one that generates no code
# Its own limits on the length of an expression would have a direction go through memory.
ONE_PASS: dict[str, Any] = {"realize_opcount_threshold": 10_000, "realize_reads_threshold": 10_000}


class Way(NamedTuple):
    """The way that the chunks of a group take; it is chosen when the group is checked.

    Attributes:
        execution: what the user asked for, or "per_matrix" where parameters are not to share a chunk.
        whole: vectors are not cut.
        plain: parameters may be taken as they are, where nothing is masked.
        one_pass: one compiled pass over gradient, state and weight.
        kernel: the step in torch's kernels, of parameters that are taken as they are.
    """

    execution: Execution
    whole: bool = False
    plain: bool = False
    one_pass: bool = False
    kernel: Kernel | None = None

    @property
    def cut(self) -> str:
        """How chunks are cut."""
        return "elements" if self.whole or self.one_pass else self.execution if self.kernel is None else "fused"

    def stacked(self) -> "Way":
        """The same where parameters are not to be taken as they are."""
        return self._replace(plain=False, kernel=None)


def way_of(rule: Rule, law: Law | None, group: Mapping[str, Any], execution: Execution) -> Way:
    """The way of a group's chunks, for its rule, law and options."""
    whole_units = law is not None or group["cautious"]  # which see the norm or the share of a whole parameter
    if "parameters" in rule.reads or isinstance(law, InPlaceLaw):
        return Way("per_matrix")
    if whole_units and rule.elementwise and execution == "stacked":
        return Way(execution, whole=True)
    simple = rule.elementwise and not whole_units and group["weight_decay_method"] != "cautious"
    if not simple or {"weight", "l2"} & {*rule.reads}:
        return Way(execution)
    if execution == "compiled":
        return Way(execution, one_pass=not group["capturable"])
    plain = not isinstance(group["lr"], Tensor)
    return Way(execution, plain=plain, kernel=kernel_of(rule) if plain else None)


def many_graphs(execution: Execution) -> AbstractContextManager[Any]:
    """Raise dynamo's recompile limit around the calls of a step: each (rule, phase, shape) has a graph."""
    if execution != "compiled":
        return nullcontext()
    return torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=65536)


def call(
    rule: Rule, grad: Tensor, state: Any, t: Any, phase: Phase, execution: Execution, rows: CutRows | None = None
) -> Step:
    """One update of a chunk; `rows`: of matrices of which parts are here."""
    with nullcontext() if rule.elementwise else fp32_matmul_precision(_precision(rule)):
        if rows is not None and isinstance(rule, PicksRows):
            with rows.telling(grad):
                return rule.update_rows(grad, state, t, rows)
        if execution != "compiled":
            return advance(rule, grad, state, t, phase)
        direction, new = _compiled(rule, phase, BACKEND)(grad, state, as_tensors(t, grad.device))
        return Step(direction, type(state)(*new))


def refresh(rule: Rule, state: Any, phase: Phase, execution: Execution) -> Any:
    """The work of a phase behind the step."""
    with fp32_matmul_precision(_precision(rule)):
        if execution != "compiled":
            return rule.refresh(state, phase)
        return type(state)(*_compiled_refresh(rule, phase, BACKEND)(state))


def _precision(rule: Rule) -> FP32MatmulPrecT:
    return getattr(rule, "fp32_matmul_prec", "highest")


def step_elements(
    rule: Rule, grad: Tensor, state: Any, scales: Any, weight: Tensor, scale: Tensor | None, t: Any, maximize: bool
) -> None:
    """The whole step of an element-wise rule on flat tensors in one compiled pass: state and weight are written.

    Args:
        rule: An element-wise rule that neither reads nor rewrites the weight.
        grad: (K,), in the state's dtype.
        state: Of K elements each, (K,).
        scales: Of the parts of the state that are codes, (K / 256,); None for the others.
        weight: (K,), in its own dtype.
        scale: What the gradient is multiplied by, 0: neither state nor weight moves; None: by one.
        t: The rule's scalars; also `lr`, `keep`, and `l2`, by which the weight joins the gradient, or None.
        maximize: Follow the gradient up.
    """
    # `data` is no view: of one, dynamo would also see the base, whose length it compares with others.
    state = type(state)(*(x.data for x in state))
    grad, weight = grad.data, weight.data
    if any(x is not None for x in scales):  # in rows of a block, over which a loop without divisions runs
        scales = [None if x is None else x.data[:, None] for x in scales]
        grad, weight, scale, *flat, step = map(_in_rows, (grad, weight, scale, *state, getattr(t, "step", None)))
        state = type(state)(*flat)
        if step is not None:
            t = t._replace(step=step)
    _compiled_elements(rule, BACKEND)(grad, state, scales, weight, scale, t, maximize)


def _in_rows(x: Any) -> Any:
    """A flat tensor as rows of a block; a number as it is."""
    return x.view(-1, BLOCK) if isinstance(x, Tensor) and x.ndim else x


@cache
def _compiled_elements(rule: Rule, backend: str) -> Any:
    def step(
        grad: Tensor, state: Any, scales: Any, weight: Tensor, scale: Tensor | None, t: Any, maximize: bool
    ) -> None:
        old = weight.to(grad.dtype)
        wide = [x if s is None else dequantise(x, s) for x, s in zip(state, scales, strict=True)]
        live = None
        if scale is not None:
            live = scale > 0
            grad = torch.where(live, grad * scale, 0)
        if maximize:
            grad = -grad
        if t.l2 is not None:
            grad = grad + old * t.l2
        out = advance(rule, grad, type(state)(*wide), t, Phase.REUSE)
        # Not `add_(direction, alpha=-lr)`: compiled, an alpha can be lost, and a number freezes at its second value
        # (torch 2.13). Every number comes as a 0-D tensor.
        new = old * t.keep - out.direction * t.lr
        for x, s, before, y in zip((*state, weight), (*scales, None), (*wide, old), (*out.state, new), strict=True):
            if before is y:
                continue
            z = y if live is None else torch.where(live, y, before)
            if s is None:
                x.copy_(z)
            else:
                quantise_(x, s, z)

    # For any length: one graph serves all parameters, and the same where some have no gradient.
    options = ONE_PASS if backend == "inductor" else None
    return torch.compile(step, fullgraph=True, dynamic=True, backend=backend, options=options)


@cache
def _compiled(rule: Rule, phase: Phase, backend: str) -> Any:
    # Only the pure rule is compiled. The weight is written by the engine: compiled, `add_(a @ b, alpha=-lr)` loses
    # its alpha and a float learning rate freezes at its second value (torch 2.13). States come out as plain tuples:
    # torch 2.11 makes some NamedTuples again without their values, or not at all.
    def update(grad: Tensor, state: Any, t: Any) -> tuple[Tensor, tuple[Any, ...]]:
        out = advance(rule, grad, state, t, phase)
        return out.direction, tuple(out.state)

    return torch.compile(update, fullgraph=True, dynamic=False, backend=backend)


@cache
def _compiled_refresh(rule: Rule, phase: Phase, backend: str) -> Any:
    def refresh(state: Any) -> tuple[Any, ...]:
        return tuple(rule.refresh(state, phase))

    return torch.compile(refresh, fullgraph=True, dynamic=False, backend=backend)
