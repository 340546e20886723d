r"""The state of another library's optimizer, in the layout of one of ours, so that training goes on with its moments.

What other optimizers keep is what ours keep, under other keys:

===================  ============================  ====================================================================
source               what it keeps                 here
===================  ============================  ====================================================================
torch.adamw          step, exp_avg, exp_avg_sq     the same
torch.muon           momentum_buffer, an average   the same
keller-jordan        both of these, by `use_muon`  the same
nikhilvyas-soap      Adam's, lists GG and Q        L, R = GG and Q_L, Q_R = Q; moments in the eigenbasis
heavyball            both, averages debiased       each average times 1 - beta**t, which it had been divided by
published            as here, or nearly            as it is: `load_state_dict` translates it by itself
===================  ============================  ====================================================================

An average of gradients, :math:`M_t = \mu M_{t-1} + (1 - \mu) G_t`, is one under any name: AdamW's first moment becomes
Muon's momentum, and its second moment is dropped.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from emerging_optimizers.engine import RuleOptimizer
from emerging_optimizers.engine.checkpoint import check_format
from emerging_optimizers.engine.parts import parts_of
from emerging_optimizers.engine.rule import Rule
from emerging_optimizers.engine.validate import label, suggest
from emerging_optimizers.linalg.kronecker import project_in
from emerging_optimizers.routing.torch_arguments import from_torch

# Entries that say nothing of the past of a parameter.
_SETTINGS = {"precondition_frequency", "shampoo_beta"}

# Options of a source that nothing here has, and those that SOAP has under the same name.
_IMPOSSIBLE = {
    "nikhilvyas-soap": ("normalize_grads", "precondition_1d"),
    "heavyball": ("caution", "cautious_weight_decay"),
}
_OF_SOAP = {
    "nikhilvyas-soap": {"shampoo_beta", "precondition_frequency", "max_precond_dim", "correct_bias"},
    "heavyball": {"shampoo_beta"},
}

# What heavyball 3 calls an entry, "scale_by_soap_exp_avg_sq_2": a function of its chain, what it keeps, a number.
_HEAVYBALL = re.compile(r"(?P<function>[a-z_0-9]+?)_(?P<key>exp_avg_sq|exp_avg|GG|Q)_\d+")


def convert_state_dict(
    state_dict: Mapping[str, Any],
    optimizer: RuleOptimizer,
    params: Iterable[Any] | None = None,
    *,
    source: str | None = None,
) -> dict[str, Any]:
    """A checkpoint for `optimizer.load_state_dict` that has the state of another library's optimizer.

    Only the state of parameters comes from there. Options of the groups (`lr`, ...) are those of `optimizer`, for
    which `from_torch` translates arguments of torch's classes.

    Args:
        state_dict: what the `state_dict()` of the other optimizer was.
        optimizer: one of this library, or of `create_optimizer`, for the same parameters. It is not changed.
        params: what the other optimizer was made with: parameters, pairs of a name and a parameter, or groups of them,
            in its order. By default the parameters of `optimizer` in the order of its groups, which is another than
            the model's where it has several.
        source: one of `SOURCES`; by default it is recognised.

    Raises:
        TypeError: an optimizer that is not of this library.
        ValueError: an unknown or ambiguous source, parameters that do not correspond, or state out of which that of
            `optimizer` cannot be made; the message names the entry.

    Warns:
        UserWarning: entries that were dropped, and parameters that had no state and start anew.

    Example:
        >>> from emerging_optimizers import AdamW
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> old = torch.optim.AdamW([w], lr=0.1)
        >>> w.grad = torch.ones(2)
        >>> old.step()
        >>> new = AdamW([w], lr=0.1)
        >>> new.load_state_dict(convert_state_dict(old.state_dict(), new))
        >>> new.state[w]["exp_avg"]
        tensor([0.1000, 0.1000])
    """
    if not isinstance(optimizer, RuleOptimizer):
        raise TypeError(
            f"optimizer: {type(optimizer).__name__} is not an optimizer of emerging_optimizers; give one, or what "
            "create_optimizer returns"
        )
    check_format(state_dict)
    source = recognised(state_dict) if source is None else _known(source)
    places = {p: (group, i) for group in optimizer.param_groups for i, p in enumerate(group["params"])}
    order = {p: k for k, p in enumerate(places)}
    olds = [*places] if params is None else [*_flat(params)]
    groups = [(saved, i) for saved in state_dict["param_groups"] for i in saved["params"]]
    if len(olds) != len(groups):
        raise ValueError(
            f"params: {len(olds)} parameters are given, and the checkpoint has {len(groups)}; give params= what the "
            "other optimizer was made with, in its order"
        )
    state: dict[int, Any] = {}
    dropped: set[str] = set()
    anew: list[str] = []
    for p, (saved, i) in zip(olds, groups, strict=True):
        entries = state_dict["state"].get(i)
        if p not in places:
            dropped |= {f"parameter {i}, which the new optimizer does not have"} if entries else set()
            continue
        group, k = places[p]
        name = label(group, k, p)
        if not entries:
            anew.append(name)
            continue
        read = read_entries(entries, saved, source, name)
        rule = optimizer._make_rule(group)
        state[order[p]] = read if source == "published" else _fitted(read, rule, p, name, dropped)
    for what, some in (("dropped", sorted(dropped)), ("no state for, so that these start anew:", anew)):
        if some:
            warnings.warn(f"convert_state_dict: {what} {'; '.join(some)}", UserWarning, stacklevel=2)
    return {**optimizer.state_dict(), "state": state, "events": {}}


def recognised(state_dict: Mapping[str, Any]) -> str:
    """Which of `SOURCES` wrote a checkpoint.

    Raises:
        ValueError: none of them, or several could have.
    """
    check_format(state_dict)
    groups = state_dict["param_groups"]
    options = set(chain.from_iterable(groups))
    entries = set(chain.from_iterable(x for x in state_dict["state"].values() if isinstance(x, Mapping)))
    if "heavyball" not in state_dict and "is_preconditioning" in options:
        raise ValueError(
            "the checkpoint is of heavyball before 2, which is not converted; start the new optimizer anew, or finish "
            "the run with heavyball"
        )
    tests = {
        "heavyball": "heavyball" in state_dict,
        "keller-jordan": "use_muon" in options,
        "nikhilvyas-soap": "GG" in entries,
        "torch.muon": "ns_coefficients" in options,
        "torch.adamw": {"amsgrad", "betas"} <= options,
    }
    found = next((name for name, holds in tests.items() if holds), None)
    if found is not None:
        return found
    if "dampening" in options or not entries:
        what = "torch.optim.SGD, whose momentum_buffer is a sum and no average" if entries else "no state"
        raise ValueError(f"the checkpoint has {what}; give one of {', '.join(SOURCES)}")
    if entries == {"momentum_buffer"} and options <= {"params", "lr", "initial_lr", "weight_decay", "momentum"}:
        raise ValueError(
            "the checkpoint could be keller-jordan's Muon or a published one of momentum; say source= (--from) which"
        )
    return "published"


def read_entries(entries: Any, saved: Mapping[str, Any], source: str, name: str) -> dict[str, Any]:
    """What `source` keeps of a parameter, under the names of this library; `saved` is its group.

    Raises:
        ValueError: entries that are damaged, or that nothing here can keep.
    """
    if not isinstance(entries, Mapping):
        raise ValueError(f"the state of {name} is {type(entries).__name__} in the checkpoint, no dict; it is damaged")
    return _READERS[source](entries, saved, name)


def options_of(saved: Mapping[str, Any], source: str, name: str) -> dict[str, Any]:
    """The options of a group of a checkpoint for the optimizer `name`; what is not said has that one's default.

    Raises:
        ValueError, TypeError: an option that cannot be had here.
    """
    told = {key: value for key, value in saved.items() if key not in ("params", "initial_lr", "param_names")}
    if source in ("torch.adamw", "torch.muon"):
        if name == source.removeprefix("torch."):
            return from_torch(name, **told)
        return {key: told[key] for key in ("weight_decay", "maximize") if key in told}
    if source == "keller-jordan" and told.pop("use_muon", True) and name == "muon":
        told |= {"nesterov": True, "scale_mode": "shape_scaling", "coefficient_type": "simple"}
    for key in _IMPOSSIBLE.get(source, ()):
        if told.get(key):
            raise ValueError(f"{key}=True of the checkpoint's groups is not possible here")
    same = {"lr", "weight_decay", "momentum", "betas", "eps", "nesterov", "scale_mode", "coefficient_type"}
    if name != "adamw":
        same |= _OF_SOAP.get(source, set())
    return told if source == "published" else {key: told[key] for key in same & told.keys()}


def _known(source: str) -> str:
    if source not in SOURCES:
        raise ValueError(
            f"source={source!r} is not one of {', '.join(SOURCES)}{suggest(source, SOURCES)}; leave it out to have "
            "it recognised"
        )
    return source


def _flat(params: Iterable[Any]) -> Iterable[Tensor]:
    for x in params:
        if isinstance(x, Mapping):
            yield from _flat(x["params"] if not isinstance(x["params"], Tensor) else [x["params"]])
        elif isinstance(x, tuple) and len(x) == 2:
            yield x[1]
        else:
            yield x


def _moments(entries: Mapping[str, Any], saved: Mapping[str, Any], name: str) -> dict[str, Any]:
    if "max_exp_avg_sq" in entries:
        raise ValueError(f"max_exp_avg_sq of {name}: no optimizer here keeps the largest second moment (amsgrad=True)")
    return {**entries}


def _soap(entries: Mapping[str, Any], saved: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Lists of factors and bases under a name for each side; a side without has an empty list."""
    read = {key: value for key, value in entries.items() if key not in {"GG", "Q", *_SETTINGS}}
    factors, bases = entries.get("GG") or (), entries.get("Q") or ()
    if len(factors) > 2:
        raise ValueError(f"GG of {name} has {len(factors)} factors, and matrices here have two; it cannot be converted")
    if len(factors) < 2:
        if any(isinstance(x, Tensor) for x in factors):
            raise ValueError(f"GG of {name} has the factor of a vector (precondition_1d), which nothing here keeps")
        return read
    if len(bases) != 2:
        raise ValueError(f"Q of {name} has {len(bases)} bases, and GG has 2 factors; the entry is damaged")
    for side, factor, basis in zip("LR", factors, bases, strict=True):
        if isinstance(factor, Tensor):
            read |= {side: factor, f"Q_{side}": basis}
    if "warmup_steps" in saved:  # that version keeps the first moment in the parameter's own space
        read["exp_avg"] = project_in(read["exp_avg"], read.get("Q_L"), read.get("Q_R"))
    return read


def _heavyball(entries: Mapping[Any, Any], saved: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The averages of its AdamW and SOAP, which it keeps divided by one minus the decay to the number of steps.

    SOAP's first gradient is for the factors alone, so its moments are a step behind.
    """
    if "step_count" not in saved:
        raise ValueError(f"{name} is of heavyball 2, which is not converted; heavyball 3 is")
    for key in ("ecc", "mars", "palm"):
        if saved.get(key):
            raise ValueError(f"{key}={saved[key]!r} of heavyball: the state of {name} is not an average of gradients")
    if len(entries) != 1 or not isinstance(entries.get(0), Mapping):
        raise ValueError(f"heavyball keeps {name} in {len(entries)} pieces, which are not converted")
    found: dict[str, Any] = {}
    functions = set[str]()
    for key, value in entries[0].items():
        if key in ("step", "is_initialized"):
            continue
        parts = _HEAVYBALL.fullmatch(key)
        functions.add(parts["function"] if parts else key)
        found |= {parts["key"]: value} if parts else {}
    if functions not in ({"update_by_adam"}, {"scale_by_soap"}):
        raise ValueError(
            f"the state of {name} is of heavyball's {', '.join(sorted(functions)) or 'nothing'}; only that of its "
            "AdamW (update_by_adam) and SOAP (scale_by_soap) is converted"
        )
    count = int(saved["step_count"])
    if functions == {"update_by_adam"}:
        return {"step": count, **_biased(found, saved["betas"], count)}
    lists = {key: [x if x is None else x[0] for x in found.get(key, ())] for key in ("GG", "Q")}
    whole = 1 - saved["shampoo_beta"] ** count
    lists["GG"] = [x if x is None else whole * x for x in lists["GG"]]
    moments = {key: x[0] for key, x in _biased(found, saved["betas"], count - 1).items()}
    return _soap({"step": count - 1, **moments, **lists}, {}, name)


def _biased(found: Mapping[str, Any], betas: Iterable[float], count: int) -> dict[str, Any]:
    """Averages as they stand in a state that starts at zero."""
    pairs = zip(("exp_avg", "exp_avg_sq"), betas, strict=True)
    return {key: found[key] * (1 - beta**count) for key, beta in pairs if key in found}


_READERS: Mapping[str, Callable[[Mapping[Any, Any], Mapping[str, Any], str], dict[str, Any]]] = {
    "torch.adamw": _moments,
    "torch.muon": _moments,
    "keller-jordan": _moments,
    "nikhilvyas-soap": _soap,
    "heavyball": _heavyball,
    "published": _moments,
}
SOURCES = tuple(_READERS)


def _fitted(read: dict[str, Any], rule: Rule, p: Tensor, name: str, dropped: set[str]) -> dict[str, Any]:
    """The entries that a rule keeps; an average of gradients may have another name.

    Raises:
        ValueError: an entry is lacking, or has another shape than its parameter.
    """
    for key in {"exp_avg", "exp_avg_sq", "momentum_buffer"} & read.keys():
        if not isinstance(read[key], Tensor) or read[key].shape != p.shape:
            found = tuple(read[key].shape) if isinstance(read[key], Tensor) else read[key]
            raise ValueError(
                f"{key} of {name} has shape {found} in the checkpoint; give params= what the other optimizer was made "
                "with, in its order (MuonWithAuxAdam sorts those of Muon by shape)"
            )
    parts = parts_of(rule.State)
    wanted = {key for key, part in parts.items() if key in _kept(rule, p)}
    wanted |= {"step"} if "step" in rule.reads else set()
    in_basis = {"Q_L", "Q_R"} & read.keys()
    if in_basis and not any(part.rotated for part in parts.values()):
        raise ValueError(f"exp_avg of {name} stands in the eigenbases Q; give an optimizer of SOAP's family")
    averages = [key for key in ("exp_avg", "momentum_buffer") if key in read]
    for key in wanted - read.keys():
        part = parts.get(key)
        if averages and part and part.averages and part.averages.option and not part.rotated:
            read[key] = read[averages[0]]
    if missing := wanted - read.keys():
        raise ValueError(
            f"{', '.join(sorted(missing))} of {name}: the checkpoint has only {', '.join(sorted(read))}, and "
            f"{type(rule).__name__.removesuffix('Rule')} cannot go on from that; start that parameter anew, or give "
            "the optimizer that wrote it"
        )
    unused = {key for key in read.keys() - wanted if not any(read[key] is read[other] for other in wanted)}
    dropped |= {f"{key} of {name}" for key in unused - ({"step"} - wanted)}
    return {key: read[key] for key in wanted}


def _kept(rule: Rule, p: Tensor) -> set[str]:
    """The fields of the state that are there for a parameter."""
    shape = tuple(p.shape)
    if not rule.elementwise:
        shape = (1, *shape) if len(shape) == 2 else shape if len(shape) == 3 else (1, shape[0], p[0].numel())
    state = rule.init(shape, torch.float32, torch.device("meta"))
    return {key for key, value in state._asdict().items() if value is not None}
