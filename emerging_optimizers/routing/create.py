"""From a name and a model to one optimizer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from emerging_optimizers import registry
from emerging_optimizers.engine import EngineOptions
from emerging_optimizers.routing.plan import FROZEN, RoutePlan, plan_parameters
from emerging_optimizers.routing.routed import RoutedOptimizer, group_options


def create_optimizer(
    name: str,
    model_or_params: nn.Module | ParamsT,
    lr: Any = None,
    *,
    companion: str = "adamw",
    companion_lr: Any = None,
    companion_options: Mapping[str, Any] | None = None,
    overrides: Mapping[str, str] | None = None,
    strict: bool = False,
    plan: RoutePlan | None = None,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """Make an optimizer by name, for a model or for parameters.

    Given a model, its parameters are routed (`plan_parameters` says how, and shows it): hidden matrices get the
    optimizer `name`, the rest the companion, all in ONE optimizer with several parameter groups. Vectors and scalars
    get no weight decay. Given parameters, this is the class of that name.

    Args:
        name: a name of `list_optimizers()`.
        model_or_params: a module, or what any torch optimizer takes.
        lr: learning rate of `name`; None: its default.
        companion: element-wise optimizer for everything but hidden matrices.
        companion_lr: its learning rate; None: its default (AdamW: 1e-3).
        companion_options: its other arguments.
        overrides: patterns of parameter names to `name` or `companion`.
        strict: raise if a matrix falls back to the companion, by its shape or by a guess.
        plan: a plan of `plan_parameters` to follow, edited perhaps; then `lr`, `companion_lr`, `overrides` and
            `strict` have been said there and are refused here.
        **kwargs: arguments of the optimizer `name`, and `EngineOptions`; all but `weight_update_hook` hold for the
            companion too.

    Raises:
        ValueError: an unknown name, a value out of its range, a plan that does not fit the model.
        TypeError: an argument that the optimizer does not have.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10))
        >>> optimizer = create_optimizer("muon", model, lr=0.02, companion_lr=3e-3)
        >>> [(group["algorithm"], group["lr"], len(group["params"])) for group in optimizer.param_groups]
        [('adamw', 0.003, 2), ('muon', 0.02, 1), ('adamw', 0.003, 2)]
    """
    routing = {"companion_lr": companion_lr, "overrides": overrides, "strict": strict or None}
    if not isinstance(model_or_params, nn.Module):
        given = [key for key, value in {**routing, "plan": plan, "companion_options": companion_options}.items()
                 if value is not None]  # fmt: skip
        if given:
            raise ValueError(f"{given[0]} belongs to a model; given are parameters, which all go to {name!r}")
        optimizer: torch.optim.Optimizer = registry.entry(name).load()(
            model_or_params, **({} if lr is None else {"lr": lr}), **kwargs
        )
        return optimizer

    if plan is None:
        plan = plan_parameters(
            model_or_params,
            name,
            lr=lr,
            companion=companion,
            companion_lr=companion_lr,
            overrides=overrides,
            strict=strict,
        )
    else:
        given = [key for key, value in {**routing, "lr": lr}.items() if value is not None]
        if given:
            raise ValueError(f"{given[0]} is decided by the plan; say it in plan_parameters(...)")
    plan.check(model_or_params)

    if "lr" in (companion_options or {}):
        raise ValueError("companion_options has no 'lr'; give companion_lr, or say it in the plan")
    for route in plan:
        if route.optimizer not in (FROZEN, name.lower(), companion.lower()):
            raise ValueError(
                f"the plan gives {route.name} to {route.optimizer!r}; this call is for {name!r} with companion="
                f"{companion!r}: name the plan's optimizers, or plan again"
            )
    if kwargs.get("tp_group") is not None:
        raise ValueError(
            "tp_group is not possible for a model: how each parameter is sharded is not known; give TpRekls groups of "
            "parameters with their partition_dim"
        )
    # A law for the weights of matrices would be wrong for gains and biases.
    shared = EngineOptions.__annotations__.keys() - {"weight_update_hook"}
    engine = {key: kwargs.pop(key) for key in shared if key in kwargs}
    execution = {key: engine.pop(key) for key in ("execution",) if key in engine}
    options = {companion.lower(): {**(companion_options or {}), **engine}, name.lower(): {**kwargs, **engine}}
    parameters = dict(model_or_params.named_parameters())
    groups: dict[Any, dict[str, Any]] = {}
    for route in plan:
        if route.optimizer == FROZEN:
            continue
        key = (
            route.optimizer,
            id(route.lr) if isinstance(route.lr, torch.Tensor) else route.lr,
            route.decays,
            route.view,
            route.factor_rows,
        )
        if key not in groups:
            asked = {**options[route.optimizer], "lr": route.lr}
            if route.view != "auto":
                asked["matrix_view"] = route.view
            if route.factor_rows is not None:
                asked["out_features"] = route.factor_rows
            if not route.decays:
                asked["weight_decay"] = 0.0
            groups[key] = {
                **group_options(route.optimizer, asked),
                "algorithm": route.optimizer,
                "params": [],
                "reasons": [],
            }
        groups[key]["params"].append((route.name, parameters[route.name]))
        groups[key]["reasons"].append(route.reason)
    return RoutedOptimizer(list(groups.values()), plan, **execution)
