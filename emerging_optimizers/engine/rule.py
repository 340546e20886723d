"""The contract of a rule: a pure function over a stack.

A matrix rule sees `grad` as (B, M, N): B matrices of one shape. An element-wise rule sees a flat piece of any
length and must not care about rank. Both are float32 (float64 for float64 parameters), on any device.

Names of tensors end in their shape: B matrices of a stack, M rows, N columns.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from emerging_optimizers.engine.commit import Write
from emerging_optimizers.engine.hooks import WeightUpdateHook
from emerging_optimizers.engine.parts import before_first_step
from emerging_optimizers.engine.rows import ROWS, Rows
from emerging_optimizers.engine.schedule import EVERY_STEP_ALIKE, Phase, Schedule


class Scalars(Protocol):
    """What a rule names in `Rule.reads`: hyper-parameters, and these.

    Attributes:
        step: how many times each matrix has been updated, this time included. It broadcasts against the gradient.
        weight: the parameters as a stack like the gradient.
        weight_dtype: to which `weight`, with which it comes, has been rounded.
        parameters: the torch parameters behind the stack, which then holds one.
        l2: what l2 weight decay adds to the gradient; None: nothing. Of other rules the engine adds it itself.
    """

    step: Any
    weight: Tensor
    weight_dtype: torch.dtype
    parameters: list[Tensor]
    l2: Tensor | None

    def __getattr__(self, name: str) -> Any:
        """A hyper-parameter: a Python number in eager execution, a 0-D tensor in compiled execution."""


class Where(NamedTuple):
    """What a rule may have to refuse.

    Attributes:
        dtype: of a parameter.
        device: of it.
        ndim: of it.
        capturable: steps are to be recorded in a CUDA graph, which repeats them without asking the host.
    """

    dtype: torch.dtype
    device: torch.device
    ndim: int = 2
    capturable: bool = False


# (weights, gradients, state, t, lr, keep) -> the writes of W <- keep W - lr direction and of the state, in place. The
# state is a `NamedTuple` of lists, and gradients are only read. All tensors are contiguous, of one dtype, and `t.step`
# is a number.
Kernel = Callable[[list[Tensor], list[Tensor], Any, Scalars, float, float], list[Write]]


class Step(NamedTuple):
    """What a rule returns.

    Attributes:
        direction: W <- W - lr * direction, shaped like the gradient; or what the rule's `weight_law` makes the weight
            of: the new weight itself for `REPLACE`.
        state: the new state, a `State`.
    """

    direction: Tensor
    state: Any


RuleT = TypeVar("RuleT", bound="Rule")


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """One update rule. Its dataclass fields are its static hyper-parameters: what changes control flow.

    Static and scalar hyper-parameters alike live in the parameter groups, under the same names. A field with the name
    `fp32_matmul_prec` is the float32 matmul precision that the engine sets for a step; without one it is "highest".

    Attributes:
        reads: names of what `update` finds in `t`, see `Scalars`. Where "step" is among them, the count is saved.
        elementwise: the rule acts on each element by itself; its state has the gradient's shape.
        State: of a stack; each of its fields has a `Part`.
    """

    reads: ClassVar[tuple[str, ...]] = ()
    elementwise: ClassVar[bool] = False
    State: ClassVar[type[Any]]

    @property
    def weight_law(self) -> WeightUpdateHook[Any] | None:
        """The law by which the weight moves, where that is part of the rule; None: W <- keep W - lr direction."""
        return None

    @property
    def schedule(self) -> Schedule:
        """When `refresh` works on what changes slowly."""
        return EVERY_STEP_ALIKE

    def obstacle(self, where: Where) -> str | None:
        """Why a parameter cannot be updated there, and what helps; None: it can."""
        if where.ndim < 2 and not self.elementwise:
            return "it is not a matrix, and this optimizer updates matrices"
        if where.capturable and (period := self.schedule.period) > 1:
            return f"the host says whose turn it is in a period of {period} steps; give precondition_frequency=1"
        return None

    def largest_norm(self, dtype: torch.dtype) -> float:
        """The largest Frobenius norm of a gradient whose step does not overflow when it is computed in `dtype`.

        The guard treats a larger one like a gradient that is not finite. Here the norm's square has room to spare.
        """
        return torch.finfo(dtype).max ** 0.5 / 16

    @property
    def kernel(self) -> "Kernel | None":
        """The step in torch's own kernels (`engine/fused.py`), equal to `update` within rounding; None: there is none.

        It is not taken from a base of the class whose `update` is not that base's.
        """
        return None

    def init(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
        """A `State` of tensors before the first step; None for a part that does not exist.

        A field's name is its key in checkpoints; its first axis is the first axis of `shape`.
        """
        return before_first_step(self.State, shape, dtype, device)

    def accumulate(self, grad: Tensor, state: Any, t: Scalars) -> Any:
        """The state with a gradient in what changes slowly, such as Kronecker factors. Pure."""
        return state

    def refresh(self, state: Any, phase: Phase) -> Any:
        """The state with the work of a phase done, such as eigenbases that follow the factors. Pure.

        In every step, between `accumulate` and `update`. With a schedule `behind`, REUSE there, and FIRST or REFRESH
        when state and weights are written, on CUDA beside whatever follows.
        """
        return state

    @abstractmethod
    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """One step. Pure: it writes into none of its arguments; with `capturable` it reads no value on the host."""


class StartsFromWeight(Rule):
    """A rule whose state before the first step follows from the weight."""

    @abstractmethod
    def start(self, weight: Tensor, labels: Sequence[str]) -> Any:
        """The state of a stack before its first step, in the place of `init`'s.

        Runs before anything moves and may read the device, warn and raise; `labels` name the parameter of each matrix.
        """


class PicksRows(Rule):
    """A rule that works on some rows of a matrix as a whole, and on its own of the rest, element by element.

    Where processes have cut a matrix, only what is picked travels.
    """

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """One step of matrices that are here."""
        return self.update_rows(grad, state, t, ROWS)

    @abstractmethod
    def update_rows(self, grad: Tensor, state: Any, t: Scalars, rows: Rows) -> Step:
        """One step of matrices, or of what lies here of them, that asks `rows` for what is elsewhere. Pure."""

    @abstractmethod
    def share_of(self, shape: Sequence[int]) -> float:
        """Which share of a matrix of some shape is picked."""


class TranslatesState(Rule):
    """A rule whose state another release wrote otherwise."""

    @abstractmethod
    def translate(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        """The saved state of one parameter under this rule's keys."""


def advance(rule: Rule, grad: Tensor, state: Any, t: Scalars, phase: Phase) -> Step:
    """One step of a stack: accumulate, refresh, update."""
    return rule.update(grad, rule.refresh(rule.accumulate(grad, state, t), phase), t)


def rule_of(kind: type[RuleT], group: Mapping[str, Any]) -> RuleT:
    """The rule that a parameter group asks for."""
    return kind(**{field.name: group[field.name] for field in fields(kind)})


def reason(rule: Rule, where: Where, **changes: Any) -> str | None:
    """The obstacle that these changes bring about."""
    found = rule.obstacle(where._replace(**changes))
    return None if found == rule.obstacle(where) else found


def without_data(rule: Rule) -> Any:
    """The state of one element or one matrix, on the meta device: which parts there are."""
    return rule.init((1,) if rule.elementwise else (1, 2, 3), torch.float32, torch.device("meta"))


def translated(rule: Rule, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """The saved state of one parameter under a rule's keys; keys that are no strings are somebody else's."""
    if not isinstance(rule, TranslatesState):
        return saved
    named = {key: value for key, value in saved.items() if isinstance(key, str)}
    return {**{key: value for key, value in saved.items() if key not in named}, **rule.translate(named)}


def kernel_of(rule: Rule) -> Kernel | None:
    """The kernel of a rule, unless a subclass has changed what it has to equal."""
    return rule.kernel if _equals_update(type(rule)) else None


@cache
def _equals_update(kind: Any) -> bool:
    """Whether the kernel of a class of rules belongs to its update."""
    return "kernel" in vars(next(c for c in kind.__mro__ if not {"kernel", "update"}.isdisjoint(vars(c))))
