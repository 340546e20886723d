"""The route plan: for each parameter of a model the rule, its learning rate and the reason."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from emerging_optimizers import registry
from emerging_optimizers.columns import in_columns
from emerging_optimizers.distributed.table import WorkPlan, layer_name
from emerging_optimizers.engine.groups import DTYPES
from emerging_optimizers.engine.matrix_view import MatrixViewT
from emerging_optimizers.linalg.precision import newton_schulz_in_words
from emerging_optimizers.lowrank import LowRankLinear
from emerging_optimizers.routing.choice import FROZEN, Choice, OverrideT, Rates
from emerging_optimizers.routing.layouts import layout
from emerging_optimizers.routing.match import check_match, check_measured_with, factor
from emerging_optimizers.routing.places import places
from emerging_optimizers.routing.roles import RoleT, find_roles


@dataclass(frozen=True, kw_only=True)
class Route:
    """Where one parameter goes.

    Attributes:
        name: as in `model.named_parameters()`.
        shape: of the parameter.
        optimizer: a registry name, or "frozen" for a parameter that does not require a gradient.
        lr: its learning rate; None: frozen.
        decays: whether it gets the weight decay of its optimizer; vectors, tables and marked parameters do not.
        reason: why.
        role: what the parameter is, see `docs/routing.md`.
        fallback: its role is a guess, from names, positions or shapes, or unknown.
        view: how the matrix optimizer cuts it into matrices, see `EngineOptions`.
        factor_rows: for the two factors of a `LowRankLinear` that Spectron updates: how many of its rows are A's.
        options: what an override gives it beside the optimizer, and what the optimizer takes tables of tokens with.
        factor: with `match`, what AdamW's learning rate was multiplied by; its weight decay is AdamW's divided by it.
        later: where it goes once it requires a gradient; None: it does, or nothing will update it.
    """

    name: str
    shape: tuple[int, ...]
    optimizer: str
    lr: Any
    decays: bool
    reason: str
    role: RoleT = "unknown"
    fallback: bool = False
    view: MatrixViewT = "auto"
    factor_rows: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    factor: float | None = None
    later: "Route | None" = None


@dataclass(frozen=True, kw_only=True)
class RoutePlan:
    """All routes of a model, in the order of its parameters. Prints as a table.

    Attributes:
        routes: one for each parameter.
        devices: on which the model lies; for the line that says what "medium", the default of Muon's family, is there.
        name: the matrix optimizer that it was made for; "": not said.
        companion: the other one.
        match: "adamw": the rates and decays that it was made from are AdamW's.
        work: who works on what, once an optimizer follows the plan; it is printed where processes share parameters.
    """

    routes: tuple[Route, ...]
    devices: frozenset[torch.device] = frozenset()
    name: str = ""
    companion: str = ""
    match: str | None = None
    work: WorkPlan | None = None

    def __iter__(self) -> Iterator[Route]:
        return iter(self.routes)

    def __len__(self) -> int:
        return len(self.routes)

    def __getitem__(self, name: str) -> Route:
        """The route of a parameter name."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Route]:
        return {route.name: route for route in self.routes}

    @property
    def fallbacks(self) -> tuple[Route, ...]:
        """What has been guessed, or is not known."""
        return tuple(route for route in self.routes if route.fallback)

    def __str__(self) -> str:
        casting = any(_casts_by_default(name) for name in {r.optimizer for r in self.routes} - {FROZEN})
        lines = [] if self.match is None else [_factors(self.match, self.routes)]
        text = "\n".join([*lines, *table(self.routes)]) + newton_schulz_in_words(self.devices if casting else ())
        return text if self.work is None or not self.work.is_shared else f"{text}\n\n{self.work}"

    def check(self, model: nn.Module, strict: bool = False) -> None:
        """Raise ValueError unless the plan names every parameter of a model exactly once, with its shape.

        With `strict` also where a role is a guess, or unknown.
        """
        planned: dict[str, Route] = {}
        wrong = []
        for route in self.routes:
            if route.name in planned:
                wrong.append(f"{route.name} is taken twice: by {planned[route.name].optimizer} and {route.optimizer}")
            planned[route.name] = route
        for name, p in model.named_parameters():
            if name not in planned:
                wrong.append(f"{name} {tuple(p.shape)} is left over")
            elif (shape := planned.pop(name).shape) != tuple(p.shape):
                wrong.append(f"{name} has shape {tuple(p.shape)}, planned is {shape}")
        wrong += [f"{name} is not a parameter of the model" for name in planned]
        if wrong:
            raise ValueError(
                "the route plan does not fit the model:\n  "
                + "\n  ".join(wrong)
                + "\nMake it with plan_parameters(model)."
            )
        if strict:
            self.check_roles("Name each in overrides of plan_parameters, or give it an example")

    def check_roles(self, remedy: str) -> None:
        """Raise ValueError where a role is a guess, or unknown."""
        if self.fallbacks:
            lines = "\n  ".join(f"{r.name} {r.shape}: {r.reason}" for r in self.fallbacks)
            raise ValueError(f"strict=True, and these parameters are guessed, or not known:\n  {lines}\n{remedy}.")


def plan_parameters(
    model: nn.Module,
    name: str,
    *,
    lr: Any = None,
    companion: str = "adamw",
    companion_lr: Any = None,
    match: str | None = None,
    roles: Mapping[str, str] | None = None,
    overrides: Mapping[str, OverrideT] | None = None,
    example: Any = None,
    strict: bool = False,
) -> RoutePlan:
    """Decide for every parameter of a model which optimizer updates it, and say why.

    Each parameter has a role (`docs/routing.md` lists them, and how they are found); hidden matrices, convolutions,
    stacks of experts, routers and the factors of adapters go to the matrix optimizer `name`. To the companion go
    embeddings, output heads, patch embeddings, depthwise filters, tables, vectors and scalars, and what is not known.
    Only Spectron knows the factors of a `LowRankLinear`; under another name they go to the companion, and under
    "spectron" what was left dense beside them does, since Spectron would truncate it. An element-wise `name` takes
    every parameter. Nothing is changed.

    Layers that store several matrices in one parameter, or a matrix as (in, out), are recognised and get their view:
    GPT-2's `Conv1D`, `nn.MultiheadAttention`, fused query-key-value and gate-up projections (also where they alternate
    by head, as in GPT-NeoX, BLOOM and Megatron-LM), stacks of experts, DeepSeek's latent attention. The reason says so;
    what is not recognised is one matrix.

    Args:
        model: any module; tied parameters are planned once, under their first name.
        name: registry name of the optimizer, see `list_optimizers`.
        lr: its learning rate; None: the one that the registry says to start from.
        companion: registry name of an element-wise optimizer.
        companion_lr: its learning rate; None: `lr` where that is in Adam's unit, and without `lr` the one that the
            registry says to start from.
        match: "adamw": `lr`, `companion_lr`, and "lr" and "weight_decay" of overrides are those of a tuned AdamW (`lr`
            without a value its start). Each optimizer gets them times, and divided by, its factor
            (`docs/migrate.md` has the table). None: they are in each optimizer's own unit.
        roles: a role to an optimizer, which then takes what has it: `{"router": "adamw"}`.
        overrides: patterns to an optimizer, to "frozen", or to options such as `{"lr": 1e-4, "weight_decay": 0.0}`,
            with "optimizer" or without. A pattern is a shell pattern of parameter names, a regular expression behind
            "re:" that is found anywhere in the name, or a role. The first that matches decides.
        example: what the model is called with: a tensor, a tuple of arguments, or a dict of keyword arguments. One call
            on tensors without numbers then shows which layers are heads and what is done with parameters of unknown
            layers; nothing is computed.
        strict: raise if a role is a guess or unknown.

    Raises:
        ValueError: unknown names, a pattern that matches nothing or nothing that another has not matched before, an
            override that cannot be met, an example that the model cannot be called with, a learning rate that says
            nothing about the companion's, a guess under `strict`, or under `match` an optimizer whose factor is not
            measured, or an option that changes it.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10))
        >>> for route in plan_parameters(model, "muon", lr=0.02, companion_lr=3e-3):
        ...     print(route.name, route.optimizer, "|", route.reason)
        0.weight adamw | embedding
        1.weight muon | hidden matrix
        1.bias adamw | vector
        2.weight adamw | output head: as many rows as the embedding '0.weight'
        2.bias adamw | vector
        >>> print(str(plan_parameters(model, "muon", lr=1e-3, match="adamw")).splitlines()[0])
        match='adamw', lr and decay are AdamW's: muon takes lr x 0.8, decay / 0.8
    """
    name, companion = name.lower(), companion.lower()
    chosen = Choice(name, companion, roles, overrides)
    if match is not None:
        check_match(match, (name, companion))
        match = match.lower()
    rates = Rates(name, companion, lr, companion_lr, match)
    modules = dict(model.named_modules(remove_duplicate=False))
    where = places(model, modules)
    factorized = any(isinstance(module, LowRankLinear) for module in modules.values())
    findings = find_roles(model, where, modules, example)

    routes = []
    for place in where:
        parameter_name, p, owner = place.name, place.p, place.layer
        factors = owner if isinstance(owner, LowRankLinear) and p is owner.factors else None
        finding = findings[parameter_name]
        if factors is not None:
            finding = replace(
                finding, role="hidden", reason="two factors of a low-rank layer", guess=False, decays=True
            )
        optimizer, reason, fallback, options = chosen.of(parameter_name, p, finding, factors is not None, factorized)
        elementwise = optimizer == FROZEN or registry.entry(optimizer).elementwise
        view, how = ("auto", "") if factors is not None or elementwise else layout(place, p)
        if finding.role == "hidden" and p.ndim > 2 and not elementwise:
            view = "flatten"
        if optimizer == "stacked_soap" and finding.role == "experts":
            view, how = "auto", "as one, so that they share their factors"
        options = dict(options)
        scale = None
        if match is not None and optimizer != FROZEN:
            check_match(match, [optimizer])
            check_measured_with(f"{parameter_name}: ", optimizer, options)
            scale = factor(optimizer, p, view)
        route = Route(
            name=parameter_name,
            shape=tuple(p.shape),
            optimizer=optimizer,
            lr=None
            if optimizer == FROZEN
            else rates.times(options.pop("lr") if "lr" in options else rates.of(optimizer, parameter_name), scale or 1),
            decays="weight_decay" in options or finding.decays,
            reason=f"{reason}; {how}" if how else reason,
            role=finding.role,
            fallback=fallback,
            view=view,
            factor_rows=factors.out_features if factors is not None and optimizer == "spectron" else None,
            options=options,
            factor=scale,
        )
        if not p.requires_grad and optimizer != FROZEN:
            later = route if p.dtype in DTYPES else None
            route = replace(route, optimizer=FROZEN, lr=None, reason="does not require a gradient", fallback=False,
                            view="auto", factor_rows=None, factor=None, later=later)  # fmt: skip
        routes.append(route)
    chosen.check_all_used(list(findings))
    plan = RoutePlan(
        routes=tuple(routes),
        devices=frozenset(place.p.device for place in where),
        name=name,
        companion=companion,
        match=match,
    )
    if strict:
        plan.check_roles("Name each in overrides" + (", or give an example" if example is None else ""))
    return plan


def table(routes: Sequence[Route]) -> list[str]:
    """Lines of columns; what is alike in several layers is one line. "view" is there where something is cut."""
    rows: dict[tuple[str, ...], int] = {}
    for r in routes:
        cells = (
            layer_name(r.name, len(routes)),
            "x".join(map(str, r.shape)) or "scalar",
            r.role,
            r.optimizer,
            "" if r.lr is None else f"{float(r.lr):g}",
            "yes" if r.decays and r.optimizer != FROZEN else "no",
            _view_in_words(r),
            r.reason,
        )
        rows[cells] = rows.get(cells, 0) + 1
    header = ("parameter", "shape", "role", "optimizer", "lr", "decay", "view", "reason")
    lines = [header, *((f"{name}  {count} x" if count > 1 else name, *rest) for (name, *rest), count in rows.items())]
    if not any(view for *_, view, _ in rows):
        lines = [(*row[:-2], row[-1]) for row in lines]  # nothing is cut
    return in_columns(lines)


def _view_in_words(route: Route) -> str:
    """How a matrix optimizer cuts a parameter, in a few words; "" where it is one matrix, or no matrix."""
    if route.factor_rows is not None:
        return "2 factors"
    if route.optimizer == FROZEN or registry.entry(route.optimizer).elementwise:
        return ""
    view = route.options.get("matrix_view", route.view)
    first, *rest = (view,) if isinstance(view, str) else view
    if first == "auto":
        return {2: "", 3: f"{route.shape[0]} matrices"}.get(len(route.shape), "flat")
    if first in ("transposed", "columns"):
        inner = _view_in_words(replace(route, view=tuple(rest), options={})) if rest else ""
        return ", ".join(word for word in (first, inner) if word)
    return {
        "heads": f"{rest[0] if rest else 0} heads",
        "split": f"{len(rest)} parts",
        "interleaved": f"{len(rest)} gathered",
        "flatten": "flat",
    }.get(str(first), str(first))


def _factors(match: str, routes: Sequence[Route]) -> str:
    """What `match` did, for each optimizer."""
    found: dict[str, list[float]] = {}
    for r in (route.later or route for route in routes):
        if r.factor is not None and r.optimizer != match:
            found.setdefault(r.optimizer, []).append(r.factor)
    words = [
        f"{name} takes lr x {f}, decay / {f}" + (", by shape" if min(some) < max(some) else "")
        for name, some in found.items()
        for f in [" to ".join(dict.fromkeys(f"{x:.3g}" for x in (min(some), max(some))))]
    ]
    return f"match={match!r}, lr and decay are AdamW's: " + (
        "; ".join(words) or "every parameter takes them as they are"
    )


def _casts_by_default(name: str) -> bool:
    """Whether Newton-Schulz of `name` multiplies in what "medium" is on a device, unless it is told otherwise."""
    optimizer = registry.entry(name).load()
    default = inspect.signature(optimizer).parameters.get("fp32_matmul_prec")
    return hasattr(optimizer, "casts") and default is not None and default.default == "medium"
