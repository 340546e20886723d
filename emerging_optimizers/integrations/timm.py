"""timm's call `create_optimizer_v2`, with the optimizers of this library. timm is imported for `layer_decay` alone.

timm's registry hands an optimizer groups of parameters without their names, so that nothing could be routed; hence a
function of the same form, and no entry there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from emerging_optimizers import registry
from emerging_optimizers.routing import create_optimizer

_PLANNED = ("companion_lr", "roles", "overrides", "example", "strict", "plan")
_REFUSED = {
    "param_group_fn": "groups are made of roles; say what differs in overrides",
    "fallback_no_weight_decay": "name the parameters in fallback_list",
}


def create_optimizer_v2(
    model_or_params: nn.Module | ParamsT,
    opt: str = "adamw",
    lr: float | None = None,
    weight_decay: float = 0.0,
    momentum: float | None = None,
    *,
    filter_bias_and_bn: bool = True,
    fallback_list: Iterable[str] = (),
    layer_decay: float | None = None,
    layer_decay_min_scale: float = 0.0,
    layer_decay_no_opt_scale: float | None = None,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """`create_optimizer`, called as `timm.optim.create_optimizer_v2` is.

    Args:
        model_or_params: a module, or what any torch optimizer takes.
        opt: a name of `list_optimizers()` of this library.
        lr: learning rate; None: the one that the registry says to start from.
        weight_decay: of everything but vectors, tables and what the model's `no_weight_decay()` names.
        momentum: for an optimizer that has it, as timm does it; None: the optimizer's own.
        filter_bias_and_bn: True.
        fallback_list: patterns of names that go to the companion (AdamW).
        layer_decay: the learning rate of each layer is this times that of the next one. timm counts the layers.
        layer_decay_min_scale: no factor is smaller.
        layer_decay_no_opt_scale: layers with a smaller factor are frozen.
        **kwargs: of `create_optimizer`.

    Raises:
        ImportError: `layer_decay` without timm.
        TypeError: an argument that the optimizer does not have.
        ValueError: what timm has and cannot be had here, and what `create_optimizer` raises.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 10))
        >>> optimizer = create_optimizer_v2(model, opt="muon", lr=2e-3, weight_decay=0.05)
        >>> [(group["algorithm"], group["weight_decay"]) for group in optimizer.param_groups]
        [('muon', 0.05), ('adamw', 0.0), ('adamw', 0.05)]
    """
    if not filter_bias_and_bn:
        raise ValueError(
            "filter_bias_and_bn=False is not possible: vectors do not decay; give "
            f"overrides={{'vector': {{'weight_decay': {weight_decay!r}}}}} for those that shall"
        )
    for name, remedy in _REFUSED.items():
        if kwargs.pop(name, None):
            raise ValueError(f"{name} is not possible: {remedy}")
    if momentum is not None and "momentum" in signature(registry.entry(opt).load()).parameters:
        kwargs["momentum"] = momentum
    kwargs["weight_decay"] = weight_decay
    if fallback := dict.fromkeys(fallback_list, kwargs.get("companion", "adamw")):
        kwargs["overrides"] = {**fallback, **(kwargs.get("overrides") or {})}
    if layer_decay is None:
        return create_optimizer(opt, model_or_params, lr, **kwargs)
    if not isinstance(model_or_params, nn.Module):
        raise ValueError(f"layer_decay={layer_decay!r} belongs to a model; given are parameters")

    factors = _factors(model_or_params, layer_decay, layer_decay_min_scale, layer_decay_no_opt_scale)
    made: Any = create_optimizer(opt, model_or_params, lr, **kwargs)  # which checks all that is said
    plan = made.plan
    routes = (replace(r, lr=r.lr * factors[r.name]) if r.lr is not None else r for r in plan)
    rest = {key: value for key, value in kwargs.items() if key not in _PLANNED}
    return create_optimizer(opt, model_or_params, plan=replace(plan, routes=tuple(routes)), **rest)


def _factors(model: nn.Module, decay: float, least: float, frozen_below: float | None) -> Mapping[str, float]:
    """What multiplies the learning rate of each parameter; layers with too small a factor are frozen, as timm does."""
    try:
        from timm.optim import param_groups_layer_decay  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ImportError(f"layer_decay={decay!r} needs timm, which counts the layers of its models") from error
    groups = param_groups_layer_decay(model, layer_decay=decay, min_scale=least, no_opt_scale=frozen_below)
    by_id = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    return {name: by_id.get(id(p), 1.0) for name, p in model.named_parameters()}
