"""Checks of what users pass, as data; every message names the argument, the value, what is allowed."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from emerging_optimizers.engine.hooks import WeightUpdateHook, plain_hook
from emerging_optimizers.engine.options import Check


def suggest(name: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' for a near miss, else ''."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_group(owner: str, where: str, group: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    """Raise ValueError for the first hyper-parameter of a group that is out of its range."""
    for name, check in checks.items():
        if not _holds(check, value := group[name]):
            if wrong := check.wrong(value):
                raise ValueError(f"{owner}: {name}={value!r} in {where} is not allowed: {wrong}")
            raise ValueError(f"{owner}: {name}={value!r} in {where} is not allowed; give {check.allowed}")


def _holds(check: Check, value: Any) -> bool:
    try:
        return check.holds(value)
    except (TypeError, ValueError):  # a value of a kind that it cannot even be compared with
        return False


def label(group: Mapping[str, Any], i: int, p: Tensor) -> str:
    """How messages name a parameter."""
    names = names_of(group)
    return f"parameter {names[i]!r} of shape {tuple(p.shape)}" if names else f"parameter {i} of shape {tuple(p.shape)}"


def label_of(groups: Iterable[Mapping[str, Any]], p: Tensor) -> str:
    """How messages name a parameter of some group."""
    for group in groups:
        for i, q in enumerate(group["params"]):
            if p is q:
                return label(group, i, p)
    return f"a parameter of shape {tuple(p.shape)}"


def checked_update(name: str, update: Any, like: Tensor) -> Tensor:
    """What a function of the user's has returned, in the dtype and if it is of the shape that it was given."""
    if isinstance(update, Tensor) and update.shape == like.shape:
        return update.to(like.dtype)
    found = f"a tensor of shape {tuple(update.shape)}" if isinstance(update, Tensor) else type(update).__name__
    raise TypeError(f"{name} has returned {found}; it has to return the update, a tensor of shape {tuple(like.shape)}")


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
