r"""`match="adamw"`: what a tuned AdamW recipe is for another optimizer.

.. math::
    \eta = f \, \eta_{\mathrm{AdamW}}, \qquad \lambda = \lambda_{\mathrm{AdamW}} / f

so that :math:`\eta\lambda`, the part of a weight that a step takes away, stays what it was. f is measured for each
optimizer and kept in the registry (`Entry.match`); AdamW's own is 1. Where the RMS of an update depends on the shape of
the matrix, f is divided by it.
"""

import inspect
from collections.abc import Iterable, Mapping
from math import sqrt
from typing import Any

from torch import Tensor

from emerging_optimizers import registry
from emerging_optimizers.engine.matrix_view import blocks

# Options that change how long an update is, or what the decay is: f was measured with their defaults.
_MEASURED_WITH = (
    *("scale_mode", "extra_scale_factor", "spectral_radius", "norm", "p_root_inv"),
    *("max_update_rms", "weight_decay_method", "weight_update_hook"),
)


def check_match(match: Any, optimizers: Iterable[str]) -> None:
    """Raise ValueError for a recipe of another optimizer than AdamW, or an optimizer whose factor is not measured."""
    if not (isinstance(match, str) and match.lower() == "adamw"):
        raise ValueError(
            f"match={match!r} is not known; allowed are 'adamw', and None for rates of the optimizer's own"
        )
    measured = [name for name, known in registry.OPTIMIZERS.items() if known.match is not None]
    for optimizer in optimizers:
        if registry.entry(optimizer).match is None:
            raise ValueError(
                f"match={match!r}: what AdamW's learning rate is for {optimizer!r} has not been measured; it has for "
                f"{', '.join(measured)}. Take one of them, or leave match out and give the rates of {optimizer!r}"
            )


def check_measured_with(where: str, optimizer: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError where an option changes what the factor of an optimizer was measured with."""
    usual = inspect.signature(registry.entry(optimizer).load()).parameters
    for key in _MEASURED_WITH:
        default = usual[key].default if key in usual else None
        if options.get(key, default) != default:
            raise ValueError(
                f"{where}{key}={options[key]!r} is not possible with match='adamw', whose factor for {optimizer!r} is "
                f"measured with {default!r}; leave {key} out, or leave match out and give lr of {optimizer!r}"
            )


def factor(optimizer: str, p: Tensor, view: Any = "auto") -> float:
    """f, for a parameter that a matrix optimizer cuts as `view` says.

    Example:
        >>> import torch
        >>> factor("adamw", torch.empty(128, 32))
        1.0
        >>> factor("scion", torch.empty(128, 32)) / factor("scion", torch.empty(32, 32))
        1.0
        >>> factor("scion", torch.empty(32, 128)) / factor("scion", torch.empty(32, 32))
        4.0
    """
    known = registry.entry(optimizer)
    assert known.match is not None
    if known.rms is None or p.numel() == 0:
        return known.match
    items = [block.item for block in blocks(p, view=view)]
    sizes = [rows * columns for rows, columns in items]
    squares = (known.rms(*item) ** 2 * size for item, size in zip(items, sizes, strict=True))
    return known.match / sqrt(sum(squares) / sum(sizes))


def as_adamws(
    name: str, options: Mapping[str, Any], companion_options: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the optimizer `name` and of the companion, out of what was said of AdamW.

    Raises:
        ValueError: an option that changes what the factor was measured with.

    Example:
        >>> as_adamws("muon", {"momentum": 0.9, "betas": (0.9, 0.95)}, None)
        ({'weight_decay': 0.01, 'momentum': 0.9}, {'betas': (0.9, 0.95)})
    """
    check_measured_with("", name, options)
    adamw, main = (inspect.signature(registry.entry(n).load()).parameters for n in ("adamw", name))
    mine = {"weight_decay": adamw["weight_decay"].default, **options}
    shared = {"betas": mine["betas"]} if "betas" in mine else {}
    if "betas" not in main:
        mine.pop("betas", None)
    return mine, {**shared, **(companion_options or {})}
