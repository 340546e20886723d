"""Names of optimizers, and what the table says of them. Importing it imports no optimizer."""

import difflib
import warnings
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from inspect import Parameter, signature
from typing import Any, Literal, TypeVar, overload

from emerging_optimizers.entries import ADAMS, OPTIMIZERS, Entry

__all__ = [
    "ADAMS",
    "OPTIMIZERS",
    "Entry",
    "caution",
    "entry",
    "get_configured_optimizer_cls",
    "get_optimizer_cls",
    "get_optimizer_name_list",
    "give_lr",
    "list_optimizers",
    "name_of",
    "register_optimizer",
    "validate_optimizer_args",
]

ClassT = TypeVar("ClassT", bound=type)


def entry(name: str) -> Entry:
    """The entry of a name, upper or lower case.

    Raises:
        ValueError: an unknown name; the message suggests the nearest.
    """
    found = OPTIMIZERS.get(name.lower())
    if found is None:
        close = difflib.get_close_matches(name.lower(), OPTIMIZERS, n=1)
        hint = f"did you mean {close[0]!r}? Known" if close else "known"
        raise ValueError(f"there is no optimizer {name!r}; {hint} are {', '.join(OPTIMIZERS)}")
    return found


def name_of(cls: type) -> str | None:
    """The first name of a class, or of the nearest one that it derives from; None: the table has none of them."""
    names = {known.path: name for name, known in reversed(OPTIMIZERS.items())}
    paths = (f"{base.__module__}:{base.__qualname__}" for base in cls.__mro__)
    return next((names[path] for path in paths if path in names), None)


def give_lr(cls: type) -> str:
    """In words what to do where a class needs a learning rate.

    Example:
        >>> give_lr(get_optimizer_cls("soap"))
        'give lr, 0.009 to start with (measured on a character GPT)'
    """
    name = name_of(cls)
    known = None if name is None else OPTIMIZERS[name]
    if known is None or known.start is None or signature(cls) != signature(known.load()):  # with others not measured
        return "give lr"
    return f"give lr, {known.start:g} to start with (measured on a character GPT)"


def caution(cls: type, lr: Any) -> None:
    """Warn, once in a process, that a class hardly trains at `lr`, its published default, see `Entry`."""
    known = next((known for known in _IDLE if known.path == f"{cls.__module__}:{cls.__qualname__}"), None)
    if known in _CAUTIONED or known is None or not isinstance(lr, float):
        return
    if lr == signature(cls).parameters["lr"].default:
        warnings.warn(
            f"{cls.__name__}: lr={lr:g}, its published default learning rate, moves weights too little to train on "
            f"most tasks; {give_lr(cls)}",
            UserWarning,
            stacklevel=2,
        )
        _CAUTIONED.add(known)


_IDLE = tuple(known for known in OPTIMIZERS.values() if not known.default_trains)
_CAUTIONED: set[Entry] = set()


@overload
def list_optimizers(pattern: str = ..., with_description: Literal[False] = ...) -> list[str]: ...
@overload
def list_optimizers(pattern: str, with_description: Literal[True]) -> list[tuple[str, str]]: ...
@overload
def list_optimizers(*, with_description: Literal[True]) -> list[tuple[str, str]]: ...
def list_optimizers(pattern: str = "*", with_description: bool = False) -> list[str] | list[tuple[str, str]]:
    """The names that match a shell-style pattern, sorted; with one line each if asked for.

    Example:
        >>> list_optimizers("*ao*")
        []
        >>> list_optimizers("rekls*")
        ['rekls', 'rekls_v3']
    """
    names = [name for name in sorted(OPTIMIZERS) if fnmatchcase(name, pattern.lower())]
    return [(name, OPTIMIZERS[name].description) for name in names] if with_description else names


def register_optimizer(name: str, start: float | None = None, unit: str = ADAMS) -> Callable[[ClassT], ClassT]:
    """Class decorator: `create_optimizer`, `list_optimizers` and the lab know the class by this name.

    A module that is executed again may register its classes again.

    Args:
        name: a new name; upper and lower case are the same.
        start: the learning rate to start from; None: the constructor's default.
        unit: what the learning rate is, see `Entry`; the companion follows one in Adam's unit.

    Raises:
        ValueError: another class has the name.

    Example:
        >>> from emerging_optimizers.scalar_optimizers.lion import Lion
        >>> @register_optimizer("tiger")
        ... class Tiger(Lion):
        ...     "Lion, with stripes."
        >>> list_optimizers("ti*", with_description=True)
        [('tiger', 'Lion, with stripes')]
        >>> _ = OPTIMIZERS.pop("tiger")
    """

    def register(cls: ClassT) -> ClassT:
        path = f"{cls.__module__}:{cls.__qualname__}"
        known = OPTIMIZERS.get(name.lower())
        if known is not None and known.path != path:
            raise ValueError(f"register_optimizer: {name!r} is {known.path} already; give {path} another name")
        OPTIMIZERS[name.lower()] = Entry(
            path=path,
            description=(cls.__doc__ or cls.__name__).strip().partition("\n")[0].rstrip("."),
            paper="",
            elementwise=bool(getattr(getattr(cls, "rule", None), "elementwise", False)),
            start=start,
            unit=unit,
            cls=cls,
        )
        return cls

    return register


def get_optimizer_name_list() -> list[str]:
    """All names, sorted."""
    return list_optimizers()


def get_optimizer_cls(name: str) -> Any:
    """The class of a name.

    Raises:
        ValueError: an unknown name; the message suggests the nearest.
    """
    return entry(name).load()


def validate_optimizer_args(opt_cls: type, kwargs: Mapping[str, Any]) -> None:
    """Raise TypeError for keyword arguments that a class does not have, the engine's included.

    Example:
        >>> validate_optimizer_args(get_optimizer_cls("muon"), {"momentun": 0.9})
        Traceback (most recent call last):
            ...
        TypeError: Muon has no argument 'momentun'; did you mean 'momentum'?
    """
    allowed: dict[str, None] = {}
    for known in signature(opt_cls).parameters.values():
        if known.kind is not Parameter.VAR_KEYWORD:
            allowed[known.name] = None
            continue
        options = getattr(known.annotation, "__args__", ())
        if not options:  # it takes anything
            return
        allowed |= dict.fromkeys(options[0].__annotations__)
    for name in kwargs:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(allowed)}"
            raise TypeError(f"{opt_cls.__name__} has no argument {name!r}; {hint}")


def get_configured_optimizer_cls(name: str, **kwargs: Any) -> Any:
    """The class of a name with arguments filled in: call it with the parameters.

    Raises:
        ValueError: an unknown name.
        TypeError: an argument that the class does not have.

    Example:
        >>> import torch
        >>> make = get_configured_optimizer_cls("lion", lr=1e-4)
        >>> make([torch.nn.Parameter(torch.zeros(3))]).param_groups[0]["lr"]
        0.0001
    """
    cls = get_optimizer_cls(name)
    validate_optimizer_args(cls, kwargs)
    return partial(cls, **kwargs)
