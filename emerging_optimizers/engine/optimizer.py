"""The only `step()` of the library.

Life of a step: hyper-parameters, groups and gradients are checked; what users did since the last step is taken over;
then, bucket by bucket and chunk by chunk: rows that have gradients -> stack in float32 -> l2 decay -> rule -> what the
rule prepares for its next step -> weights and state written together. What `step` promises when something raises stands
in its docstring.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields
from functools import wraps
from inspect import Parameter, signature
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from emerging_optimizers import registry
from emerging_optimizers.engine import checkpoint
from emerging_optimizers.engine.ahead import Ahead
from emerging_optimizers.engine.ambient import undisturbed
from emerging_optimizers.engine.buckets import Bucket
from emerging_optimizers.engine.checkpoint import RenameT
from emerging_optimizers.engine.chunks import Chunk
from emerging_optimizers.engine.executors import many_graphs
from emerging_optimizers.engine.filling import adopt, fill_buckets, keys_of
from emerging_optimizers.engine.hooks import InPlaceLaw, Law, WeightUpdateHookT, make_hook
from emerging_optimizers.engine.matrix_view import blocks
from emerging_optimizers.engine.options import (
    LEARNING_RATE,
    NON_NEGATIVE,
    Check,
    Declared,
    EngineOptions,
    Execution,
    declared,
    one_of,
    options_in,
    with_arguments,
)
from emerging_optimizers.engine.parts import lost, rounded_parts
from emerging_optimizers.engine.rounding import MOST
from emerging_optimizers.engine.rule import Rule, Where, reason, rule_of, starts
from emerging_optimizers.engine.run import BucketStep
from emerging_optimizers.engine.units import LONG_STREAK, state_dtype
from emerging_optimizers.engine.validate import check_group, label, misspelled, place, plain_options, suggest
from emerging_optimizers.engine.weight_decay import WeightDecayT

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LAYOUT = attrgetter("layout")


def _eager(function: FunctionT) -> FunctionT:
    """Keep a function out of a graph that the user compiles around it; the engine compiles rules itself.

    As torch.optim does it: `torch.compiler.disable` would import dynamo with this module, a second or more.
    """
    return torch._disable_dynamo(function)  # type: ignore[attr-defined, return-value]  # torch.optim's own, untyped


class RuleOptimizer(torch.optim.Optimizer):
    """A torch optimizer that applies a `Rule`; subclasses name the rule, the ranges and the arguments.

    Args:
        params: tensors, (name, tensor) pairs, or groups, as for any torch optimizer.
        defaults: the hyper-parameters of a group that does not set them; static ones too.
        **engine: see `EngineOptions`.

    Raises:
        TypeError: an unknown keyword argument.
        ValueError: a hyper-parameter out of its range, or a parameter that the rule cannot update; the message
            names it. The optimizer, its state and the parameters are as before.
    """

    rule: ClassVar[type[Rule]]
    # What each option may be and what it is where nothing is said, by the constructors of a class and its bases.
    ranges: ClassVar[Mapping[str, Check]] = {
        "lr": LEARNING_RATE,
        "weight_decay": NON_NEGATIVE,
        "weight_decay_method": one_of(*get_args(WeightDecayT)),
        **{name: option.check for name, option in options_in(EngineOptions).items()},
    }
    preset: ClassVar[Mapping[str, Any]] = {
        "weight_decay": 0.0,
        "weight_decay_method": "decoupled",
        **{name: option.default for name, option in options_in(EngineOptions).items()},
    }
    # Options of the base that a class does not leave open: they are in no group and in no checkpoint.
    fixed: ClassVar[Mapping[str, Any]] = {}
    _arguments: ClassVar[tuple[tuple[str, str], ...]] = ()
    # Attributes beside torch's that a pickle or a copy keeps.
    _kept: ClassVar[tuple[str, ...]] = ("execution",)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        said = declared(vars(cls)["__init__"]) if "__init__" in vars(cls) else Declared(arguments=cls._arguments)
        ranges: dict[str, Check] = {}
        preset: dict[str, Any] = {}
        for base in reversed(cls.__mro__[1:]):
            ranges |= vars(base).get("ranges", {})
            preset |= vars(base).get("preset", {})
        ranges |= {**said.ranges, **vars(cls).get("ranges", {})}
        cls.ranges = {name: check for name, check in ranges.items() if name not in cls.fixed}
        cls.preset = {**preset, **said.defaults, **vars(cls).get("preset", {})}
        cls._arguments = said.arguments
        if "__init__" in vars(cls):
            cls.__init__ = _asking_for_lr(cls.__init__)  # type: ignore[method-assign]  # the same signature
        cls.__doc__ = with_arguments(cls.__doc__, said.arguments)

    def __init__(self, params: ParamsT, defaults: Mapping[str, Any] | None = None, **options: Any) -> None:
        options = {name: value for name, value in options.items() if name not in self.fixed}
        self.execution: Execution = options.pop("execution", "stacked")
        if self.execution not in get_args(Execution):
            raise ValueError(
                f"{self._name}: execution={self.execution!r} is not one of {', '.join(get_args(Execution))}"
            )
        for name in options.keys() - self.ranges.keys():
            raise TypeError(f"{self._name} has no argument {name!r}{suggest(name, self.ranges)}")
        defaults = {**self.preset, **(defaults or {}), **options}
        self._ahead = Ahead()
        self._events: dict[Tensor, Tensor] = {}
        self._foreign: frozenset[str] = frozenset()
        self._told: set[int] = set()  # groups whose updates are rounded away
        self._forget_stacks()
        super().__init__(params, plain_options(defaults, defaults))

    @property
    def _name(self) -> str:
        return type(self).__name__

    if not TYPE_CHECKING:  # where a misspelled attribute is an error

        def __getattr__(self, name: str) -> Any:
            """An option, as groups that do not set it have it."""
            try:
                return {**type(self).fixed, **self.__dict__["defaults"]}[name]
            except KeyError:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None

        def __setattr__(self, name: str, value: Any) -> None:
            """Anything; an option is set in every group."""
            if name in self.fixed:
                raise ValueError(f"{self._name}: {name}={value!r} is not possible; it is {self.fixed[name]!r} here")
            if "param_groups" in self.__dict__ and name in self.ranges:
                for group in (self.defaults, *self.param_groups):
                    group[name] = value
            else:
                super().__setattr__(name, value)

    # ---- what a subclass may say about a group ------------------------------------------------------------------

    def _algorithm(self, group: Mapping[str, Any]) -> "type[RuleOptimizer]":
        """The class whose rule and ranges hold for a group."""
        return type(self)

    def _defaults_of(self, group: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a group has where it says nothing."""
        return self.defaults

    def _make_rule(self, group: Mapping[str, Any]) -> Rule:
        """The rule of a group whose hyper-parameters have been checked."""
        return self._algorithm(group)._rule(group)

    @classmethod
    def _rule(cls, group: Mapping[str, Any]) -> Rule:
        """The rule of a group that follows this class, wherever it is."""
        return rule_of(cls.rule, {**group, **cls.fixed})

    @classmethod
    def _check_choice(cls, group: Mapping[str, Any]) -> None:
        """Raise ValueError for a combination of hyper-parameters; each is in its range already."""

    @classmethod
    def _announce(cls, group: Mapping[str, Any]) -> None:
        """Warn about a legal choice that may surprise; once, when a group is added."""

    def _check_route(self, saved_groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise for the parameter groups of a checkpoint that do not belong to this optimizer."""

    # ---- groups -------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; it is checked whole, and not added if it is refused."""
        self._check_names(param_group)
        super().add_param_group(plain_options(param_group, self.defaults))
        index = len(self.param_groups) - 1
        try:
            rule = self._checked_rule(index)
            self._check_members(index, rule)
            algorithm = self._algorithm(self.param_groups[index])
            algorithm._announce(self.param_groups[index])
            registry.caution(algorithm, self.param_groups[index]["lr"])
        except Exception:  # of whatever kind: a refused group leaves nothing behind
            self._rules.pop(index, None)
            self.param_groups.pop()
            raise

    def _check_names(self, group: Mapping[str, Any]) -> None:
        """Raise for an entry that is a misspelled option; every other one is the user's."""
        known, fixed = self._defaults_of(group), self._algorithm(group).fixed
        for name in group:
            if name in fixed and group[name] != fixed[name]:
                raise ValueError(
                    f"{self._name}: a parameter group sets {name}={group[name]!r}, which is {fixed[name]!r} for "
                    f"{self._algorithm(group).__name__}; leave it out"
                )
            if meant := misspelled(name, known):
                raise ValueError(
                    f"{self._name}: a parameter group sets {name!r}, which is not an option; did you mean {meant!r}?"
                )

    def _checked_rule(self, index: int) -> Rule:
        """The rule of a group; built and checked again only where a value of the group has changed."""
        group = self.param_groups[index]
        algorithm = self._algorithm(group)
        ranges = algorithm.ranges
        known = self._rules.get(index)
        if known is None or len(group) != known.entries:
            self._check_names(group)
            if lacking := ranges.keys() - group.keys():  # a user has put it together
                defaults = self._defaults_of(group)
                group.update({name: defaults[name] for name in lacking})
        given = [*map(group.__getitem__, ranges)]
        if known is not None and all(map(is_, given, known.given)):
            return known.rule
        options = plain_options(group, ranges)
        if known is not None and known.values == _identities(options, ranges):
            group.update({name: options[name] for name in ranges})
            self._rules[index] = known._replace(given=[*map(group.__getitem__, ranges)])
            return known.rule
        check_group(algorithm.__name__, f"param_groups[{index}]", options, ranges)
        algorithm._check_choice(options)
        rule = self._make_rule(options)
        self._check_hook(rule, options, algorithm.__name__)
        self._check_rounding(rule, options, algorithm.__name__)
        law = self._law(rule, options)
        if self.execution == "compiled" and ("parameters" in rule.reads or isinstance(law, InPlaceLaw)):
            raise ValueError(
                f"{self._name}: execution='compiled' cannot run a rule that is given by a Python function of one "
                "parameter; use execution='stacked' or 'per_matrix'"
            )
        if known is None or known.rule != rule:
            for i, p in enumerate(group["params"]):
                if p.numel() and (obstacle := rule.obstacle(Where(p.dtype, p.device, max(2, p.ndim)))):
                    raise ValueError(f"{algorithm.__name__}: {label(group, i, p)}: {obstacle}")
        if options["capturable"]:
            self._make_capturable(rule, options, f"{algorithm.__name__}: param_groups[{index}]")
        group.update({name: options[name] for name in ranges})
        rule = self._make_rule(group)  # a function of the user's reads the group itself, whenever it is called
        if known is not None and known.rule == rule:
            rule = known.rule
        given = [*map(group.__getitem__, ranges)]
        self._rules[index] = _Checked(given, _identities(group, ranges), len(group), rule)
        return rule

    def _check_members(self, index: int, rule: Rule) -> None:
        """Raise for a parameter of a group that the rule cannot update."""
        group = self.param_groups[index]
        owner = self._algorithm(group).__name__
        for i, p in enumerate(group["params"]):
            self._check_parameter(p, rule, label(group, i, p), owner)
            self._check_view(p, rule, group, label(group, i, p))

    def _law(self, rule: Rule, group: Mapping[str, Any]) -> Law | None:
        """The law by which the weights of a group move, if it is not the ordinary one."""
        return rule.weight_law or make_hook(group["weight_update_hook"])

    @staticmethod
    def _make_capturable(rule: Rule, group: dict[str, Any], owner: str) -> None:
        """Put the learning rate where a graph finds it, or raise ValueError."""
        if obstacle := reason(rule, Where(torch.float32, torch.device("cpu")), capturable=True):
            raise ValueError(f"{owner}: capturable=True is not possible: {obstacle}")
        if group["nonfinite"] == "raise":
            raise ValueError(
                f"{owner}: capturable=True is not possible with nonfinite='raise', which reads the gradients on the "
                "host; give nonfinite='skip'"
            )
        lr, devices = group["lr"], {p.device for p in group["params"] if p.numel()}
        if len(devices) > 1:
            raise ValueError(
                f"{owner} has parameters on {', '.join(sorted(map(str, devices)))}, and with capturable=True the "
                "learning rate is on one device; make a group for each"
            )
        for device in devices:
            if isinstance(lr, Tensor):
                if lr.device != device:
                    raise ValueError(
                        f"{owner}: lr is a tensor on {lr.device} and the parameters are on {device}, and with "
                        "capturable=True nothing is copied between them in a step; give lr.to(device), or a number"
                    )
            elif _is_capturing():
                raise ValueError(
                    f"{owner}: lr={lr!r} is a number, which the CUDA graph that is recorded would keep for ever; it "
                    "was set after the last step. Take a step before the capture, or fill the tensor in place: "
                    "group['lr'].fill_(...)"
                )
            else:  # in float64, so that it is the number
                group["lr"] = torch.full((), lr, dtype=torch.float64, device=device)

    @staticmethod
    def _check_rounding(rule: Rule, group: Mapping[str, Any], owner: str) -> None:
        if group["state_dtype"] is None:
            return
        state = rule.init((1, 2, 2)[: 1 if rule.elementwise else 3], torch.float32, torch.device("meta"))
        if not rounded_parts(state):
            raise ValueError(
                f"{owner}: state_dtype={group['state_dtype']} is not possible: of its state "
                f"({', '.join(state._fields)}) nothing bears rounding; leave it None"
            )

    @staticmethod
    def _check_hook(rule: Rule, group: Mapping[str, Any], owner: str) -> None:
        hook = make_hook(group["weight_update_hook"])
        if hook is None:
            return
        given = f"{owner}: weight_update_hook={group['weight_update_hook']!r} is not possible"
        if rule.weight_law is not None:
            raise ValueError(f"{given}: the optimizer has a law of its own for the weight; leave it None")
        if hook.matrices_only and rule.elementwise:
            raise ValueError(f"{given}: it is about singular values, and this optimizer is element-wise; leave it None")

    @staticmethod
    def _check_parameter(p: Tensor, rule: Rule, label: str, owner: str) -> None:
        if p.dtype not in DTYPES:
            raise ValueError(f"{owner}: {label} has dtype {p.dtype}; allowed are {', '.join(map(str, DTYPES))}")
        if p.layout != torch.strided:
            raise ValueError(f"{owner}: {label} has layout {p.layout}; only dense tensors can be updated")
        if hasattr(p, "placements"):
            raise ValueError(f"{owner}: {label} is a DTensor; sharded parameters are not supported yet")
        if p.ndim < 2 and reason(rule, Where(p.dtype, p.device), ndim=p.ndim):
            raise ValueError(
                f"{owner} updates matrices, and {label} is not one. Give vectors and scalars to an "
                f"element-wise optimizer such as AdamW, or call create_optimizer({owner.lower()!r}, model), which "
                "does that and keeps one optimizer."
            )

    def _check_view(self, p: Tensor, rule: Rule, group: Mapping[str, Any], label: str) -> None:
        if p.numel():
            try:
                blocks(p, rule.elementwise, group["matrix_view"])
            except ValueError as wrong:
                raise ValueError(f"{self._algorithm(group).__name__}: {label}: {wrong}") from None

    # ---- state --------------------------------------------------------------------------------------------------

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """As in torch. What is still prepared for the next step comes before whatever is launched with it from here."""
        if self._ahead.streams and not _is_capturing():  # a graph begins with nothing under way
            self._ahead.wait()
        return self.__dict__["state"]

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self.__dict__["state"] = value

    def _forget_stacks(self) -> None:
        """Drop what is derived from groups and `state`; the next step builds it again from them."""
        self._rules: dict[int, _Checked] = {}
        self._buckets: list[tuple[int, Bucket]] = []
        self._homes: dict[Tensor, list[tuple[Bucket, int]]] = {}
        self._placed: list[_Placed] = []  # of each group
        self._seen: tuple[list[int], list[str], list[int]] | None = None

    @undisturbed
    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = True) -> None:
        """Create the state of a group's parameters now instead of in the first step."""
        rules = [self._checked_rule(index) for index in range(len(self.param_groups))]
        self._place(rules, None if skip_non_grad_params else group)

    def _place(self, rules: Sequence[Rule], eager: dict[str, Any] | None = None) -> None:
        """Give parameters their places in stacks, as groups and `state` are now, and take over what they say.

        A group keeps its stacks while it has the same parameters, of the same kinds, and a rule with the same state;
        otherwise they are made anew out of `state`, so that they never depend on how the groups came about. All that
        can raise does so before anything is installed.

        Args:
            rules: of the groups.
            eager: a group whose frozen parameters get state too.
        """
        everything = self.state
        members = [[*map(id, group["params"])] for group in self.param_groups]
        placed = self._placed
        stale = {i for i, ids in enumerate(members) if i >= len(placed) or placed[i].members != ids}
        if stale or len(placed) > len(members):
            self._check_twice()
        for index, bucket in self._buckets:
            if index not in stale and not (index < len(members) and bucket.fits()):
                stale.add(index)
        for index, rule in enumerate(rules):
            if index in stale:
                continue
            changed_rule = placed[index].rule is not rule or placed[index].options != _shaping(self.param_groups[index])
            if changed_rule and not self._keeps(index, rule):
                stale.add(index)
        for index, group in enumerate(self.param_groups):
            if index not in stale and (group is eager or placed[index].waiting):
                lacking = (p for p in group["params"] if p not in self._homes)
                if any(self._joins(p, everything, group is eager) for p in lacking):
                    stale.add(index)
        if not stale and self._seen == self._seen_now():  # as nearly always
            for _, bucket in self._buckets:
                bucket.follow_counts()
            return
        changed: list[tuple[Tensor, dict[str, Any]]] = []
        home_of = {id(p): index for index, bucket in self._buckets for p in bucket.parameters}
        for p in self._homes:
            if home_of[id(p)] in stale:
                continue
            state, views = everything.get(p), self._views(p)
            if not isinstance(state, dict) or not views.keys() & state.keys():  # deleted: it starts anew
                stale.add(home_of[id(p)])
            elif any(state.get(key) is not view for key, view in views.items()):
                changed.append((p, state))
        staged = {
            i: self._fill(i, rules[i], everything, self.param_groups[i] is eager)
            for i in sorted(stale)
            if i < len(rules)
        }
        # Nothing has changed so far.
        for p, state in changed:
            if home_of[id(p)] not in stale:
                for bucket, row in self._homes[p]:
                    adopt(bucket, row, state, self._label_of(p))
                everything[p] = {**state, **self._views(p)}
        for _, bucket in self._buckets:
            bucket.follow_counts()
        if stale:
            self._replace(stale, staged, rules)
        # What was taken over may go, and others come under its ids: then the next step looks again.
        self._seen = None if changed else self._seen_now()

    def _seen_now(self) -> tuple[list[int], list[str], list[int]]:
        """Parameters, keys and tensors of `state`, as three lists; no parameter is hashed."""
        everything = self.__dict__["state"]
        states = [state for state in everything.values() if isinstance(state, dict)]
        tensors = [*map(id, chain.from_iterable(map(dict.values, states)))]
        return [*map(id, everything)], [*chain.from_iterable(states)], tensors

    @staticmethod
    def _joins(p: Tensor, everything: Mapping[Tensor, Any], frozen_too: bool) -> bool:
        """Whether a parameter needs state."""
        return bool(p.numel()) and (p.requires_grad or p.grad is not None or bool(everything.get(p)) or frozen_too)

    def _fill(self, index: int, rule: Rule, everything: Mapping[Tensor, Any], frozen_too: bool) -> list[Bucket]:
        """New stacks of a group, with the state that there is."""
        group = self.param_groups[index]
        self._check_members(index, rule)
        joined = {p: i for i, p in enumerate(group["params"]) if self._joins(p, everything, frozen_too)}
        saved = {p: rule.translate(state) for p in joined if isinstance(state := everything.get(p), dict)}
        try:
            buckets = fill_buckets([(i, p) for p, i in joined.items()], group, rule, saved)
            keys = keys_of(buckets)
            for p in joined.keys() & self._homes.keys():
                left = self._views(p).keys() & saved.get(p, {}).keys() - keys[p]
                if left:
                    raise ValueError(f"the optimizer state of {label(group, joined[p], p)} also has {', '.join(left)}")
        except ValueError as wrong:
            ids = [*map(id, group["params"])]
            before = next((x for x in self._placed if x.members == ids), None)
            if before is None or not (names := before.differences(rule, group)):
                raise
            options = ", ".join(f"{name}={group[name]!r}" for name in names)
            raise ValueError(
                f"{self._algorithm(group).__name__}: param_groups[{index}] now has {options}, and its parameters have "
                f"state of another kind: {wrong}. Set the option back, or clear the state to start anew"
            ) from None
        return buckets

    def _keeps(self, index: int, rule: Rule) -> bool:
        """Whether the stacks of a group also serve a rule that has changed; it is then theirs."""
        group, placed = self.param_groups[index], self._placed[index]
        if placed.options != _shaping(group):
            return False
        if any(i == index and bucket.kind != bucket.kind_of(rule) for i, bucket in self._buckets):
            return False
        self._placed[index] = placed._replace(rule=rule)
        return True

    def _replace(self, stale: Container[int], staged: Mapping[int, list[Bucket]], rules: Sequence[Rule]) -> None:
        """Put new stacks in the place of those of some groups."""
        everything = self.state
        kept = [(i, bucket) for i, bucket in self._buckets if i not in stale]
        new = [(i, bucket) for i, buckets in staged.items() for bucket in buckets]
        buckets = sorted((*kept, *new), key=itemgetter(0))
        homes: dict[Tensor, list[tuple[Bucket, int]]] = {}
        for _, bucket in buckets:
            for row, p in enumerate(bucket.parameters):
                homes.setdefault(p, []).append((bucket, row))
        events = {**self._events}
        entries: dict[Tensor, dict[str, Any]] = {}
        for p in {p: None for _, bucket in (*self._buckets, *new) for p in bucket.parameters}:
            if p in self._homes and self._homes[p] == homes.get(p):
                continue
            state = state if isinstance(state := everything.get(p), dict) else {}
            mine: Mapping[str, Tensor] = self._views(p) if p in self._homes else {}
            if p in self._homes:
                events[p] = self._events_of(p)
            if p in homes:
                views = {key: view for bucket, row in homes[p] for key, view in bucket.published[row].items()}
                others = {key: x for key, x in state.items() if key not in views and key not in mine}
                entries[p] = {**views, **others}
            else:  # its entry keeps no stack alive
                entries[p] = {key: mine[key].clone() if mine.get(key) is x else x for key, x in state.items()}
        placed = [
            _Placed([*map(id, group["params"])], rule, _shaping(group), any(p not in homes for p in group["params"]))
            for rule, group in zip(rules, self.param_groups, strict=True)
        ]
        for _, bucket in new:  # which matrices have lost their state stands in it
            if (flags := lost(bucket.state)) is not None:
                bucket.post(flags)
        everything.update(entries)
        self._buckets, self._homes, self._placed, self._events = buckets, homes, placed, events

    def _start_guards(self) -> None:
        """Running means where a group asks for them."""
        for index, bucket in self._buckets:
            if self.param_groups[index]["spike_guard"] is not None and not bucket.guard:
                bucket.start_guard()
                for p in bucket.parameters:
                    self.state[p].update(self._views(p))
                self._seen = None

    def _views(self, p: Tensor) -> Mapping[str, Tensor]:
        """The state of a parameter: of all its blocks."""
        home = self._homes[p]
        if len(home) == 1:
            bucket, row = home[0]
            return bucket.published[row]
        return {key: view for bucket, row in home for key, view in bucket.published[row].items()}

    def _check_twice(self) -> None:
        """Raise for a parameter in two groups."""
        where: dict[Tensor, int] = {}
        for index, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if where.setdefault(p, index) != index:
                    raise ValueError(
                        f"{self._name}: {label(group, i, p)} is in param_groups[{where[p]}] and in "
                        f"param_groups[{index}]; leave it in one of them"
                    )

    def _label_of(self, p: Tensor) -> str:
        for group in self.param_groups:
            for i, q in enumerate(group["params"]):
                if p is q:
                    return label(group, i, p)
        return f"a parameter of shape {tuple(p.shape)}"

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in self._kept}
        events = {p: self._events_of(p) for p in (*self._homes, *self._events)}
        return {**super().__getstate__(), **kept, "_events": events, "_foreign": self._others()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in (("_ahead", Ahead()), ("_events", {}), ("_foreign", frozenset()), ("_told", set())):
            self.__dict__.setdefault(name, value)
        super().__setstate__(state)
        self._forget_stacks()
        for group in self.param_groups:  # a checkpoint from before an option existed
            for name, value in self._defaults_of(group).items():
                group.setdefault(name, value)

    def _others(self) -> frozenset[str]:
        """The keys of entries that somebody keeps beside ours."""
        if not self._homes:
            return self._foreign
        states = ((self._views(p), self.state.get(p)) for p in self._homes)
        return frozenset(key for views, state in states if isinstance(state, dict) for key in state if key not in views)

    def state_dict(self) -> dict[str, Any]:
        """As in torch, loadable with `weights_only=True`. The state's tensors are views of the live stacks.

        State of parameters that are in no group is left out. Beside torch's entries there are "format"; "events", the
        counts of `guard_events`; and "others", the keys of entries that somebody keeps beside the optimizer's own.
        """
        order = {p: i for i, p in enumerate(chain.from_iterable(group["params"] for group in self.param_groups))}
        everything = self.state
        inside = {key: x for key, x in everything.items() if not isinstance(key, Tensor) or key in order}
        try:
            self.state = defaultdict(dict, inside)
            packed = super().state_dict()
        finally:
            self.state = everything
        for group in packed["param_groups"]:
            hook = group["weight_update_hook"]
            if not (hook is None or isinstance(hook, (str, tuple))):  # code, which whoever resumes brings along
                del group["weight_update_hook"]
        events = {order[p]: self._events_of(p).tolist() for p in order if p in self._homes or p in self._events}
        return {
            **packed,
            "format": checkpoint.FORMAT,
            "events": {i: counts for i, counts in events.items() if any(counts)},
            "others": sorted(self._others()),
        }

    @undisturbed
    def load_state_dict(self, state_dict: dict[str, Any], rename: RenameT | None = None) -> None:
        """As in torch, but the state keeps its own dtype (torch casts it to the parameter's).

        Where parameters have names on both sides, the names say what belongs to what; otherwise the order does.

        Args:
            state_dict: what `state_dict()` returned.
            rename: of a checkpoint whose parameters had other names: a function from each name to the one that it has
                here, or a dictionary from beginnings of names to what stands there now (`{"encoder.": "trunk."}`).

        Raises:
            ValueError: the checkpoint does not belong to this optimizer, or a value in it is none; nothing has changed.
        """
        staged: dict[int, list[Bucket]] = {}
        hooks: list[WeightUpdateHookT] = []
        entries: dict[Any, Any] = {}
        events: dict[Tensor, Tensor] = {}

        def stage(_: Any, incoming: dict[str, Any]) -> dict[str, Any]:
            checkpoint.check_format(incoming)
            incoming = self._as_here(checkpoint.renamed(incoming, rename))
            self._check_route(incoming["param_groups"])
            incoming = checkpoint.arranged(self._name, self.param_groups, incoming)
            saved = checkpoint.state_by_parameter(self._name, self.param_groups, incoming)
            if saved is None:  # torch says what does not correspond
                return incoming
            others = set(incoming.get("others", ()))
            # What an older or a published checkpoint does not say, and what is code, stays as it is here.
            pairs = list(zip(self.param_groups, incoming["param_groups"], strict=True))
            groups = [self._checked_options(i, mine, theirs) for i, (mine, theirs) in enumerate(pairs)]
            hooks.extend(theirs.get("weight_update_hook", mine["weight_update_hook"]) for mine, theirs in pairs)
            for index, (mine, group) in enumerate(zip(self.param_groups, groups, strict=True)):
                members = [(i, p) for i, p in enumerate(mine["params"]) if p in saved]
                told = {**group, "params": mine["params"]}
                rule = self._make_rule(told)
                states = {p: rule.translate(saved[p]) for _, p in members}
                staged[index] = fill_buckets(members, told, rule, states, others)
                keys = keys_of(staged[index])
                for _, p in members:
                    left = states[p].keys() - keys[p]
                    entries[p] = {key: _copy_to(states[p][key], p.device) for key in left}
            ids = dict(zip(chain.from_iterable(g["params"] for g in incoming["param_groups"]),
                           chain.from_iterable(g["params"] for g in self.param_groups), strict=True))  # fmt: skip
            entries.update({key: deepcopy(x) for key, x in incoming["state"].items() if key not in ids})
            counts = incoming.get("events", {})
            events.update({ids[i]: torch.tensor(x, device="cpu") for i, x in counts.items() if i in ids})
            return {**incoming, "state": {}, "param_groups": groups}

        def install(_: Any) -> None:
            self._forget_stacks()
            self._foreign = frozenset()
            self.state.clear()
            self.state.update(entries)
            for group, hook in zip(self.param_groups, hooks, strict=True):
                group["weight_update_hook"] = hook  # itself; torch has copied it
            self._events = {}
            self._replace((), staged, [self._checked_rule(index) for index in range(len(self.param_groups))])
            self._events = events

        # Registered for this call alone, so that it sees what the user's own hooks have made of the checkpoint.
        before = self.register_load_state_dict_pre_hook(stage)
        after = self.register_load_state_dict_post_hook(install, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _as_here(self, incoming: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint of another kind in the form of one of this optimizer's."""
        return incoming

    def _checked_options(self, index: int, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
        """A group of a checkpoint, completed by the one that is here; it is checked like that."""
        algorithm = self._algorithm(mine)
        ranges = algorithm.ranges
        own = {key: mine[key] for key in ("param_names",) if key in mine}
        for name in theirs.keys() & algorithm.fixed.keys():  # written when it was an option
            if theirs[name] != algorithm.fixed[name]:
                raise ValueError(
                    f"{algorithm.__name__}: the checkpoint's param_groups[{index}] has {name}={theirs[name]!r}, and it "
                    f"is {algorithm.fixed[name]!r} for this optimizer"
                )
        theirs = {name: value for name, value in theirs.items() if name not in algorithm.fixed}
        group = plain_options({**mine, **theirs, **own, "params": theirs["params"]}, ranges)
        check_group(algorithm.__name__, f"the checkpoint's param_groups[{index}]", group, ranges)
        algorithm._check_choice(group)
        return group

    # ---- the step -----------------------------------------------------------------------------------------------

    @_eager
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient.

        Groups are read as they are now: parameters may have been moved, taken out or replaced since the last step. A
        learning rate of 0 moves no weight. Ambient settings (autocast, inference mode, the default dtype and device)
        change nothing; the closure runs under them.

        Whatever else is raised (memory runs out, a factorization fails, a hook raises, Ctrl-C), the weight, the state
        and the step count of each matrix have changed together or not at all, and the optimizer goes on working. What
        came before the error has taken its step: groups, and in them shapes, move one after the other. A parameter of
        an element-wise optimizer that is larger than a chunk may have moved in part. With `execution="compiled"` this
        does not hold for an interrupt inside of a compiled element-wise step.

        Args:
            closure: evaluates the model again and returns the loss; it runs with gradients enabled.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: a hyper-parameter, a group, a gradient or an entry of `state` that cannot be used; no weight and
                no state has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @undisturbed
    def _step(self) -> None:
        rules = [self._checked_rule(index) for index in range(len(self.param_groups))]
        self._check_gradients(rules)
        self._place(rules)
        if _is_capturing():
            self._check_capture(rules)
        self._start_guards()
        for index, bucket in self._buckets:
            if starts(rules[index]):
                self._start(bucket, rules[index], self.param_groups[index])
        with many_graphs(self.execution):
            for index, bucket in self._buckets:
                rule, group = rules[index], self.param_groups[index]
                BucketStep(bucket, rule, self._law(rule, group), group, self.execution, self._ahead).take()
                for row in bucket.skipped_for_long():
                    self._warn_of_skips(bucket.parameters[row], rule)
                if (share := bucket.unmoved_share()) > MOST and index not in self._told:
                    self._told.add(index)
                    self._warn_of_rounding(index, bucket, share)

    def _warn_of_skips(self, p: Tensor, rule: Rule) -> None:
        warnings.warn(
            f"{self._name}: the gradient of {self._label_of(p)} was not finite, or its norm above "
            f"{rule.largest_norm(p.dtype if p.dtype == torch.float64 else torch.float32):.1e}, in each of the last "
            f"{LONG_STREAK} steps, and the weight has not moved since. guard_events() counts the skipped steps of all "
            "parameters; nonfinite='raise' stops at the first one",
            UserWarning,
            stacklevel=2,
        )

    def _check_capture(self, rules: Sequence[Rule]) -> None:
        """Raise for a step that is recorded in a CUDA graph and that those which repeat it would not equal."""
        for index, (group, rule) in enumerate(zip(self.param_groups, rules, strict=True)):
            where = f"{self._name}: this step is recorded in a CUDA graph, and "
            if not group["capturable"]:
                raise ValueError(f"{where}param_groups[{index}] has capturable=False; make the optimizer with True")
            for i, p in enumerate(group["params"]):
                homes = self._homes.get(p, [])
                count = min((bucket.counts[row] for bucket, row in homes), default=0)
                settled = count > 0 and rule.schedule.phase(count + 1) is rule.schedule.phase(count + 2)
                if rule.schedule.behind:  # whose graph and handles for this phase come with its first time
                    settled = settled and rule.schedule.phase(count) is rule.schedule.phase(count + 1)
                guarded = group["spike_guard"] is None or all(bucket.guard for bucket, _ in homes)
                if p.grad is not None and p.numel() and not (settled and guarded):
                    raise ValueError(
                        f"{where}the next step of {label(group, i, p)}, its {count + 1}., differs from the later "
                        "ones, as it makes state; take three steps outside of a graph first"
                    )

    def _check_gradients(self, rules: Sequence[Rule]) -> None:
        for group, rule in zip(self.param_groups, rules, strict=True):
            raises = group["nonfinite"] == "raise"
            gradients = (g for p in group["params"] if (g := p.grad) is not None)
            if not raises and set(map(_LAYOUT, gradients)) <= {torch.strided}:
                continue
            for i, p in enumerate(group["params"]):
                if (grad := p.grad) is None:
                    continue
                if grad.layout != torch.strided:
                    raise ValueError(
                        f"{self._name}: the gradient of {label(group, i, p)} has layout {grad.layout}; only "
                        "dense gradients can be used (nn.Embedding(sparse=False))"
                    )
                if not raises:
                    continue
                dtype = state_dtype(p)
                norm, limit = torch.linalg.vector_norm(grad, dtype=dtype), rule.largest_norm(dtype)
                if not bool(norm <= limit):
                    what = f"has a norm above {limit:.1e}" if bool(grad.isfinite().all()) else "is not finite"
                    raise ValueError(
                        f"{self._name}: the gradient of {label(group, i, p)} {what}, and its group says "
                        "nonfinite='raise'; nothing has moved. nonfinite='skip' lets it sit the step out"
                    )

    def guard_events(self) -> dict[str, tuple[int, int]]:
        """How often each parameter's gradient was scaled down as a spike, and skipped as non-finite.

        Parameters without an event are left out; a batch of matrices counts each matrix. Waits for the device. The
        counts go into copies and checkpoints.
        """
        events: dict[str, tuple[int, int]] = {}
        for index, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                scaled, skipped = self._events_of(p).tolist()
                if scaled or skipped:
                    events[place(group, index, i)] = (scaled, skipped)
        return events

    def _events_of(self, p: Tensor) -> Tensor:
        """(2,): how often a parameter was scaled down, and skipped."""
        total = self._events.get(p, torch.zeros(2, dtype=torch.int64, device="cpu"))
        for bucket, row in self._homes.get(p, ()):
            total = total + torch.stack([bucket.unit_view(row, n).sum() for n in (bucket.scaled, bucket.skipped)]).cpu()
        return total

    @staticmethod
    def _start(bucket: Bucket, rule: Rule, group: Mapping[str, Any]) -> None:
        """Make the state of matrices before their first step, and of those that have lost it."""
        again = bucket.flagged()
        new = {
            i: p for i, p in enumerate(bucket.parameters) if p.grad is not None and (i in again or not bucket.counts[i])
        }
        counts = [0 if i in again else count for i, count in enumerate(bucket.counts)]
        if not new:
            bucket.counts = counts
            bucket.forget_flags()
            return
        chunk = Chunk(bucket, (bucket.whole[i] for i in new))
        order = {p: i for i, p in enumerate(group["params"])}
        labels = [label(group, order[p], p) for i, p in new.items() for _ in range(bucket.items(i))]
        state = rule.start(bucket.stack(chunk, new), labels)
        bucket.write(chunk, state)
        bucket.counts = counts
        bucket.forget_flags()

    def _warn_of_rounding(self, index: int, bucket: Bucket, share: float) -> None:
        warnings.warn(
            f"{self._name}: {share:.0%} of the weights in param_groups[{index}] that were looked at stayed where they "
            f"were at lr={float(self.param_groups[index]['lr']):.3g}: in {bucket.param_dtype} an update below half a "
            "unit in the last place is rounded away. Keep the weights in float32 and compute in low precision "
            "(torch.autocast, or FSDP's mixed precision), or raise lr",
            UserWarning,
            stacklevel=2,
        )


def _asking_for_lr(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor; one without a default learning rate names the rate to start from where none is given."""
    parameters = signature(init).parameters
    if "lr" not in parameters or parameters["lr"].default is not Parameter.empty:
        return init
    before = [*parameters].index("lr")

    @wraps(init)
    def asking(self: Any, *args: Any, **kwargs: Any) -> None:
        if "lr" not in kwargs and len(args) < before:
            cls = type(self)
            raise TypeError(f"{cls.__name__} has no default learning rate; {registry.give_lr(cls)}")
        init(self, *args, **kwargs)

    return asking


class _Checked(NamedTuple):
    """A group whose hyper-parameters have been checked: its values, how they compare, its entries, its rule."""

    given: list[Any]
    values: tuple[Any, ...]
    entries: int
    rule: Rule


class _Placed(NamedTuple):
    """What the stacks of a group were made for.

    Attributes:
        members: ids of all of its parameters.
        rule: of the group.
        options: see `_shaping`.
        waiting: whether some parameters, frozen ones, have no place yet.
    """

    members: list[int]
    rule: Rule
    options: tuple[Any, ...]
    waiting: bool

    def differences(self, rule: Rule, group: Mapping[str, Any]) -> list[str]:
        """Names of the options that differ now."""
        names = [name for name, old, new in zip(_SHAPING, self.options, _shaping(group), strict=True) if old != new]
        known = {field.name for field in fields(rule)} & {field.name for field in fields(self.rule)}
        return names + sorted(n for n in known if getattr(rule, n) != getattr(self.rule, n) and n in group)


# Options that shape the state of whatever rule.
_SHAPING = ("matrix_view", "state_dtype")


def _shaping(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(map(group.__getitem__, _SHAPING))


def _copy_to(x: Any, device: torch.device) -> Any:
    return x.to(device, copy=True) if isinstance(x, Tensor) else deepcopy(x)


def _is_capturing() -> bool:
    """Whether a CUDA graph is being recorded."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _identities(group: Mapping[str, Any], names: Iterable[str]) -> tuple[Any, ...]:
    """Values of a group as they compare; a tensor, which is not read, by which one it is."""
    return tuple(id(v) if isinstance(v, Tensor) else v for v in map(group.__getitem__, names))
