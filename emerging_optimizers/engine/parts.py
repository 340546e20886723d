"""What the state of a rule says of itself: shapes, where it starts, what may be rounded, what it averages.

A state is a `NamedTuple` whose fields are annotated with a `Part`:

    class LionState(NamedTuple):
        exp_avg: Annotated[Tensor, Part(rounds=True, averages=Decay("betas", 1))]

From that follow the state before the first step, what `state_dtype` keeps in half the memory, and what a watch compares
with the newest gradient.
"""

from collections.abc import Collection, Mapping
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

StateT = TypeVar("StateT")


class Decay(NamedTuple):
    """The option of a group that says how fast an average of gradients forgets; None: it is their sum.

    Attributes:
        option: its name.
        place: in a tuple of them.
    """

    option: str | None = None
    place: int | None = None

    def weight(self, group: Mapping[str, Any]) -> Any:
        """With which weight the newest gradient entered the average."""
        if self.option is None:
            return 1.0
        value = group[self.option]
        return 1 - (value if self.place is None else value[self.place])


class Part(NamedTuple):
    """A field of a state.

    Attributes:
        axes: of the stack, by the letters of the gradient's, B M N, and numbers; S is the shorter of M and N. Empty:
            the gradient's own shape.
        start: the number that it starts with, or the identity of its last two axes.
        rounds: it may be kept in bfloat16 (`state_dtype`): an average over at most some hundred steps, whose increments
            that does not round away, or a basis that a refresh makes orthonormal again. Averages bear 8 bits, too.
        averages: it is an average of gradients that forgets like this; None: it is none, or one of something else.
        rotated: it stands in the eigenbases Q_L, Q_R.
        marks: a matrix for which it is zero has lost its state, and needs `Rule.start` again; the host acts on it in
            the next step.
    """

    axes: str = ""
    start: float | Literal["identity"] = 0.0
    rounds: bool = False
    averages: Decay | None = None
    rotated: bool = False
    marks: bool = False


# Parts that many states have.
Momentum_BMN = Annotated[Tensor, Part("B M N", rounds=True, averages=Decay("momentum"))]
FirstMoment = Annotated[Tensor, Part(rounds=True, averages=Decay("betas", 0))]
Like = Annotated[Tensor, Part()]
FactorL_BMM = Annotated[Tensor | None, Part("B M M")]
FactorR_BNN = Annotated[Tensor | None, Part("B N N")]
ValuesL_BM = Annotated[Tensor | None, Part("B M")]
ValuesR_BN = Annotated[Tensor | None, Part("B N")]
BasisL_BMM = Annotated[Tensor | None, Part("B M M", start="identity", rounds=True)]
BasisR_BNN = Annotated[Tensor | None, Part("B N N", start="identity", rounds=True)]


def parts_of(state: Any) -> Mapping[str, Part]:
    """The declared fields of a class of states."""
    return _declared(state)


@cache
def _declared(state: Any) -> Mapping[str, Part]:
    found: dict[str, Part] = {}
    for name, hint in get_type_hints(state, include_extras=True).items():
        for x in getattr(hint, "__metadata__", ()):
            if isinstance(x, Part):
                found[name] = x
    return found


def rounded_parts(state: Any, averages_alone: bool = False) -> list[str]:
    """Which fields of a state are there and may be rounded: to bfloat16; or averages, also to 8 bits."""
    there = [(name, part) for name, part in parts_of(type(state)).items() if getattr(state, name) is not None]
    return [name for name, part in there if part.rounds and not (averages_alone and part.start == "identity")]


def lost(state: Any) -> Tensor | None:
    """Which matrices have lost their state, as (B,) on the device; None: no part says so."""
    marks = [getattr(state, name) for name, part in parts_of(type(state)).items() if part.marks]
    return ~marks[0].flatten(1).any(dim=1) if marks else None


def before_first_step(
    state: type[StateT],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    without: Collection[str] = (),
    sizes: Mapping[str, int] = MappingProxyType({}),
) -> StateT:
    """The state of a stack of this shape as its parts say; None for those in `without`.

    `sizes` are those of axes with letters of their own.

    Example:
        >>> from typing import NamedTuple
        >>> class Moments(NamedTuple):
        ...     exp_avg: FirstMoment
        ...     L: FactorL_BMM
        >>> state = before_first_step(Moments, (3, 2, 5), torch.float32, torch.device("cpu"))
        >>> [tuple(x.shape) for x in state]
        [(3, 2, 5), (3, 2, 2)]
    """
    sizes = {**dict(zip("BMN", shape, strict=False)), **sizes}
    if len(shape) == 3:
        sizes["S"] = min(shape[1:])

    def make(part: Part) -> Tensor:
        size = tuple(sizes[a] if a in sizes else int(a) for a in part.axes.split()) or shape
        if part.start == "identity":
            return torch.eye(size[-1], dtype=dtype, device=device).repeat(*size[:-2], 1, 1)
        return torch.full(size, part.start, dtype=dtype, device=device)

    return state(*(None if name in without else make(part) for name, part in parts_of(state).items()))


def where_live(live: Tensor, new: Any, old: Any) -> Any:
    """The new state of a chunk where it is live, else the old one."""
    return type(old)(*(_where(live, x, y) for x, y in zip(new, old, strict=True)))


def _where(live: Tensor, new: Tensor | None, old: Tensor | None) -> Tensor | None:
    """The new rows of a stack where they are live; `live` has the gradient's rank, the stack may have another."""
    if new is None or old is None:
        return None
    return torch.where(
        live if live.ndim <= 1 and old.ndim <= 1 else live.reshape(-1, *(1 for _ in old.shape[1:])), new, old
    )
