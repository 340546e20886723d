"""One torch optimizer whose parameter groups follow different rules."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import isfunction
from typing import Any

import torch
from torch import Tensor

from emerging_optimizers import registry
from emerging_optimizers.distributed.dtensor import is_gathered
from emerging_optimizers.engine import RuleOptimizer
from emerging_optimizers.engine.checkpoint import RenameT, plain_names
from emerging_optimizers.engine.rule import Rule
from emerging_optimizers.engine.validate import place
from emerging_optimizers.linalg.precision import newton_schulz_in_words
from emerging_optimizers.routing.choice import default_lr
from emerging_optimizers.routing.groups import Router, Waiting, group_options
from emerging_optimizers.routing.plan import RoutePlan

LOOK_EVERY = 100  # steps, at the model itself


class RoutedOptimizer(RuleOptimizer):
    """What `create_optimizer(name, model)` returns; a group's entry "algorithm" names its rule.

    Schedulers, checkpoints and trainers see one optimizer. A checkpoint carries the route of every parameter; loading
    one whose routes differ is an error that lists the difference.

    Attributes:
        plan: the route plan that it was made from; None for a copy or after unpickling from elsewhere.
    """

    _kept = ("execution", "plan", "_waiting", "_strict")
    _router: Router | None = None  # a copy has none
    _steps = 0
    _strict = False  # in pickles from before there was one

    def __init__(
        self,
        groups: list[dict[str, Any]],
        plan: RoutePlan | None = None,
        *,
        defaults: Mapping[str, Any],
        router: Router | None = None,
        waiting: Sequence[Waiting] = (),
        strict: bool = False,
        **engine: Any,
    ) -> None:
        self.plan, self._router, self._waiting, self._strict = plan, router, [*waiting], strict
        super().__init__(groups, {}, **engine)
        self.defaults = dict(defaults)  # the main algorithm's, which schedulers read; each group has its own options

    def __repr__(self) -> str:
        return super().__repr__() + newton_schulz_in_words(devices_that_cast(self))

    @property
    def plan(self) -> RoutePlan | None:
        """See the class; with who works on what now. A process may ask alone."""
        routes: RoutePlan | None = self.__dict__.get("plan")
        work = super().plan
        return replace(routes, work=work) if routes is not None and work.is_shared else routes

    @plan.setter
    def plan(self, value: RoutePlan | None) -> None:
        self.__dict__["plan"] = value

    def _algorithm(self, group: Mapping[str, Any]) -> type[RuleOptimizer]:
        algorithm: type[RuleOptimizer] = registry.entry(group["algorithm"]).load()
        return algorithm

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its "algorithm" is a registry name, whose defaults fill what the group does not set.

        Without "algorithm", parameters of the model go where the plan sends them, in as many groups as that takes;
        an "lr" is then the main algorithm's, and the others' are in proportion.
        """
        if "algorithm" not in param_group:
            taken = [group["name"] for group in self.param_groups if "name" in group]
            groups = None if self._router is None else self._router.groups_of(param_group, self.defaults["lr"], taken)
            if groups is None:
                raise ValueError(
                    'RoutedOptimizer: a parameter group needs "algorithm", a name of list_optimizers(); the groups of '
                    "this optimizer follow different rules, and not all of these parameters are in its model"
                )
            before = len(self.param_groups)
            try:
                for group in groups:
                    self.add_param_group(group)
            except BaseException:
                del self.param_groups[before:]
                raise
            return
        self._check_names(param_group)
        _check_overrides(self._algorithm(param_group))
        defaults, self.defaults = self.defaults, {}  # torch would fill the group with them
        try:
            super().add_param_group({**self._defaults_of(param_group), **param_group})
        finally:
            self.defaults = defaults

    def _take_in(self) -> None:
        """Let what requires a gradient by now join its group, unless somebody has put it into another one."""
        ready = [x for x in self._waiting if x.p.requires_grad]
        if not ready:
            return
        taken = {id(p) for group in self.param_groups for p in group["params"]}
        by_name = {group.get("name"): group for group in self.param_groups}
        for x in ready:
            group = by_name.get(x.group)
            if group is not None and id(x.p) not in taken:
                for key, value in (("params", x.p), ("param_names", x.name), ("reasons", x.reason)):
                    group.setdefault(key, []).append(value)
        self._waiting = [x for x in self._waiting if not x.p.requires_grad]

    def _step(self) -> None:
        # A step that would move nothing looks at the model, too, so that parameters which are gone are soon found.
        if self._steps % LOOK_EVERY == 0 or all(p.grad is None for group in self.param_groups for p in group["params"]):
            self._look()
        self._take_in()
        self._steps += 1
        super()._step()

    def _look(self) -> None:
        """At the parameters that the model has by now; what waits may have been replaced like the others."""
        theirs = {} if self._router is None else self._router.parameters()
        self._waiting = [x._replace(p=theirs.get(x.name, x.p)) for x in self._waiting]
        self._check_alive(theirs)

    def _checked(self) -> list[Rule]:
        rules = super()._checked()
        gathered = [
            place(group, index, i)
            for index, group in enumerate(self.param_groups if self._strict else ())
            for i, p in enumerate(group["params"])
            if is_gathered(p)
        ]
        if gathered:
            raise ValueError(
                f"{self._name}: strict=True, and the gradients of {', '.join(gathered)} would be gathered to every "
                "rank: they are sharded, and their parameters lie as copies. Shard the parameters as well, or "
                "redistribute the gradients to Replicate() yourself"
            )
        return rules

    def _check_alive(self, theirs: Mapping[str, Tensor]) -> None:
        """Raise where the model has other parameters by now: those that are here would never get a gradient again."""
        mine = [p for group in self.param_groups for p in group["params"]]
        if all(p.grad is not None for p in mine):
            return
        known = {id(p) for p in mine}
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        dead = [name for name in names if name in theirs and id(theirs[name]) not in known]
        if dead:
            raise ValueError(
                f"{self._name}: the model has other parameters by now under {', '.join(dead[:3])}"
                f"{', ...' if len(dead) > 3 else ''} than the optimizer, and those here would never move. fully_shard, "
                "parallelize_module and to_empty replace parameters: make the optimizer after them, or put the new "
                "ones into param_groups"
            )

    def load_state_dict(self, state_dict: dict[str, Any], rename: RenameT | None = None) -> None:
        """See `RuleOptimizer`; what requires a gradient by now belongs to it."""
        self._take_in()
        super().load_state_dict(state_dict, rename)

    def _defaults_of(self, group: Mapping[str, Any]) -> Mapping[str, Any]:
        name = group["algorithm"]
        return group_options(name, {"lr": group["lr"] if "lr" in group else default_lr(name)})

    def _as_here(self, incoming: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint of torch.optim.AdamW(model.parameters()) in the groups that are here.

        Learning rate, betas and epsilon are the checkpoint's; which parameters decay is the plan's.
        """
        saved = incoming["param_groups"]
        mine = {name: group for group in self.param_groups for name in group.get("param_names", ())}
        order = [route.name for route in self.__dict__.get("plan") or () if route.name in mine]
        alike = all(group["algorithm"] == "adamw" for group in self.param_groups)
        if not alike or len(saved) != 1 or "algorithm" in saved[0] or len(saved[0]["params"]) != len(order):
            return incoming
        ids = dict(zip(order, saved[0]["params"], strict=True))
        told = {key: saved[0][key] for key in ("lr", "initial_lr", "betas", "eps") if key in saved[0]}
        groups = [
            {**group, **told, "params": [ids[name] for name in group["param_names"]]} for group in self.param_groups
        ]
        return {**incoming, "param_groups": groups}

    def _check_route(self, saved_groups: Sequence[Mapping[str, Any]]) -> None:
        mine, saved = _routes(self.param_groups), _routes(_named(saved_groups, self.param_groups))
        lines = [
            f"{name}: {saved.get(name, 'absent')} in the checkpoint, {mine.get(name, 'absent')} here"
            for name in sorted(mine.keys() | saved.keys())
            if mine.get(name) != saved.get(name)
        ]
        if lines:
            raise ValueError(
                "the routes of the checkpoint differ from this optimizer's:\n  "
                + "\n  ".join(lines)
                + "\nCreate the optimizer with the arguments of the run that wrote it, or name the routes in overrides."
            )


def devices_that_cast(optimizer: RuleOptimizer) -> list[torch.device]:
    """Where the parameters lie whose Newton-Schulz multiplies in what "medium" is there."""
    groups = [
        group
        for group in optimizer.param_groups
        if (casts := getattr(optimizer._algorithm(group), "casts", None)) and casts(group)
    ]
    return [p.device for group in groups for p in group["params"]]


def _named(saved: Sequence[Mapping[str, Any]], mine: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Groups of a checkpoint that were saved without names (torchtitan's are), with those in the same place here."""
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in mine]:
        return saved
    return [
        {**group, "param_names": here["param_names"]} if "param_names" in here and "param_names" not in group else group
        for group, here in zip(saved, mine, strict=True)
    ]


def _routes(groups: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {
        name: group.get("algorithm", "unknown")
        for group in groups
        for name in plain_names(group) or [f"parameter {i}" for i in range(len(group["params"]))]
    }


def _check_overrides(cls: type[RuleOptimizer]) -> None:
    """Raise ValueError for a user's class whose methods would not be called here, where groups have rules alone."""
    for name in cls.foreign([*_OF_AN_OPTIMIZER, *cls.overridable, *cls.uncalled]):
        raise ValueError(
            f"{cls.__name__}.{name} of {getattr(cls, name).__module__} is not called in an optimizer of several "
            f"algorithms; give {cls.__name__} its parameters itself, or a rule of its own"
        )


# Methods of one optimizer, not of a group: this optimizer's are called.
_OF_AN_OPTIMIZER = [
    name
    for base in (RuleOptimizer, torch.optim.Optimizer)
    for name, value in vars(base).items()
    if isfunction(value) and not name.startswith("__")
]
