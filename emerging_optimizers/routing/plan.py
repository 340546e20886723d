"""The route plan: for each parameter of a model the rule, its learning rate and the reason."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from emerging_optimizers import registry
from emerging_optimizers.engine.matrix_view import MatrixViewT
from emerging_optimizers.linalg.precision import newton_schulz_in_words
from emerging_optimizers.lowrank import LowRankLinear
from emerging_optimizers.routing.layouts import layout

FROZEN = "frozen"


@dataclass(frozen=True, kw_only=True)
class Route:
    """Where one parameter goes.

    Attributes:
        name: as in `model.named_parameters()`.
        shape: of the parameter.
        optimizer: a registry name, or "frozen" for a parameter that does not require a gradient.
        lr: its learning rate; None: frozen.
        decays: whether it gets the weight decay of its optimizer; vectors do not.
        reason: why.
        fallback: it has the shape of a matrix but did not go to the matrix optimizer, by shape or by a guess.
        view: how the matrix optimizer cuts it into matrices, see `EngineOptions`.
        factor_rows: for the two factors of a `LowRankLinear` that Spectron updates: how many of its rows are A's.
    """

    name: str
    shape: tuple[int, ...]
    optimizer: str
    lr: Any
    decays: bool
    reason: str
    fallback: bool = False
    view: MatrixViewT = "auto"
    factor_rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class RoutePlan:
    """All routes of a model, in the order of its parameters. Prints as a table.

    Attributes:
        routes: one for each parameter.
        devices: on which the model lies; for the line that says what "medium", the default of Muon's family, is there.
    """

    routes: tuple[Route, ...]
    devices: frozenset[torch.device] = frozenset()

    def __iter__(self) -> Iterator[Route]:
        return iter(self.routes)

    def __len__(self) -> int:
        return len(self.routes)

    def __getitem__(self, name: str) -> Route:
        """The route of a parameter name."""
        for route in self.routes:
            if route.name == name:
                return route
        raise KeyError(name)

    @property
    def fallbacks(self) -> tuple[Route, ...]:
        """Matrices that the matrix optimizer does not get."""
        return tuple(route for route in self.routes if route.fallback)

    def __str__(self) -> str:
        header = ("parameter", "shape", "optimizer", "lr", "reason")
        rows = [
            (
                r.name,
                "x".join(map(str, r.shape)) or "scalar",
                r.optimizer,
                "" if r.lr is None else f"{float(r.lr):g}",
                r.reason,
            )
            for r in self.routes
        ]
        widths = [max(len(row[k]) for row in (header, *rows)) for k in range(4)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row[:4], widths, strict=True)), row[4]])
                 for row in (header, *rows)]  # fmt: skip
        casting = any(_casts_by_default(name) for name in {r.optimizer for r in self.routes} - {FROZEN})
        return "\n".join(line.rstrip() for line in lines) + newton_schulz_in_words(self.devices if casting else ())

    def check(self, model: nn.Module) -> None:
        """Raise ValueError unless the plan names every parameter of a model exactly once, with its shape."""
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


def plan_parameters(
    model: nn.Module,
    name: str,
    *,
    lr: Any = None,
    companion: str = "adamw",
    companion_lr: Any = None,
    overrides: Mapping[str, str] | None = None,
    strict: bool = False,
) -> RoutePlan:
    """Decide for every parameter of a model which optimizer updates it, and say why.

    Hidden matrices go to the matrix optimizer `name`. To the companion go embeddings, output heads (found through
    the module graph: tied to an embedding, named by the model's `get_output_embeddings()`, as wide as an embedding
    has rows, or the last linear layer of a model without embeddings), vectors and scalars, also the stacked biases of
    experts. Only
    Spectron knows the factors of a `LowRankLinear`; under another name they go to the companion, and under "spectron"
    what was left dense beside them does, since Spectron would truncate it. An element-wise `name` takes every
    parameter. Nothing is changed.

    Layers that store several matrices in one parameter, or a matrix as (in, out), are recognised and get their view:
    GPT-2's `Conv1D`, `nn.MultiheadAttention`, fused query-key-value and gate-up projections (also where they alternate
    by head, as in GPT-NeoX, BLOOM and Megatron-LM), stacks of experts, DeepSeek's latent attention. The reason says so;
    what is not recognised is one matrix.

    Args:
        model: any module; tied parameters are planned once, under their first name.
        name: registry name of the optimizer, see `list_optimizers`.
        lr: its learning rate; None: its default.
        companion: registry name of an element-wise optimizer.
        companion_lr: its learning rate; None: its default.
        overrides: shell-style patterns of parameter names to a registry name (`name` or `companion`); the first
            that matches decides.
        strict: raise if a parameter with the shape of a matrix falls back to the companion, by its shape or by a
            guess.

    Raises:
        ValueError: unknown names, a pattern that matches nothing, an override that cannot be met, or a fallback
            under `strict`.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10))
        >>> for route in plan_parameters(model, "muon", lr=0.02):
        ...     print(route.name, route.optimizer, "|", route.reason)
        0.weight adamw | embedding
        1.weight muon | hidden matrix
        1.bias adamw | vector
        2.weight adamw | output head: as many rows as the embedding '0.weight'
        2.bias adamw | vector
    """
    main, side = registry.entry(name), registry.entry(companion)
    name, companion = name.lower(), companion.lower()
    if not side.elementwise:
        raise ValueError(
            f"companion={companion!r} updates matrices only; choose an element-wise one: "
            + ", ".join(n for n, e in registry.OPTIMIZERS.items() if e.elementwise)
        )
    lrs = {companion: default_lr(companion) if companion_lr is None else companion_lr}
    lrs[name] = default_lr(name) if lr is None else lr
    overrides = dict(overrides or {})
    unused = set(overrides)
    special = {} if main.elementwise else _embeddings_and_heads(model)
    factorized = any(isinstance(module, LowRankLinear) for module in model.modules())
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}

    routes = []
    for parameter_name, p in model.named_parameters():
        owner = owners[id(p)]
        factors = owner if isinstance(owner, LowRankLinear) and p is owner.factors else None
        experts = _experts_of_a_bias(owner, parameter_name.rpartition(".")[2], p)
        chosen, reason, fallback = _choose(p, owner, main.elementwise, name, companion, special.get(id(p)), experts)
        if chosen == "spectron" and factorized and factors is None:
            chosen, reason, fallback = (
                companion,
                "dense in a model of low-rank layers: Spectron would truncate it",
                True,
            )
        pattern = next((pattern for pattern in overrides if fnmatchcase(parameter_name, pattern)), None)
        if pattern is not None:
            unused.discard(pattern)
            chosen, reason, fallback = overrides[pattern].lower(), f"override {pattern!r}", False
            if chosen not in lrs:
                raise ValueError(f"overrides[{pattern!r}]={chosen!r} is neither {name!r} nor {companion!r}")
            if p.ndim < 2 and not registry.entry(chosen).elementwise:
                raise ValueError(
                    f"overrides[{pattern!r}]={chosen!r} cannot be met: {parameter_name!r} of shape "
                    f"{tuple(p.shape)} is not a matrix"
                )
            if factors is not None and chosen != "spectron" and not registry.entry(chosen).elementwise:
                raise ValueError(
                    f"overrides[{pattern!r}]={chosen!r} cannot be met: {parameter_name!r} holds two factors of a "
                    "low-rank layer, not one matrix; create_optimizer('spectron', model) takes them"
                )
        one_piece = factors is not None or registry.entry(chosen).elementwise
        view, how = ("auto", "") if one_piece else layout(model, parameter_name, p)
        if chosen == "stacked_soap" and p.ndim == 3:
            view, how = "auto", "as one, so that they share their factors"
        if not p.requires_grad:
            chosen, reason, fallback = FROZEN, "does not require a gradient", False
        routes.append(
            Route(
                name=parameter_name,
                shape=tuple(p.shape),
                optimizer=chosen,
                lr=lrs.get(chosen),
                decays=p.ndim >= 2 and not experts,
                reason=f"{reason}; {how}" if how and chosen != FROZEN else reason,
                fallback=fallback,
                view=view,
                factor_rows=factors.out_features if factors is not None and chosen == "spectron" else None,
            )
        )
    if unused:
        raise ValueError(f"overrides match no parameter: {', '.join(map(repr, sorted(unused)))}")
    plan = RoutePlan(routes=tuple(routes), devices=frozenset(p.device for p in model.parameters()))
    if strict and plan.fallbacks:
        lines = "\n  ".join(f"{r.name} {r.shape}: {r.reason}" for r in plan.fallbacks)
        raise ValueError(
            f"strict=True, and these matrices fall back to {companion!r}:\n  {lines}\nName each in overrides."
        )
    return plan


def default_lr(name: str) -> Any:
    """The learning rate that the constructor of `name` has by default; ValueError where it has none."""
    default = inspect.signature(registry.entry(name).load()).parameters["lr"].default
    if default is inspect.Parameter.empty:
        raise ValueError(f"{name!r} has no default learning rate; give lr")
    return default


def _casts_by_default(name: str) -> bool:
    """Whether Newton-Schulz of `name` multiplies in what "medium" is on a device, unless it is told otherwise."""
    optimizer = registry.entry(name).load()
    default = inspect.signature(optimizer).parameters.get("fp32_matmul_prec")
    return hasattr(optimizer, "casts") and default is not None and default.default == "medium"


def _choose(
    p: Tensor,
    owner: nn.Module,
    elementwise: bool,
    name: str,
    companion: str,
    special: tuple[str, bool] | None,
    experts: int,
) -> tuple[str, str, bool]:
    """Optimizer, reason, and whether that is a fallback; `experts`: of how many this parameter is the biases."""
    vectors = p.ndim < 2 or experts > 0
    if elementwise:
        return name, "element-wise; vector, no weight decay" if vectors else "element-wise: takes any shape", False
    if experts:
        return companion, f"biases of {experts} experts, one vector each", False
    if vectors:
        return companion, "scalar" if p.ndim == 0 else "vector", False
    if hasattr(p, "low_rank_factors"):
        if name == "spectron":
            return name, "two factors of a low-rank layer", False
        return companion, "two factors of a low-rank layer: not one matrix, only Spectron takes them", False
    if special is not None:
        reason, guess = special
        return companion, reason, guess
    if p.ndim == 3 and p.shape[0] == 1 and not isinstance(owner, nn.Conv1d):
        return companion, "table with a leading axis of one (position or class token)", True
    if 1 in (p.shape[0], p.numel() // max(1, p.shape[0])):
        return companion, "a vector in the shape of a matrix", True
    if isinstance(owner, nn.modules.conv._ConvNd):
        return name, "convolution, as (out, rest)", False
    if p.ndim == 3:
        return name, f"batch of {p.shape[0]} matrices", False
    return name, "hidden matrix", False


def _experts_of_a_bias(owner: nn.Module, own: str, p: Tensor) -> int:
    """How many experts a 2-D parameter holds the biases of: (E, out) beside a stack of weights (E, ..., out, ...).

    gpt-oss has `gate_up_proj_bias` beside `gate_up_proj`. 0: it is no such parameter.
    """
    if p.ndim != 2 or not own.endswith("bias"):
        return 0
    stacks = (w.shape for w in owner.parameters(recurse=False) if w.ndim == 3)
    return p.shape[0] if any(p.shape[0] == s[0] and p.shape[1] in s[1:] for s in stacks) else 0


def _embeddings_and_heads(model: nn.Module) -> dict[int, tuple[str, bool]]:
    """For the id of a parameter: the reason, and whether it is a guess."""
    names = {id(p): name for name, p in model.named_parameters()}
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    tables = {
        id(module.weight): module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    }
    found: dict[int, tuple[str, bool]] = {key: ("embedding", False) for key in tables if key in names}
    for linear in linears:
        if id(linear.weight) in tables:
            found[id(linear.weight)] = ("embedding, tied to the output head", False)
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if isinstance(head, nn.Module) and isinstance(getattr(head, "weight", None), torch.Tensor):
        found.setdefault(id(head.weight), ("output head: named by get_output_embeddings()", False))
    if any(id(linear.weight) in tables for linear in linears) or isinstance(head, nn.Module):
        return found  # the head is known; a hidden layer may well be as wide as a table has rows
    rows = {module.num_embeddings: key for key, module in reversed(list(tables.items())) if key in names}
    wide = [linear for linear in linears if linear.out_features in rows]
    if wide:
        table = names[rows[wide[-1].out_features]]
        found.setdefault(id(wide[-1].weight), (f"output head: as many rows as the embedding {table!r}", len(wide) > 1))
    matrices = sum(p.ndim >= 2 for p in model.parameters())
    if not tables and linears and matrices > 1:
        found.setdefault(
            id(linears[-1].weight), ("output head: the last linear layer of a model without embeddings", True)
        )
    return found
