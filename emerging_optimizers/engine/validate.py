"""Checks of what users pass, as data; every message names the argument, the value, what is allowed."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emerging_optimizers.engine.hooks import HOOKS, WeightUpdateHook, make_hook, plain_hook


class Check(NamedTuple):
    """A range: a predicate and the words for what it allows."""

    holds: Callable[[Any], bool]
    allowed: str


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


NON_NEGATIVE = Check(lambda v: _number(v) and 0 <= v < float("inf"), "a finite number >= 0")
POSITIVE = Check(lambda v: _number(v) and 0 < v < float("inf"), "a finite number > 0")
FRACTION = Check(lambda v: _number(v) and 0 <= v < 1, "a number in [0, 1)")
BETAS = Check(
    lambda v: isinstance(v, tuple) and len(v) == 2 and all(FRACTION.holds(b) for b in v),
    "two numbers in [0, 1)",
)
FLAG = Check(lambda v: isinstance(v, bool), "True or False")
COUNT = Check(lambda v: _integer(v) and v >= 1, "an integer >= 1")
WHOLE = SEED = Check(lambda v: _integer(v) and v >= 0, "an integer >= 0")
LEARNING_RATE = Check(
    # A tensor on an accelerator is not read: that would wait for the device.
    lambda v: (
        (v.numel() == 1 and (v.device.type != "cpu" or NON_NEGATIVE.holds(v.item())))
        if isinstance(v, Tensor)
        else NON_NEGATIVE.holds(v)
    ),
    "a finite number >= 0, or a tensor with one such element",
)


def _makes_hook(value: Any) -> bool:
    try:
        make_hook(value)
    except ValueError:
        return False
    return True


HOOK = Check(_makes_hook, f"None, a hook, its name ({', '.join(HOOKS)}) or (name, its arguments)")


def one_of(*values: Any) -> Check:
    """A choice among fixed values."""
    return Check(lambda v: v in values, "one of " + ", ".join(map(repr, values)))


def optional(check: Check) -> Check:
    """None, or what `check` allows."""
    return Check(lambda v: v is None or check.holds(v), f"None, or {check.allowed}")


def suggest(name: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' for a near miss, else ''."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_group(owner: str, where: str, group: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    """Raise ValueError for the first hyper-parameter of a group that is out of its range."""
    for name, check in checks.items():
        if not _holds(check, group[name]):
            raise ValueError(f"{owner}: {name}={group[name]!r} in {where} is not allowed; give {check.allowed}")


def _holds(check: Check, value: Any) -> bool:
    try:
        return check.holds(value)
    except (TypeError, ValueError):  # a value of a kind that it cannot even be compared with
        return False


def label(group: Mapping[str, Any], i: int, p: Tensor) -> str:
    """How messages name a parameter."""
    names = names_of(group)
    return f"parameter {names[i]!r} of shape {tuple(p.shape)}" if names else f"parameter {i} of shape {tuple(p.shape)}"


def place(group: Mapping[str, Any], index: int, i: int) -> str:
    """The name of parameter i of the group with this index, or where it stands."""
    names = names_of(group)
    return names[i] if names else f"param_groups[{index}]['params'][{i}]"


def names_of(group: Mapping[str, Any]) -> list[str] | None:
    """The names of a group's parameters; None where it has none, or other parameters than it had when it got them."""
    names = group.get("param_names")
    return list(names) if names and len(names) == len(group["params"]) else None


def plain_options(options: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The same, with these options as Python's own numbers, strings and tuples, which a checkpoint can hold."""
    return {**options, **{name: plain(name, options[name]) for name in names if name in options}}


def plain(name: str, value: Any) -> Any:
    """One option without numpy's and the configuration libraries' types; a learning rate may stay a tensor."""
    if type(value) in _PLAIN or (name == "lr" and isinstance(value, Tensor)):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, WeightUpdateHook):
        return plain_hook(value)
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value  # which is not read: that would wait for the device
    if hasattr(value, "tolist"):  # of torch or numpy: a number, or nested lists
        value = value.tolist()
    return tuple(plain("", x) for x in value) if isinstance(value, Sequence) else value


_PLAIN = {int, float, bool, str, type(None), torch.dtype}


def misspelled(name: str, known: Iterable[str]) -> str:
    """The option of which a name is a misspelling by one or two letters, or by their case; else ''."""
    if name in known:
        return ""
    # Two words of three letters have a good chance to be as close by accident.
    return next((x for x in known if _distance(name.lower(), x.lower()) <= min(2, len(x) // 3)), "")


def _distance(a: str, b: str) -> int:
    """How many letters have to be put in, left out, changed or swapped with their neighbour; 3: three or more."""
    if abs(len(a) - len(b)) > 2:
        return 3
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        before, last, row = row, before, [i + 1]
        for j, y in enumerate(b):
            cost = min(before[j] + (x != y), before[j + 1] + 1, row[j] + 1)
            if i and j and x == b[j - 1] and a[i - 1] == y:
                cost = min(cost, last[j - 1] + 1)
            row.append(cost)
    return min(3, row[-1])
