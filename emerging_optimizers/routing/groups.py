"""Parameter groups out of routes."""

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from emerging_optimizers import registry
from emerging_optimizers.routing.choice import FROZEN
from emerging_optimizers.routing.plan import Route, RoutePlan


class Waiting(NamedTuple):
    """A parameter that does not require a gradient yet, and the name of the group that it joins then."""

    name: str
    p: Tensor
    reason: str
    group: str


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

    def parameters(self) -> dict[str, Tensor]:
        """The model's parameters as they are now; none where it is gone."""
        model = self._model()
        return {} if model is None else dict(model.named_parameters())

    def groups(
        self, routes: Iterable[Route], taken: Collection[str] = ()
    ) -> tuple[list[dict[str, Any]], list[Waiting]]:
        """Groups of the parameters of some routes, none named as in `taken`, and what joins them later.

        The main algorithm's groups are the first, which loggers show. A group in which everything waits is there too,
        so that schedulers know it.
        """
        model = self._model()
        assert model is not None
        parameters = dict(model.named_parameters())
        members: dict[Any, list[Route]] = {}
        for route in routes:
            for_now = route.later or route
            if for_now.optimizer != FROZEN:
                rate = id(for_now.lr) if isinstance(for_now.lr, Tensor) else for_now.lr
                options = repr(sorted(for_now.options.items()))
                key = (
                    for_now.optimizer,
                    rate,
                    for_now.decays,
                    for_now.view,
                    for_now.factor_rows,
                    for_now.factor,
                    options,
                )
                members.setdefault(key, []).append(route)
        keys = sorted(members, key=lambda key: self._order.get(key[0], len(self._order)))
        names = _unlike((f"{key[0]}: {_some(members[key])}" for key in keys), taken)
        groups, waiting = [], []
        for key, name in zip(keys, names, strict=True):
            now = [route for route in members[key] if route.later is None]
            groups.append(
                {
                    **self._options_of(members[key][0].later or members[key][0]),
                    "algorithm": key[0],
                    "params": [(route.name, parameters[route.name]) for route in now],
                    "reasons": [route.reason for route in now],
                    "name": name,
                    **({} if now else {"param_names": []}),  # torch takes the others' from "params"
                }
            )
            waiting += [
                Waiting(route.name, parameters[route.name], route.later.reason, name)
                for route in members[key]
                if route.later is not None
            ]
        return groups, waiting

    def _options_of(self, route: Route) -> dict[str, Any]:
        asked = {**self._options.get(route.optimizer, self._rest), "lr": route.lr}
        if route.view != "auto":
            asked["matrix_view"] = route.view
        if route.factor_rows is not None:
            asked["out_features"] = route.factor_rows
        if not route.decays:
            asked["weight_decay"] = 0.0
        asked |= route.options
        if route.factor is not None:  # lr x decay stays AdamW's
            asked["weight_decay"] = asked["weight_decay"] / route.factor
        return group_options(route.optimizer, asked)

    def groups_of(self, group: Mapping[str, Any], main_lr: Any, taken: Collection[str]) -> list[dict[str, Any]] | None:
        """A group that names no algorithm, as groups of what its parameters are in the model; None: some are not in it.

        Its "lr" is the main algorithm's; the others' are in proportion.
        """
        model = self._model()
        params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        given = {id(p[1] if isinstance(p, tuple) else p) for p in params}
        names = {} if model is None else {name for name, p in model.named_parameters() if id(p) in given}
        if model is None or len(names) < len(given):
            return None
        routes = (route.later or route for route in self._replan(model) if route.name in names)
        groups, _ = self.groups(routes, taken)
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


def _some(routes: Sequence[Route]) -> str:
    words = list(dict.fromkeys(_IN_WORDS.get(route.role, route.role) for route in routes))
    return ", ".join(words[:3]) + (", ..." if len(words) > 3 else "")


def _unlike(names: Iterable[str], taken: Collection[str]) -> Iterator[str]:
    """The names, with a number where one is taken or comes again."""
    seen = {*taken}
    for name in names:
        choices = (name, *(f"{name} {k}" for k in range(2, len(seen) + 3)))
        yield (chosen := next(choice for choice in choices if choice not in seen))
        seen.add(chosen)
