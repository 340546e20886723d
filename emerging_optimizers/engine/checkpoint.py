"""What `load_state_dict` adds to torch's: names decide, the state keeps its dtype, and a bad one changes nothing."""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from emerging_optimizers.distributed.layout import Asked, Layout
from emerging_optimizers.engine.buckets import Bucket
from emerging_optimizers.engine.filling import fill_buckets, keys_of, needs
from emerging_optimizers.engine.hooks import WeightUpdateHookT
from emerging_optimizers.engine.kept import KEYS
from emerging_optimizers.engine.packing import others_than
from emerging_optimizers.engine.placing import Places
from emerging_optimizers.engine.rule import translated, without_data
from emerging_optimizers.engine.validate import check_group, label, names_of, plain_options

# From the name of a parameter to another; or from beginnings of names to other beginnings.
RenameT = Callable[[str], str] | Mapping[str, str]

# Entries of a group with a value for each parameter.
_LISTS = {"param_names", "reasons"}

# What the engine may keep of a parameter beside the parts of its rule's state.
OWN_KEYS = ("step", "guard_norm", "guard_weight", *KEYS)

# Written into every state_dict under "format"; raised when the layout of the state changes.
FORMAT = 1

# What wrappers put into the names of parameters: torch.compile, activation checkpointing, FSDP, DeepSpeed, Lightning;
# and the name of a tensor that a parametrization of one original keeps.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module|_module)\."
)
_PARAMETRIZED = re.compile(r"(?:(?<=\.)|^)parametrizations\.(\w+)\.original$")


def plain_name(name: str) -> str:
    """The name of a parameter or a module, without what wrappers put into it."""
    name = _WRAPPERS.sub("", name).removeprefix("module.")  # DistributedDataParallel's
    return _PARAMETRIZED.sub(r"\1", name)


def renamed(state_dict: dict[str, Any], rename: RenameT | None) -> dict[str, Any]:
    """A checkpoint in which every parameter has the name that `rename` gives it.

    Raises:
        ValueError: its parameters have no names.
    """
    if rename is None:
        return state_dict
    give = _replacing(rename) if isinstance(rename, Mapping) else rename
    groups = []
    for group in state_dict["param_groups"]:
        names = names_of(group)
        if names is None and group["params"]:
            raise ValueError("rename: the parameters of this checkpoint have no names; leave rename out")
        groups.append({**group, "param_names": [*map(give, names or ())]})
    return {**state_dict, "param_groups": groups}


def _replacing(beginnings: Mapping[str, str]) -> Callable[[str], str]:
    def give(name: str) -> str:
        found = max((old for old in beginnings if name.startswith(old)), key=len, default=None)
        return name if found is None else beginnings[found] + name.removeprefix(found)

    return give


def plain_names(group: Mapping[str, Any], form: Callable[[str], str] = plain_name) -> list[str] | None:
    """`plain_name` of a group's parameters, or another form of their names; None: it has none."""
    names = names_of(group)
    return None if names is None else [*map(form, names)]


def check_format(state_dict: Mapping[str, Any]) -> None:
    """Refuse what is no checkpoint, and one of a later layout. One without "format" is torch's or a published one."""
    for key, kind in (("state", Mapping), ("param_groups", Sequence)):
        if not isinstance(state_dict.get(key), kind):
            raise ValueError(
                f"this is no state_dict of an optimizer: {key!r} is {type(state_dict.get(key)).__name__!r}; its keys "
                f"are {', '.join(map(repr, state_dict))}"
            )
    for index, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), Sequence):
            raise ValueError(f"param_groups[{index}] of the checkpoint has no list 'params'; it is damaged")
    found = state_dict.get("format", FORMAT)
    if found > FORMAT:
        raise ValueError(
            f"this checkpoint has format {found}, this version of emerging_optimizers reads up to {FORMAT}; "
            "upgrade emerging_optimizers"
        )


def arranged(owner: str, groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint with its groups, and the parameters in them, in the order of `groups`, by their names.

    As it is where one of the sides lacks names.

    Raises:
        ValueError: the names are not the same, or groups hold others; it lists the difference.
    """
    saved = state_dict["param_groups"]
    for form in (plain_name, str):  # a model may have both `a` and `module.a`
        here, there = ([plain_names(group, form) for group in side if group["params"]] for side in (groups, saved))
        if _are_unique(here) and _are_unique(there):
            break
    else:
        return {**state_dict}
    place = {name: (k, i) for k, group in enumerate(saved) for i, name in enumerate(plain_names(group, form) or ())}
    wanted = {name: k for k, group in enumerate(groups) for name in plain_names(group, form) or ()}
    lines = [f"{name}: absent in the checkpoint" for name in wanted if name not in place]
    lines += [f"{name}: absent here" for name in place if name not in wanted]
    if lines:
        raise ValueError(
            f"{owner}: the parameters of the checkpoint are others than this optimizer's:\n  " + "\n  ".join(lines)
        )
    empty = iter([group for group in saved if not group["params"]])
    found = []
    for k, group in enumerate(groups):
        names = plain_names(group, form) or []
        sources = {place[name][0] for name in names}
        if not names:
            source = next(empty, None)
        else:
            source = saved[sources.pop()] if len(sources) == 1 else None
        if source is None or len(source["params"]) != len(group["params"]):
            raise ValueError(
                f"{owner}: param_groups[{k}] holds {', '.join(names) or 'no parameter'}, and no group of the "
                "checkpoint holds the same; make the groups as in the run that wrote it"
            )
        order = [place[name][1] for name in names]
        found.append({**source, "params": [source["params"][i] for i in order], **_named(source, order)})
    return {**state_dict, "param_groups": found}


def _named(group: Mapping[str, Any], order: Sequence[int]) -> dict[str, list[str]]:
    return {"param_names": [group["param_names"][i] for i in order]} if "param_names" in group else {}


def _are_unique(names: Sequence[list[str] | None]) -> bool:
    everyone = [name for group in names for name in group or ()]
    return None not in names and len(set(everyone)) == len(everyone) > 0


def state_by_parameter(
    owner: str, groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]
) -> dict[Tensor, dict[str, Any]] | None:
    """The saved state of each parameter, in the order of the groups; None if the groups do not correspond.

    Raises:
        ValueError: what is saved for a parameter is no dictionary.
    """
    saved = [group["params"] for group in state_dict["param_groups"]]
    if [len(ids) for ids in saved] != [len(group["params"]) for group in groups]:
        return None
    state, found = state_dict["state"], {}
    for ids, group in zip(saved, groups, strict=True):
        for i, (saved_id, p) in enumerate(zip(ids, group["params"], strict=True)):
            if saved_id not in state:
                continue
            if not isinstance(state[saved_id], Mapping):
                raise ValueError(
                    f"{owner}: the checkpoint holds {state[saved_id]!r} for {label(group, i, p)}; its state is a "
                    "dictionary of tensors"
                )
            if state[saved_id]:
                found[p] = dict(state[saved_id])
    return found


def packed(state_dict: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """A checkpoint of torch's, with what is ours beside it.

    Names stand beside the groups, and reasons nowhere: a flattened one repeats what is in a group for each of its
    parameters, and would grow with their square. The keys stay, since torch looks for those that groups have here.
    """
    names = [group.get("param_names") for group in state_dict["param_groups"]]
    for group in state_dict["param_groups"]:
        group.update(dict.fromkeys(_LISTS & group.keys()))
        hook = group["weight_update_hook"]
        if not (hook is None or isinstance(hook, (str, tuple))):  # code, which whoever resumes brings along
            del group["weight_update_hook"]
    places: Places = optimizer._places
    order = {p: i for i, p in enumerate(chain.from_iterable(group["params"] for group in optimizer.param_groups))}
    known = (p for p in order if p in places.homes or p in places.events)
    events = {order[p]: places.events_of(p).tolist() for p in known}
    return {
        **state_dict,
        "format": FORMAT,
        "names": names,
        "events": {i: counts for i, counts in events.items() if any(counts)},
        "others": sorted(_others(optimizer), key=str),
    }


def _others(optimizer: Any) -> set[Any]:
    """The keys of entries that somebody keeps beside those of the optimizer."""
    places: Places = optimizer._places
    states, found = optimizer.state, set[Any]()
    for group in optimizer.param_groups:
        kept = {p: states[p] for p in group["params"] if p in states and isinstance(states[p], dict) and states[p]}
        for p in kept.keys() & places.homes.keys():
            found |= others_than(kept.pop(p), places.views(p))
        if kept:  # before their first step
            rule = optimizer._make_rule(group)
            own = {*OWN_KEYS, *without_data(rule)._fields}
            for state in kept.values():
                found |= others_than(translated(rule, state), own)
    return found


def _with_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint with the names of parameters in its groups, where torch has them."""
    saved = [
        {k: x for k, x in group.items() if x is not None or k not in _LISTS} for group in state_dict["param_groups"]
    ]
    names = state_dict.get("names")
    if names is not None and len(names) == len(saved):
        saved = [g if n is None else {"param_names": n, **g} for g, n in zip(saved, names, strict=True)]
    return {**state_dict, "param_groups": saved}


class Loading:
    """One checkpoint on its way into an optimizer: all of it is made first, and then installed."""

    def __init__(self, optimizer: Any, rename: RenameT | None) -> None:
        self._optimizer, self._rename = optimizer, rename  # a `RuleOptimizer`, which imports this module
        self._staged: dict[int, list[Bucket]] = {}
        self._hooks: list[WeightUpdateHookT] = []
        self._entries: dict[Any, Any] = {}
        self._events: dict[Tensor, Tensor] = {}

    def stage(self, _: Any, incoming: dict[str, Any]) -> dict[str, Any]:
        """The checkpoint as torch is to take it, without state; raises ValueError before anything has changed."""
        optimizer = self._optimizer
        mine, name = optimizer.param_groups, type(optimizer).__name__
        check_format(incoming)
        incoming = optimizer._as_here(renamed(_with_names(incoming), self._rename))
        optimizer._check_route(incoming["param_groups"])
        incoming = arranged(name, mine, incoming)
        saved = state_by_parameter(name, mine, incoming)
        if saved is None:  # torch says what does not correspond
            return incoming
        # What an older or a published checkpoint does not say, and what is code, stays as it is here.
        pairs = list(zip(mine, incoming["param_groups"], strict=True))
        groups = [_completed(i, here, theirs, optimizer._algorithm(here)) for i, (here, theirs) in enumerate(pairs)]
        self._hooks.extend(theirs.get("weight_update_hook", here["weight_update_hook"]) for here, theirs in pairs)
        others = set(incoming.get("others", ()))
        layout: Layout = optimizer._places.layout
        asked = []
        for here, theirs in zip(mine, groups, strict=True):
            group = {**theirs, "params": here["params"]}
            members = [p for p in here["params"] if p in saved]
            asked.append(layout.ask(members, group, needs(optimizer._make_rule(group), group)))
        layout.settle(asked)
        for index, some in enumerate(asked):
            self._fill(index, some, saved, others)
        ids = dict(zip(chain.from_iterable(g["params"] for g in incoming["param_groups"]),
                       chain.from_iterable(g["params"] for g in mine), strict=True))  # fmt: skip
        self._entries.update({key: deepcopy(x) for key, x in incoming["state"].items() if key not in ids})
        counts = incoming.get("events", {})
        self._events.update({ids[i]: torch.tensor(x, device="cpu") for i, x in counts.items() if i in ids})
        return {**incoming, "state": {}, "param_groups": groups}

    def _fill(self, index: int, asked: Asked, saved: Mapping[Tensor, Any], others: set[str]) -> None:
        """The stacks of a group, and what the checkpoint has beside them."""
        optimizer = self._optimizer
        rule = optimizer._make_rule(asked.group)
        layout: Layout = optimizer._places.layout
        found = layout.collected(asked, {p: saved[p] for p in asked.parameters})
        states = {p: translated(rule, found[p]) for p in asked.parameters}
        self._staged[index] = fill_buckets(asked, rule, states, layout, others)
        keys = keys_of(self._staged[index])
        for p in asked.parameters:
            left = others_than(states[p], keys[p]) - {*KEYS}
            self._entries[p] = {key: _copy_to(states[p][key], p.device) for key in left}

    def install(self, _: Any) -> None:
        """Put everything in its place."""
        optimizer = self._optimizer
        optimizer._forget_stacks()
        optimizer.state.clear()
        optimizer.state.update(self._entries)
        for group, hook in zip(optimizer.param_groups, self._hooks, strict=True):
            group["weight_update_hook"] = hook  # itself; torch has copied it
        places: Places = optimizer._places
        places.events = {}
        places.replace((), self._staged, optimizer._wanted(), optimizer.state)
        places.events = self._events


def _completed(index: int, mine: Mapping[str, Any], theirs: Mapping[str, Any], algorithm: Any) -> dict[str, Any]:
    """A group of a checkpoint, completed by the one that is here; it is checked like that."""
    owner, ranges, fixed = algorithm.__name__, algorithm.ranges, algorithm.fixed
    own = {key: mine[key] for key in _LISTS if key in mine}
    for name in theirs.keys() & fixed.keys():  # written when it was an option
        if theirs[name] != fixed[name]:
            raise ValueError(
                f"{owner}: the checkpoint's param_groups[{index}] has {name}={theirs[name]!r}, and it is "
                f"{fixed[name]!r} for this optimizer"
            )
    theirs = {name: value for name, value in theirs.items() if name not in fixed}
    group = plain_options({**mine, **theirs, **own, "params": theirs["params"]}, ranges)
    check_group(owner, f"the checkpoint's param_groups[{index}]", group, ranges)
    algorithm._check_choice(group)
    return group


def _copy_to(x: Any, device: torch.device) -> Any:
    return x.to(device, copy=True) if isinstance(x, Tensor) else deepcopy(x)
