"""Hyper-parameters on their way into a rule."""

import sys
from collections import namedtuple
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor


def is_number(value: Any) -> bool:
    """Whether it is a real number that a float can be; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def debias(beta: Any, step: Any, like: Tensor) -> Any:
    """1 - beta^step, the share that an exponential average with `beta` has collected after `step` steps.

    Computed in float64 (in float32 it is off by 6e-5 for beta = 0.999 at the first step), returned in the dtype of
    `like`, or as a number if both are numbers.
    """
    share = 1 - beta**step
    if not isinstance(share, Tensor):
        return share
    share = share.to(like.dtype)
    # Asking for its strides makes inductor compute it once, not again for every element that it is used for.
    return share.as_strided((), ()) if torch.compiler.is_compiling() and not share.ndim else share


def lerp(old: Tensor, new: Tensor, share: Any) -> Tensor:
    """old + share (new - old), where the share is a number or a tensor of any floating dtype."""
    return torch.lerp(old, new, share_of(share, old))


def share_of(share: Any, old: Tensor) -> Any:
    """What `torch.lerp` takes for a share, a number or a tensor of any floating dtype."""
    if isinstance(share, Tensor):
        return share.to(old.dtype)
    # On a CPU torch has vector instructions for a weight that is a tensor only (2.13: 37 against 54 us for 128 K).
    return torch.full((), share, dtype=old.dtype, device="cpu") if old.device.type == "cpu" else share


def add_(x: Tensor, a: Tensor, value: Any) -> Tensor:
    """x + value a in the memory of `x`; the value is a number or a tensor of any floating dtype."""
    return x.add_(a * value) if isinstance(value, Tensor) else x.add_(a, alpha=value)


def addcmul_(x: Tensor, a: Tensor, b: Tensor, value: Any) -> Tensor:
    """x + value a b in the memory of `x`; the value is a number or a tensor of any floating dtype."""
    return x.add_(a * b * value) if isinstance(value, Tensor) else x.addcmul_(a, b, value=value)


def addcdiv_(x: Tensor, a: Tensor, b: Tensor, value: Any) -> Tensor:
    """x + value a / b in the memory of `x`; the value is a number or a tensor of any floating dtype."""
    return x.add_(a / b * value) if isinstance(value, Tensor) else x.addcdiv_(a, b, value=value)


@cache
def _record(names: tuple[str, ...]) -> Any:
    return namedtuple("Scalars", names)


# What the engine gives to a rule that reads it; every other name is an option.
GIVEN = frozenset(("step", "weight", "weight_dtype", "parameters", "l2"))


@cache
def _options(reads: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in reads if name not in GIVEN)


def make_scalars(reads: tuple[str, ...], group: Mapping[str, Any], extra: Mapping[str, Any]) -> Any:
    """A named tuple of the group's options in `reads` and `extra`; a pytree, which a compiled rule takes as input."""
    names = _options(reads)
    # A learning rate of shape (1,) would give its dtype to the stack; a 0-D one does not take part in promotion.
    values = (value.reshape(()) if isinstance(value := group[name], Tensor) else value for name in names)
    return _record((*names, *extra))(*values, *extra.values())


def as_tensors(scalars: Any, device: torch.device) -> Any:
    """The same record with every number as a 0-D float64 tensor, so that a new value does not recompile.

    0-D tensors do not take part in type promotion, so a float32 stack stays float32.
    """

    def convert(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(convert(v) for v in value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return torch.full((), value, dtype=torch.float64, device=device)
        return value

    return type(scalars)(*(convert(value) for value in scalars))
