"""What `load_state_dict` adds to torch's: names decide, the state keeps its dtype, and a bad one changes nothing."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from emerging_optimizers.engine.validate import label, names_of

# From the name of a parameter to another; or from beginnings of names to other beginnings.
RenameT = Callable[[str], str] | Mapping[str, str]

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


def plain_names(group: Mapping[str, Any]) -> list[str] | None:
    """`plain_name` of a group's parameters; None: it has none."""
    names = names_of(group)
    return None if names is None else [*map(plain_name, names)]


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
    here, there = ([plain_names(group) for group in side if group["params"]] for side in (groups, saved))
    if not (_are_unique(here) and _are_unique(there)):
        return {**state_dict}
    place = {name: (k, i) for k, group in enumerate(saved) for i, name in enumerate(plain_names(group) or ())}
    wanted = {name: k for k, group in enumerate(groups) for name in plain_names(group) or ()}
    lines = [f"{name}: absent in the checkpoint" for name in wanted if name not in place]
    lines += [f"{name}: absent here" for name in place if name not in wanted]
    if lines:
        raise ValueError(
            f"{owner}: the parameters of the checkpoint are others than this optimizer's:\n  " + "\n  ".join(lines)
        )
    empty = iter([group for group in saved if not group["params"]])
    found = []
    for k, group in enumerate(groups):
        names = plain_names(group) or []
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
