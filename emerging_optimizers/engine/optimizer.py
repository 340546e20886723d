"""The only `step()` of the library.

Life of a step: hyper-parameters, groups and gradients are checked; what users did since the last step is taken over;
then, bucket by bucket and chunk by chunk: rows that have gradients -> stack in float32 -> l2 decay -> rule -> weights
and state written together. What `step` promises when something raises stands in its docstring.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import is_
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from emerging_optimizers import registry
from emerging_optimizers.distributed.layout import Layout
from emerging_optimizers.engine import checkpoint
from emerging_optimizers.engine.ahead import Ahead
from emerging_optimizers.engine.ambient import eager, undisturbed
from emerging_optimizers.engine.buckets import Bucket
from emerging_optimizers.engine.capture import check_capture, is_capturing, make_capturable
from emerging_optimizers.engine.checkpoint import RenameT
from emerging_optimizers.engine.declaring import DeclaredOptimizer
from emerging_optimizers.engine.exchange import Exchange
from emerging_optimizers.engine.executors import many_graphs, way_of
from emerging_optimizers.engine.filling import start
from emerging_optimizers.engine.groups import (
    Checked,
    check_gradients,
    check_names,
    check_obstacles,
    check_parameter,
    check_rule,
    check_view,
    identities,
)
from emerging_optimizers.engine.hooks import Law, make_hook
from emerging_optimizers.engine.notices import tell
from emerging_optimizers.engine.offload import fetched_ahead, wait_for_all
from emerging_optimizers.engine.options import Check, Execution
from emerging_optimizers.engine.placing import Places, Wanted
from emerging_optimizers.engine.rule import Rule, StartsFromWeight, rule_of
from emerging_optimizers.engine.run import BucketStep
from emerging_optimizers.engine.validate import check_group, label, label_of, place, plain_options, suggest


class RuleOptimizer(DeclaredOptimizer):
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
    # Attributes beside torch's that a pickle or a copy keeps.
    _kept: ClassVar[tuple[str, ...]] = ("execution",)
    _bucket_step: Callable[..., BucketStep] | None = None  # what stands in for it while an estimate counts

    def __init__(self, params: ParamsT, defaults: Mapping[str, Any] | None = None, **options: Any) -> None:
        if not self.foreign(["step"]):  # which may call what this one does not
            self._refuse_uncalled()
        options = {name: value for name, value in options.items() if name not in self.fixed}
        self.execution: Execution = options.pop("execution", "stacked")
        if self.execution not in (known := get_args(Execution)):
            raise ValueError(f"{self._name}: execution={self.execution!r} is not one of {', '.join(known)}")
        for name in options.keys() - self.ranges.keys():
            raise TypeError(f"{self._name} has no argument {name!r}{suggest(name, self.ranges)}")
        defaults = {**self.preset, **(defaults or {}), **options}
        self._ahead = Ahead()
        self._places = Places(self._name, self._layout())
        self._told: set[int] = set()  # groups whose updates are rounded away
        self._forget_stacks()
        super().__init__(params, plain_options(defaults, defaults))

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

    def _layout(self) -> Layout:
        """How parameters lie on processes."""
        return Layout()

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
        algorithm = self._algorithm(group)
        check_names(group, self._defaults_of(group), algorithm.fixed, self._name, algorithm.__name__)

    def _checked_rule(self, index: int) -> Rule:
        """The rule of a group; built and checked again only where a value of the group has changed."""
        group = self.param_groups[index]
        algorithm = self._algorithm(group)
        ranges = algorithm.ranges
        known = self._rules.get(index)
        if known is not None and known.execution != self.execution:
            known = None
        if known is None or len(group) != known.entries:
            self._complete(group, ranges)
        given = [*map(group.__getitem__, ranges)]
        if known is not None and all(map(is_, given, known.given)):
            return known.rule
        options = plain_options(group, ranges)
        if known is not None and known.values == identities(options, ranges):
            group.update({name: options[name] for name in ranges})
            self._rules[index] = known._replace(given=[*map(group.__getitem__, ranges)])
            return known.rule
        check_group(algorithm.__name__, f"param_groups[{index}]", options, ranges)
        algorithm._check_choice(options)
        rule = self._make_rule(options)
        check_rule(rule, self._law(rule, options), options, algorithm.__name__, self.execution)
        if known is None or known.rule != rule:
            check_obstacles(rule, group, algorithm.__name__)
        if options["capturable"]:
            make_capturable(rule, options, f"{algorithm.__name__}: param_groups[{index}]")
        group.update({name: options[name] for name in ranges})
        rule = self._make_rule(group)  # a function of the user's reads the group itself, whenever it is called
        if known is not None and known.rule == rule:
            rule = known.rule
        given = [*map(group.__getitem__, ranges)]
        law = self._law(rule, group)
        way = way_of(rule, law, group, self.execution)
        self._rules[index] = Checked(given, identities(group, ranges), len(group), self.execution, rule, law, way)
        return rule

    def _complete(self, group: dict[str, Any], ranges: Mapping[str, Check]) -> None:
        """Give a group that a user has put together the options that it lacks."""
        self._check_names(group)
        if lacking := ranges.keys() - group.keys():
            defaults = self._defaults_of(group)
            group.update({name: defaults[name] for name in lacking})

    def _check_members(self, index: int, rule: Rule) -> None:
        """Raise for a parameter of a group that the rule cannot update."""
        group = self.param_groups[index]
        algorithm = self._algorithm(group)
        for i, p in enumerate(group["params"]):
            check_parameter(p, rule, group, label(group, i, p), algorithm)
        for i, whole in enumerate(self._places.layout.wholes(group)):
            check_view(whole, rule, group["matrix_view"], label(group, i, whole), algorithm.__name__)

    def _law(self, rule: Rule, group: Mapping[str, Any]) -> Law | None:
        """The law by which the weights of a group move, if it is not the ordinary one."""
        return rule.weight_law or make_hook(group["weight_update_hook"])

    # ---- state --------------------------------------------------------------------------------------------------

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """As in torch. What is still prepared for the next step comes before whatever is launched with it from here."""
        if not is_capturing():  # a graph begins with nothing under way
            self._ahead.wait()
            wait_for_all()
        return self.__dict__["state"]

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self.__dict__["state"] = value

    def _forget_stacks(self) -> None:
        """Drop what is derived from groups and `state`; the next step builds it again from them."""
        self._rules: dict[int, Checked] = {}
        self._places.forget()

    @undisturbed
    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = True) -> None:
        """Create the state of a group's parameters now instead of in the first step."""
        self._places.place(self._wanted(), self.state, None if skip_non_grad_params else group)

    def _wanted(self) -> list[Wanted]:
        """What the groups need of the stacks, once their hyper-parameters are checked."""
        found = []
        for index, group in enumerate(self.param_groups):
            rule, check = self._checked_rule(index), self._check_members
            found.append(Wanted(group, rule, self._algorithm(group).__name__, partial(check, index, rule)))
        return found

    @property
    def plan(self) -> Any:
        """Who works on each parameter on several processes, and what travels; a process may ask alone. It prints."""
        return self._places.plan(self._wanted(), self.__dict__["state"])

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in self._kept}
        return {**super().__getstate__(), **kept, "_past": self._places.past()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in (("_ahead", Ahead()), ("_told", set())):
            self.__dict__.setdefault(name, value)
        super().__setstate__({key: value for key, value in state.items() if key != "_past"})
        self._places = Places(self._name, self._layout())
        self._forget_stacks()
        self._places.events, self._places.views_before = state.get("_past", ({}, {}))
        for group in self.param_groups:  # a checkpoint from before an option existed
            for name, value in self._defaults_of(group).items():
                group.setdefault(name, value)

    def state_dict(self) -> dict[str, Any]:
        """As in torch, loadable with `weights_only=True`. The state's tensors are views of the live stacks.

        State of parameters that are in no group is left out. Beside torch's entries there are "format"; "names",
        those of each group's parameters; "events", the counts of `guard_events`; and "others", the keys of entries that
        somebody keeps beside the optimizer's own.
        """
        inside = {p for group in self.param_groups for p in group["params"]}
        everything = self.state
        kept = {k: x for k, x in everything.items() if not isinstance(k, Tensor) or k in inside}
        try:
            self.state = defaultdict(dict, kept)
            packed = super().state_dict()
        finally:
            self.state = everything
        return checkpoint.packed(packed, self)

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
        loading = checkpoint.Loading(self, rename)
        # Registered for this call alone, so that it sees what the user's own hooks have made of the checkpoint.
        before = self.register_load_state_dict_pre_hook(loading.stage)
        after = self.register_load_state_dict_post_hook(loading.install, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _as_here(self, incoming: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint of another kind in the form of one of this optimizer's."""
        return incoming

    # ---- the step -----------------------------------------------------------------------------------------------

    @eager
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient.

        Groups are read as they are now: parameters may have been moved, taken out or replaced since the last step. A
        learning rate of 0 moves no weight. Ambient settings (autocast, inference mode, the default dtype and device,
        flushed subnormals) change nothing; the closure runs under them.

        Whatever else is raised (memory runs out, a hook raises, Ctrl-C), the weight, the state
        and the step count of each matrix have changed together or not at all, and the optimizer goes on working. What
        came before the error has taken its step: groups, and in them shapes, move one after the other. A parameter of
        an element-wise optimizer that is larger than a chunk may have moved in part. With `execution="compiled"` this
        does not hold for an interrupt inside of a compiled element-wise step.

        A matrix of which a factorization (eigh, QR, SVD) fails, in float64 too, sits the step out as with a gradient
        that is not finite: `guard_events` counts it, a warning names it once, the others move as they would have.

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
        places = self._places
        try:
            if self._never_called:
                self._refuse_uncalled()
            rules = self._checked()
        except Exception as problem:  # of whatever kind: the others are about to take the step
            Exchange.refuse(self._name, self.param_groups, places.layout, problem)
            raise
        if places.exchange is not None:
            places.exchange.agree(self.param_groups)
        places.start_guards(self.param_groups, self.state)

        def begin(index: int, bucket: Bucket) -> None:
            if isinstance(rule := rules[index], StartsFromWeight):
                start(bucket, rule, self.param_groups[index])

        with many_graphs(self.execution):
            if places.exchange is not None:
                places.exchange.step(self.param_groups, begin, self._take)
                return
            for index, bucket in places.buckets:
                begin(index, bucket)
            for index, bucket in fetched_ahead(places.buckets):
                self._take(index, bucket)

    def _checked(self) -> list[Rule]:
        """The rules of the groups, once everything is checked that the user may have changed, and has its place."""
        wanted = self._wanted()
        for w in wanted:
            check_gradients(w.group, w.rule, self._name)
        if self._inits_groups:  # as published: it may add to the state
            for group in self.param_groups:
                self._init_group(group)
        self._places.place(wanted, self.state)
        rules = [w.rule for w in wanted]
        if is_capturing():
            check_capture(self._name, self.param_groups, rules, self._places.homes)
        return rules

    def _take(self, index: int, bucket: Bucket) -> Tensor | None:
        """The step of a bucket; the guard's factors of its units, None: all of them 1."""
        checked, group, name = self._rules[index], self.param_groups[index], partial(label_of, self.param_groups)
        (step := (self._bucket_step or BucketStep)(bucket, checked, group, self._ahead, name)).take()
        tell(self._name, name, step, index, self._told)
        return step.factor

    def guard_events(self) -> dict[str, tuple[int, int]]:
        """How often each parameter's gradient was scaled down as a spike, and how often its step was skipped.

        Skipped: not finite, or a factorization failed. Parameters without an event are left out; a batch of matrices
        counts each matrix. Waits for the device. The counts go into copies and checkpoints, and are the same on every
        process. One process may ask alone, unless whole matrices of a batch lie on several (expert parallel): these
        then have to ask together.
        """
        events: dict[str, tuple[int, int]] = {}
        found = self._places.all_events(p for group in self.param_groups for p in group["params"])
        for index, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                scaled, skipped = found[p].tolist()
                if scaled or skipped:
                    events[place(group, index, i)] = (scaled, skipped)
        return events
