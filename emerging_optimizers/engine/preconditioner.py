"""The contract of an object of the user's that keeps what one matrix needs, and of the rule that calls it.

A published optimizer lets a class stand in for its factors and bases (`PreconditionerCls`). Such a class is made anew
in every step, around the state of one matrix, and is called matrix by matrix.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from emerging_optimizers.engine.parts import Part, parts_of
from emerging_optimizers.engine.rule import Rule, Scalars, Step, Where


@dataclass
class TensorPair:
    """What belongs to the rows and what to the columns; unpacks as `L, R = pair`."""

    L: Tensor
    R: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        """L, then R."""
        return iter((self.L, self.R))


class PreconditionerProtocol(Protocol):
    """What is made anew in every step, around the state of one matrix."""

    def __init__(self, state: dict[str, Tensor], /, *args: Any, **kwargs: Any) -> None:
        """Take the state up; the optimizer also hands over its `eps` and what else it has for it."""

    @staticmethod
    def init_state(shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
        """The state before the first step, whose keys are those of the checkpoint."""

    def init_step(self, grad: Tensor, shampoo_beta: float, /) -> None:
        """Take the first gradient in."""

    def update_kronecker_factors(self, grad: Tensor, shampoo_beta: float, /) -> None:
        """Take a gradient into the factors."""

    def step(self, grad: Tensor, shampoo_beta: float, /) -> None:
        """Take any later gradient in."""

    def rebind_state(self, state: dict[str, Tensor], /) -> None:
        """Put the tensors back that are not changed in place."""


@cache
def _state_of(keys: tuple[str, ...], like: Any) -> Any:
    """A state with these parts; those that another state has too are what they are there."""
    known = parts_of(like)
    return NamedTuple("State", [(key, Annotated[Tensor, known.get(key, Part())]) for key in keys])


@dataclass(frozen=True, kw_only=True)
class PreconditionerRule(Rule):
    """A preconditioner of the user's, matrix by matrix, and a function of the gradient and its moments.

    Attributes:
        like: a state, whose parts those with the same name are.
        calls: the methods that the class has to have.
        cls: what is made around the state of a matrix.
        function: what makes an update of the gradient.
    """

    like: ClassVar[Any]
    calls: ClassVar[tuple[str, ...]] = ("init_state", "init_step", "step", "rebind_state")
    cls: type[Any]
    function: Callable[..., Tensor]

    def __post_init__(self) -> None:
        """Raise TypeError for a class without a method that a step calls."""
        if lacking := [name for name in self.calls if not callable(getattr(self.cls, name, None))]:
            raise TypeError(
                f"PreconditionerCls is {self.cls!r}, which has no {', '.join(lacking)}; give it these methods, "
                "or derive it from the preconditioner that was there"
            )

    def obstacle(self, where: Where) -> str | None:
        """The step count that the function is given."""
        if not where.capturable:
            return super().obstacle(where)
        return "a PreconditionerCls of one's own gets the step count as a number; leave capturable False"

    def before(self, shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
        """The state of one matrix before its first step."""
        state: dict[str, Tensor] = self.cls.init_state(shape, device)
        return state

    @abstractmethod
    def one(self, grad_MN: Tensor, state: dict[str, Tensor], t: Scalars, step: int) -> Tensor:
        """The update of one matrix; its state is changed in place, or other tensors are put into it."""

    def take_in(self, preconditioner: PreconditionerProtocol, grad_MN: Tensor, t: Scalars, step: int) -> None:
        """Give a gradient to the preconditioner, with a decay that makes the factors exact weighted means."""
        beta = 1 - (1 - t.shampoo_beta) / (1 - t.shampoo_beta**step)
        (preconditioner.init_step if step == 1 else preconditioner.step)(grad_MN, beta)

    def init(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
        """What each matrix begins with."""
        one = self.before(shape[1:], device)
        stacks = {key: x.to(dtype).repeat(shape[0], *(1 for _ in x.shape)) for key, x in one.items()}
        return _state_of(tuple(stacks), self.like)(**stacks)

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """One matrix after the other."""
        updates, states = [], []
        for i, (grad_MN, count) in enumerate(zip(grad, t.step.flatten(), strict=True)):
            one = {key: x[i].clone() for key, x in state._asdict().items()}
            updates.append(self.one(grad_MN, one, t, int(count)))
            states.append(one)
        new = {key: torch.stack([one[key] for one in states]) for key in states[0]}
        return Step(torch.stack(updates), type(state)(**new))
