"""Arguments of `torch.optim.AdamW`, `Muon` and `RMSprop`, in this library's words.

What is not said has torch's default, so that the optimizer does what torch's does: AdamW and RMSprop number for number,
Muon up to the rounding of its matrix products.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from emerging_optimizers import registry
from emerging_optimizers.engine import EngineOptions
from emerging_optimizers.engine.validate import suggest

# The coefficients that torch.optim.Muon has by default, here the set "simple" (Jordan et al. 2024).
_SIMPLE = (3.4445, -4.775, 2.0315)
# torch.optim.Muon: what multiplies the learning rate. Here a scale, and a factor on it.
_SCALES: Mapping[str, dict[str, Any]] = {
    "original": {"scale_mode": "shape_scaling", "extra_scale_factor": 1.0},
    "match_rms_adamw": {"scale_mode": "spectral", "extra_scale_factor": 0.2},
}
# The defaults of torch's classes that share their update with one of ours.
_DEFAULTS: Mapping[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},
    "muon": {
        "lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True, "ns_coefficients": _SIMPLE, "ns_steps": 5,
        "adjust_lr_fn": "original", "eps": 1e-7,
    },
    "rmsprop": {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0, "decoupled_weight_decay": False},
}  # fmt: skip


def from_torch(name: str, **torch_kwargs: Any) -> dict[str, Any]:
    """Options for the optimizer `name`, or for `create_optimizer(name, model, ...)`, from arguments of torch.optim.

    For "adamw", "muon" and "rmsprop" the result does what torch's class does with these arguments, and says all of
    torch's defaults. For another name the arguments are only translated, and its own defaults hold.

    ==========================  ========================================================================================
    argument                    here
    ==========================  ========================================================================================
    foreach, fused              left out: one multi-tensor call updates many parameters, whatever they say
    differentiable, amsgrad     False: left out; True is refused
    capturable, maximize        the same
    decoupled_weight_decay      `weight_decay_method`: "decoupled" or "l2"
    adjust_lr_fn                "original": `scale_mode="shape_scaling"`; "match_rms_adamw": "spectral" times 0.2
    ns_coefficients, ns_steps   `coefficient_type` "simple" or "custom"; `num_ns_steps`
    eps of Muon                 1e-7: left out, as Newton-Schulz here starts at any scale of the gradient; else refused
    momentum, centered          of RMSprop: 0 and False are left out; else refused
    all others                  the same, where the optimizer `name` has the argument; else refused
    ==========================  ========================================================================================

    With `adjust_lr_fn="original"` a model's other parameters need a rate of their own: `companion_lr`.

    Args:
        name: a name of `list_optimizers()`.
        **torch_kwargs: what torch's constructor takes, without `params`.

    Raises:
        TypeError: an argument that neither has.
        ValueError: a value that cannot be had here, or an unknown name.

    Example:
        >>> from_torch("muon", lr=0.02, ns_steps=6, adjust_lr_fn="match_rms_adamw")  # doctest: +NORMALIZE_WHITESPACE
        {'lr': 0.02, 'weight_decay': 0.1, 'momentum': 0.95, 'nesterov': True, 'coefficient_type': 'simple',
         'num_ns_steps': 6, 'scale_mode': 'spectral', 'extra_scale_factor': 0.2}
        >>> from_torch("lion", lr=1e-4, fused=True)
        {'lr': 0.0001}
    """
    known = _own(name)
    name = name.lower()
    where = f"from_torch({name!r})"
    given = {**_DEFAULTS.get(name, {}), **torch_kwargs}
    options: dict[str, Any] = {}
    for argument, value in given.items():
        translate = _translation(name, argument)
        if translate is not None:
            options |= translate(where, argument, value)
        elif argument in known:
            options[argument] = value
        else:
            torchs = {*_COMMON, *_OF.get(name, {})}
            raise TypeError(f"{where}: there is no argument {argument!r}{suggest(argument, known | torchs)}")
    return options


def without_torchs(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the optimizer `name` without those of torch.optim that mean nothing here, `fused=True` say.

    Raises:
        TypeError: an argument of torch's class that has another name here.
        ValueError: one that cannot be had here, `amsgrad=True` say.

    Example:
        >>> without_torchs("muon", {"lr": 0.02, "fused": True})
        {'lr': 0.02}
        >>> without_torchs("muon", {"ns_steps": 6})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        TypeError: create_optimizer('muon'): ns_steps=6 of torch.optim is num_ns_steps=6 here; give that, or ...
    """
    parameters = inspect.signature(registry.entry(name).load()).parameters.values()
    if any(p.kind is p.VAR_KEYWORD and not hasattr(p.annotation, "__args__") for p in parameters):
        return dict(options)  # a class of the user's that takes anything
    known, where = _own(name), f"create_optimizer({name!r})"
    kept = {}
    for argument, value in options.items():
        translate = _translation(name.lower(), argument)
        if argument in known or translate is None:
            kept[argument] = value
        elif meant := translate(where, argument, value):
            here = ", ".join(f"{key}={value!r}" for key, value in meant.items())
            raise TypeError(
                f"{where}: {argument}={value!r} of torch.optim is {here} here; give that, or "
                f"**from_torch({name!r}, ...), which takes torch's other defaults too"
            )
    return kept


def _own(name: str) -> set[str]:
    """The arguments of an optimizer."""
    parameters = inspect.signature(registry.entry(name).load()).parameters
    return {*parameters, *EngineOptions.__annotations__} - {"params", "engine", "options"}


_TranslationT = Callable[[str, str, Any], dict[str, Any]]


def _translation(name: str, argument: str) -> _TranslationT | None:
    return _OF.get(name, {}).get(argument) or _COMMON.get(argument)


def _ignored(where: str, argument: str, value: Any) -> dict[str, Any]:
    if value not in (None, True, False):
        raise ValueError(f"{where}: {argument}={value!r} is not one of None, True, False")
    return {}


def _only(allowed: Any, reason: str) -> _TranslationT:
    """Nothing where the value is the allowed one, else an error with the reason."""

    def translate(where: str, argument: str, value: Any) -> dict[str, Any]:
        if value != allowed:
            raise ValueError(
                f"{where}: {argument}={value!r} is not possible: {reason}; give {allowed!r} or leave it out"
            )
        return {}

    return translate


def _decay(where: str, argument: str, value: Any) -> dict[str, Any]:
    return {"weight_decay_method": "decoupled" if value else "l2"}


def _coefficients(where: str, argument: str, value: Any) -> dict[str, Any]:
    abc = tuple(float(x) for x in value)
    if len(abc) != 3:
        raise ValueError(f"{where}: {argument}={value!r} is not three numbers")
    if abc == _SIMPLE:
        return {"coefficient_type": "simple"}
    return {"coefficient_type": "custom", "custom_coefficient_sets": (abc,)}


def _scale(where: str, argument: str, value: Any) -> dict[str, Any]:
    scale = _SCALES.get("original" if value is None else value)
    if scale is None:
        raise ValueError(f"{where}: {argument}={value!r} is not one of None, {', '.join(map(repr, _SCALES))}")
    return dict(scale)


_COMMON: Mapping[str, _TranslationT] = {
    "foreach": _ignored,
    "fused": _ignored,
    "differentiable": _only(False, "a step is not recorded by autograd"),
    "amsgrad": _only(False, "no optimizer here keeps the largest second moment"),
    "decoupled_weight_decay": _decay,
}
_OF: Mapping[str, Mapping[str, _TranslationT]] = {
    "muon": {
        "ns_coefficients": _coefficients,
        "ns_steps": lambda where, argument, value: {"num_ns_steps": value},
        "adjust_lr_fn": _scale,
        "eps": _only(1e-7, "the norm is taken at the gradient's own scale, and nothing is added to it"),
    },
    "rmsprop": {
        "momentum": _only(0, "RMSProp here has no momentum; 'laprop' is RMSProp with one"),
        "centered": _only(False, "the second moment is not centred"),
    },
}
