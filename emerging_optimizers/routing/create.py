"""From a name and a model to one optimizer."""

import inspect
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.optim.optimizer import ParamsT

from emerging_optimizers import registry
from emerging_optimizers.engine import EngineOptions, RuleOptimizer
from emerging_optimizers.routing.choice import OverrideT, Suggestion, default_lr, known_name
from emerging_optimizers.routing.groups import Router, group_options
from emerging_optimizers.routing.match import as_adamws
from emerging_optimizers.routing.plan import RoutePlan, plan_parameters
from emerging_optimizers.routing.recipes import find_recipe
from emerging_optimizers.routing.routed import RoutedOptimizer
from emerging_optimizers.routing.torch_arguments import without_torchs


def create_optimizer(
    name: str,
    model_or_params: nn.Module | ParamsT,
    lr: Any = None,
    *,
    companion: str = "adamw",
    companion_lr: Any = None,
    companion_options: Mapping[str, Any] | None = None,
    match: str | None = None,
    embedding: str | None = None,
    roles: Mapping[str, str] | None = None,
    overrides: Mapping[str, OverrideT] | None = None,
    example: Any = None,
    strict: bool = False,
    plan: RoutePlan | None = None,
    recipe: str | None = None,
    warmup: int | None = None,
    **kwargs: Any,
) -> RuleOptimizer:
    """Make an optimizer by name, for a model or for parameters.

    Given a model, its parameters are routed (`plan_parameters` says how, and shows it): hidden matrices get the
    optimizer `name`, the rest the companion, all in ONE optimizer with several parameter groups, the main one first.
    Vectors, tables and marked parameters get no weight decay. What is frozen joins in the first step after it requires
    a gradient. Given parameters, this is the class of that name.

    Args:
        name: a name of `list_optimizers()`.
        model_or_params: a module, or what any torch optimizer takes.
        lr: learning rate of `name`; None: the one that the registry says to start from.
        companion: element-wise optimizer for everything but hidden matrices.
        companion_lr: its learning rate; None: `lr`, where that is in Adam's unit.
        companion_options: its other arguments.
        match: "adamw": `lr`, `weight_decay` and `betas` are those of a tuned AdamW, and so are `companion_lr` and what
            `overrides` say of them; left out, AdamW's own. AdamW's parameters get them as they are. The matrices of
            `name` get lr x f and weight_decay / f, with f measured (`docs/migrate.md` has the table), and `betas` where
            it has them too, as SOAP does. All rates are in proportion, so a schedule carries over as it is. None: each
            argument is the optimizer's own.
        embedding: optimizer for the tables of tokens in place of the companion, "sinkhorn" or "oblique_steepest_sgd",
            say; as `roles={"embedding": ...}`. Without `lr` it has the rate that the registry says to start from; else
            `lr`, where that is in Adam's unit for both, or what `overrides={"embedding": {"lr": ...}}` says.
        roles: a role to the optimizer that takes it, see `plan_parameters`.
        overrides: patterns of parameter names to an optimizer, "frozen" or options, see `plan_parameters`.
        example: what the model is called with, see `plan_parameters`.
        strict: raise if the role of a parameter is a guess, or unknown; and, in a step on several processes, if a
            gradient would be gathered to every rank. Nothing else of a step ever is, see `docs/distributed.md`.
        plan: a plan of `plan_parameters` to follow, edited perhaps; then `lr`, `companion_lr`, `embedding`, `roles`,
            `overrides` and `example` have been said there and are refused here.
        recipe: a name of `eopt recipes`: hyper-parameters as a source gives them; not with `match`. What else is said
            here goes before, and the companion's learning rate keeps its proportion to `lr`.
        warmup: over how many steps the learning rate rises, >= 0. With a `precondition_frequency` above 1 and no
            `refresh_ramp`, the ramp is half of it: rare refreshes lose most while the rate rises
            (`docs/performance.md`). None: not known; where you ask for rare refreshes, a warning says that they want a
            ramp.
        **kwargs: arguments of the optimizer `name`, and `EngineOptions`; all but `weight_update_hook` hold for the
            companion too, and so does `weight_decay`. Of torch.optim's, `fused`, `foreach`, `amsgrad=False` and
            `differentiable=False` are taken and mean nothing.

    Raises:
        ValueError: an unknown name, a value out of its range, a plan that does not fit the model; with `match` an
            optimizer whose factor is not measured, or an option that changes it.
        TypeError: an argument that the optimizer does not have; for one of torch.optim's, its name here.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10))
        >>> optimizer = create_optimizer("muon", model, lr=0.02, companion_lr=3e-3)
        >>> [(group["algorithm"], group["lr"], len(group["params"])) for group in optimizer.param_groups]
        [('muon', 0.02, 1), ('adamw', 0.003, 2), ('adamw', 0.003, 2)]

        A recipe of AdamW, for Muon: lr x decay is the same in both groups that decay.

        >>> optimizer = create_optimizer("muon", model, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), match="adamw")
        >>> [f"{group['lr'] * group['weight_decay']:g}" for group in optimizer.param_groups]
        ['0.0001', '0.0001', '0']
    """
    routing = {"companion_lr": companion_lr, "match": match, "embedding": embedding, "roles": roles,
               "overrides": overrides, "example": example, "strict": strict or None}  # fmt: skip
    asks_for_rare = "precondition_frequency" in kwargs
    if recipe is not None and match is not None:
        raise ValueError(
            f"match={match!r} and recipe={recipe!r} are two sources for the same numbers; give one of them"
        )
    if recipe is not None:
        said = find_recipe(recipe, name)
        kwargs = {**said.options[name.lower()], **kwargs}
        own, side = kwargs.pop("lr", None), said.companion.get("lr")
        if plan is None and isinstance(model_or_params, nn.Module) and companion_lr is None and own and side:
            companion_lr = side if lr is None else lr * (side / own)  # in the source's proportion
        if plan is None and lr is None:
            lr = own
        if isinstance(model_or_params, nn.Module) and companion.lower() == "adamw":
            rest = {key: value for key, value in said.companion.items() if key != "lr"}
            companion_options = {**rest, **(companion_options or {})}
            suggested = {pattern: Suggestion(options) for pattern, options in said.overrides.items()}
            overrides = {**(overrides or {})}  # what the user says comes first, and counts
            routing["overrides"] = overrides = {**overrides, **suggested, **overrides} or None
    kwargs = without_torchs(name, _with_ramp(name, kwargs, warmup, asks_for_rare))
    if companion_options is not None:
        companion_options = without_torchs(companion, companion_options)
    if not isinstance(model_or_params, nn.Module):
        given = [key for key, value in {**routing, "plan": plan, "companion_options": companion_options}.items()
                 if value is not None]  # fmt: skip
        if given:
            raise ValueError(f"{given[0]} belongs to a model; given are parameters, which all go to {name!r}")
        optimizer: RuleOptimizer = registry.entry(name).load()(
            model_or_params, lr=default_lr(name) if lr is None else lr, **kwargs
        )
        return optimizer

    roles = _with_embedding(roles, embedding)
    if plan is None:
        if match is None:
            _check_unit(name, lr, companion, companion_lr, kwargs)
        plan = plan_parameters(
            model_or_params,
            name,
            lr=lr,
            companion=companion,
            companion_lr=companion_lr,
            match=match,
            roles=roles,
            overrides=overrides,
            example=example,
            strict=strict,
        )
    else:
        given = [key for key, value in {**routing, "strict": None, "lr": lr}.items() if value is not None]
        if given:
            raise ValueError(f"{given[0]} is decided by the plan; say it in plan_parameters(...)")
    plan.check(model_or_params, strict)
    if embedding is not None and not any(route.role == "embedding" for route in plan):
        raise ValueError(
            f"embedding={embedding!r}: the model has no table of tokens; leave embedding out, or give overrides"
        )

    if "lr" in (companion_options or {}):
        raise ValueError("companion_options has no 'lr'; give companion_lr, or say it in the plan")
    if plan.name and (plan.name, plan.companion) != (name.lower(), companion.lower()):
        raise ValueError(
            f"the plan is for {plan.name!r} with companion={plan.companion!r}; this call is for {name!r} with "
            f"companion={companion!r}: name the plan's optimizers, or plan again"
        )
    if kwargs.get("tp_group") is not None:
        raise ValueError(
            "tp_group is not possible for a model: how each parameter is sharded is not known; give TpRekls groups of "
            "parameters with their partition_dim"
        )
    if plan.match is not None:
        kwargs, companion_options = as_adamws(name, kwargs, companion_options)
    # A law for the weights of matrices would be wrong for gains and biases.
    shared = EngineOptions.__annotations__.keys() - {"weight_update_hook"}
    engine = {key: kwargs.pop(key) for key in shared if key in kwargs}
    execution = {key: engine.pop(key) for key in ("execution",) if key in engine}
    decay = {"weight_decay": kwargs["weight_decay"]} if "weight_decay" in kwargs else {}
    options = {companion.lower(): {**decay, **(companion_options or {}), **engine}, name.lower(): {**kwargs, **engine}}
    replan = partial(
        plan_parameters,
        name=name,
        lr=lr,
        companion=companion,
        companion_lr=companion_lr,
        match=plan.match,
        roles=roles,
        overrides=overrides,
    )
    router = Router(model_or_params, replan, options, {**decay, **engine}, (name.lower(), companion.lower()))
    main_lr = next(
        (route.lr for route in plan if route.optimizer == name.lower()), default_lr(name) if lr is None else lr
    )
    defaults = group_options(name, {**options[name.lower()], "lr": main_lr})
    groups, waiting = router.groups(plan)
    return RoutedOptimizer(groups, plan, defaults=defaults, router=router, waiting=waiting, strict=strict, **execution)


def _with_ramp(name: str, options: dict[str, Any], warmup: int | None, warns: bool) -> dict[str, Any]:
    """Options in which rare refreshes begin dense, over half of the warm-up, if nothing else is said."""
    if warmup is not None and not (isinstance(warmup, int) and warmup >= 0):
        raise ValueError(f"warmup={warmup!r} is not allowed; give a number of steps >= 0, or None")
    kind = registry.entry(name).load()
    frequency = options.get("precondition_frequency", kind.preset.get("precondition_frequency", 1))
    if "refresh_ramp" in options or "refresh_ramp" not in kind.ranges:
        return options
    if not isinstance(frequency, int) or frequency <= 1:
        return options
    if warmup is not None:
        return {**options, "refresh_ramp": -(-warmup // 2)}
    if warns:
        warnings.warn(
            f"{name}: with precondition_frequency={frequency} from the first step on, much is lost while the learning "
            "rate rises. Give warmup=, the steps over which it does, and refreshes begin dense over half of them; or "
            "refresh_ramp=0 if you want them rare at once",
            UserWarning,
            stacklevel=3,
        )
    return options


def _check_unit(name: str, lr: Any, companion: str, companion_lr: Any, options: Mapping[str, Any]) -> None:
    """Raise ValueError where a scale of the updates makes `lr` another quantity than Adam's."""
    main = registry.entry(name)
    given = options.get("scale_mode")
    if lr is None or companion_lr is not None or given is None or main.elementwise:
        return
    usual = inspect.signature(main.load()).parameters.get("scale_mode")
    if usual is not None and given != usual.default:
        raise ValueError(
            f"with scale_mode={given!r} lr={lr!r} of {name!r} says nothing about the learning rate of {companion!r}; "
            f"give companion_lr, {default_lr(companion):g} say"
        )


def _with_embedding(roles: Mapping[str, str] | None, embedding: str | None) -> Mapping[str, str] | None:
    """Roles with the optimizer for embeddings."""
    if embedding is None:
        return roles
    if "embedding" in (roles or {}):
        raise ValueError(f"embedding={embedding!r} and roles['embedding'] say the same twice; give one of them")
    return {**(roles or {}), "embedding": known_name("embedding", embedding)}
