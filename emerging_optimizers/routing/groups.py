"""Parameter groups out of routes."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emerging_optimizers import registry
from emerging_optimizers.routing.choice import FROZEN
from emerging_optimizers.routing.plan import Route, RoutePlan


class Router:
    """Makes the groups of a model's parameters, now and for those that join the model later.

    Args:
        model: held weakly.
        replan: makes a plan of a model.
        options: of each optimizer that the call named.
        rest: what holds for every other one.
        order: the optimizers whose groups come first.
    """

    def __init__(
        self,
        model: nn.Module,
        replan: Callable[[nn.Module], RoutePlan],
        options: Mapping[str, Mapping[str, Any]],
        rest: Mapping[str, Any],
        order: Sequence[str],
    ) -> None:
        self._model, self._replan = weakref.ref(model), replan
        self._options, self._rest = options, rest
        self._order = {name: k for k, name in enumerate(order)}

    def groups(self, routes: Iterable[Route]) -> list[dict[str, Any]]:
        """Groups of the parameters of some routes; the main algorithm's are the first, which loggers show."""
        model = self._model()
        assert model is not None
        parameters = dict(model.named_parameters())
        groups: dict[Any, dict[str, Any]] = {}
        roles: dict[Any, dict[str, None]] = {}
        for route in routes:
            route = route.later or route
            if route.optimizer == FROZEN:
                continue
            rate = id(route.lr) if isinstance(route.lr, Tensor) else route.lr
            options = repr(sorted(route.options.items()))
            key = (route.optimizer, rate, route.decays, route.view, route.factor_rows, options)
            if key not in groups:
                groups[key] = {
                    **self._options_of(route),
                    "algorithm": route.optimizer,
                    "params": [],
                    "reasons": [],
                }
            groups[key]["params"].append((route.name, parameters[route.name]))
            groups[key]["reasons"].append(route.reason)
            roles.setdefault(key, {})[_IN_WORDS.get(route.role, route.role)] = None
        keys = sorted(groups, key=lambda key: self._order.get(key[0], len(self._order)))
        names = _unlike(f"{key[0]}: {_some(list(roles[key]))}" for key in keys)
        return [{**groups[key], "name": name} for key, name in zip(keys, names, strict=True)]

    def _options_of(self, route: Route) -> dict[str, Any]:
        asked = {**self._options.get(route.optimizer, self._rest), "lr": route.lr}
        if route.view != "auto":
            asked["matrix_view"] = route.view
        if route.factor_rows is not None:
            asked["out_features"] = route.factor_rows
        if not route.decays:
            asked["weight_decay"] = 0.0
        return group_options(route.optimizer, {**asked, **route.options})

    def groups_of(self, group: Mapping[str, Any], main_lr: Any) -> list[dict[str, Any]] | None:
        """A group that names no algorithm, as groups of what its parameters are in the model; None: some are not in it.

        Its "lr" is the main algorithm's; the others' are in proportion.
        """
        model = self._model()
        params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        given = {id(p[1] if isinstance(p, tuple) else p) for p in params}
        names = {} if model is None else {name for name, p in model.named_parameters() if id(p) in given}
        if model is None or len(names) < len(given):
            return None
        groups = self.groups(route for route in self._replan(model) if route.name in names)
        rest = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        factor = float(rest.pop("lr", main_lr)) / float(main_lr)
        return [{**made, "lr": made["lr"] * factor, **rest} for made in groups]


def group_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All hyper-parameters of a group of the optimizer `name`; raises as its constructor does."""
    nothing = torch.zeros(0, 2, device="cpu")  # which any matrix view fits
    return dict(registry.entry(name).load()([nothing], **options).defaults)


# What a group's name says of the roles in it.
_IN_WORDS = {
    "hidden": "hidden matrices",
    "conv": "convolutions",
    "experts": "experts",
    "embedding": "embeddings",
    "position": "positions",
    "head": "heads",
    "vector": "vectors",
    "table": "tables",
}


def _some(words: Sequence[str]) -> str:
    return ", ".join(words[:3]) + (", ..." if len(words) > 3 else "")


def _unlike(names: Iterable[str]) -> Iterator[str]:
    """The names, with a number where one comes again."""
    seen: Counter[str] = Counter()
    for name in names:
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name} {seen[name]}"
