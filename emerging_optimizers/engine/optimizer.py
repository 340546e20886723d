"""The only `step()` of the library.

Life of a step: hyper-parameters and gradients are checked; then, bucket by bucket: rows that have gradients ->
stack in float32 -> l2 decay -> rule -> state written back into its stacks -> decay and update, or what a hook makes of
them, written to the parameters -> what the rule prepares for its next step. Whatever can raise does so before the first
weight or state has changed.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, TypeVar, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from emerging_optimizers.engine import checkpoint
from emerging_optimizers.engine.ahead import Ahead
from emerging_optimizers.engine.buckets import Bucket, Chunk, fill_buckets
from emerging_optimizers.engine.executors import Execution, many_graphs
from emerging_optimizers.engine.guard import NonfiniteT
from emerging_optimizers.engine.hooks import InPlaceLaw, Law, WeightUpdateHookT, make_hook
from emerging_optimizers.engine.matrix_view import ALLOWED, MatrixViewT, blocks, is_view
from emerging_optimizers.engine.rule import Rule
from emerging_optimizers.engine.run import BucketStep
from emerging_optimizers.engine.validate import (
    FLAG,
    HOOK,
    LEARNING_RATE,
    NON_NEGATIVE,
    POSITIVE,
    Check,
    check_group,
    label,
    one_of,
    optional,
    plain_options,
    suggest,
)
from emerging_optimizers.engine.weight_decay import WeightDecayT

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LAYOUT = attrgetter("layout")


def _eager(function: FunctionT) -> FunctionT:
    """Keep a function out of a graph that the user compiles around it; the engine compiles rules itself.

    As torch.optim does it: `torch.compiler.disable` would import dynamo with this module, a second or more.
    """
    return torch._disable_dynamo(function)  # type: ignore[attr-defined, return-value]  # torch.optim's own, untyped


class EngineOptions(TypedDict, total=False):
    """Keyword arguments that every optimizer takes.

    Attributes:
        maximize: follow the gradient up instead of down; per group. Default False.
        spike_guard: scale a matrix's gradient down whose norm exceeds this many times the running mean of its norms
            (> 1); None: never. Per group. Default None.
        nonfinite: what a NaN or an infinity in a gradient does: "skip" (that matrix, or in an element-wise rule that
            parameter, sits the step out and no state sees the gradient), "raise" (before anything moves; reads the
            device) or "propagate". Per group. Default "skip".
        matrix_view: how a parameter is cut into matrices; per group, for matrix optimizers: "auto" (a 3-D parameter
            is a batch), "flatten" ((out, rest)), "joined" (a batch as one matrix), "transposed" (stored as (in, out)),
            ("heads", count), ("split", size, ...) or ("interleaved", size, ...); `engine/matrix_view.py` says all.
            Default "auto".
        weight_update_hook: the law by which the weight moves: a name of `engine/hooks.py` ("hyperball", "radial_brake",
            "relative_update", "spectral_clip", "spectral_weight_decay"), (name, its arguments), or a
            `WeightUpdateHook`, which may be two functions of a parameter as published. Per group. Default None:
            W <- keep W - lr U.
        capturable: steps can be recorded in a CUDA graph: the learning rate becomes a tensor on the parameters' device
            (fill it, as schedulers do; a number set later is taken over by the next step outside of a graph), and the
            host looks at nothing. Every step but the first few, which have to be taken before, is then the same; what
            needs the host is refused. Per group. Default False.
        state_dtype: torch.bfloat16 keeps momentum and first moments (of decay up to some hundred steps), and the bases
            of the SOAP family, in half the memory; everything is computed in float32 as before, and second moments and
            factors stay in it. Refused where an optimizer has neither. Per group. Default None: float32.
        execution: "stacked" (default: matrices of one shape in one call), "per_matrix" (one matrix a call, the
            definition of correct) or "compiled" (the rule through torch.compile).
    """

    maximize: bool
    spike_guard: float | None
    nonfinite: NonfiniteT
    matrix_view: MatrixViewT
    weight_update_hook: WeightUpdateHookT
    capturable: bool
    state_dtype: torch.dtype | None
    execution: Execution


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
    ranges: ClassVar[Mapping[str, Check]] = {}
    _common_ranges: ClassVar[Mapping[str, Check]] = {
        "lr": LEARNING_RATE,
        "weight_decay": NON_NEGATIVE,
        "weight_decay_method": one_of(*get_args(WeightDecayT)),
        "maximize": FLAG,
        "spike_guard": optional(Check(lambda v: POSITIVE.holds(v) and v > 1, "a finite number > 1")),
        "nonfinite": one_of(*get_args(NonfiniteT)),
        "matrix_view": Check(is_view, ALLOWED),
        "state_dtype": Check(lambda v: v in (None, torch.bfloat16), "None or torch.bfloat16"),
        "weight_update_hook": HOOK,
        "capturable": FLAG,
    }
    # Attributes beside torch's that a pickle or a copy keeps.
    _kept: ClassVar[tuple[str, ...]] = ("execution",)

    def __init__(self, params: ParamsT, defaults: dict[str, Any], **engine: Any) -> None:
        self.execution: Execution = engine.pop("execution", "stacked")
        if self.execution not in get_args(Execution):
            raise ValueError(
                f"{self._name}: execution={self.execution!r} is not one of {', '.join(get_args(Execution))}"
            )
        defaults = {
            "weight_decay": 0.0,
            "weight_decay_method": "decoupled",
            **defaults,
            "maximize": engine.pop("maximize", False),
            "spike_guard": engine.pop("spike_guard", None),
            "nonfinite": engine.pop("nonfinite", "skip"),
            "matrix_view": engine.pop("matrix_view", "auto"),
            "state_dtype": engine.pop("state_dtype", None),
            "weight_update_hook": engine.pop("weight_update_hook", None),
            "capturable": engine.pop("capturable", False),
        }
        if engine:
            name = next(iter(engine))
            raise TypeError(f"{self._name} has no argument {name!r}{suggest(name, defaults)}")
        self._ahead = Ahead()
        self._forget_stacks()
        super().__init__(params, plain_options(defaults))

    @property
    def _name(self) -> str:
        return type(self).__name__

    if not TYPE_CHECKING:  # where a misspelled attribute is an error

        def __getattr__(self, name: str) -> Any:
            """An option, as groups that do not set it have it."""
            try:
                return self.__dict__["defaults"][name]
            except KeyError:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None

        def __setattr__(self, name: str, value: Any) -> None:
            """Anything; an option is set in every group."""
            if "param_groups" in self.__dict__ and (name in self.ranges or name in self._common_ranges):
                for group in (self.defaults, *self.param_groups):
                    group[name] = value
            else:
                super().__setattr__(name, value)

    # ---- what a subclass may say about a group ------------------------------------------------------------------

    def _algorithm(self, group: Mapping[str, Any]) -> "type[RuleOptimizer]":
        """The class whose rule and ranges hold for a group."""
        return type(self)

    def _make_rule(self, group: Mapping[str, Any]) -> Rule:
        """The rule of a group whose hyper-parameters have been checked."""
        return self._algorithm(group).rule.from_group(group)

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
        for name in param_group:
            hint = "" if name in self.defaults else suggest(name, self.defaults)
            if hint:
                raise ValueError(f"{self._name}: a parameter group sets {name!r}, which is not an option{hint}")
        super().add_param_group(plain_options(param_group))
        group = self.param_groups[-1]
        try:
            rule = self._checked_rule(len(self.param_groups) - 1)
            for i, p in enumerate(group["params"]):
                self._check_parameter(p, rule, label(group, i, p), self._algorithm(group).__name__)
                self._check_view(p, rule, group, label(group, i, p))
            self._algorithm(group)._announce(group)
        except Exception:  # of whatever kind: a refused group leaves nothing behind
            self._rules.pop(len(self.param_groups) - 1, None)
            self.param_groups.pop()
            raise

    def _checked_rule(self, index: int) -> Rule:
        """The rule of a group; built and checked again only where a value of the group has changed."""
        group = self.param_groups[index]
        algorithm = self._algorithm(group)
        ranges = {**self._common_ranges, **algorithm.ranges}
        values = _identities(group, ranges)
        known = self._rules.get(index)
        if known is not None and known[0] == values:
            return known[1]
        check_group(algorithm.__name__, f"param_groups[{index}]", group, ranges)
        algorithm._check_choice(group)
        rule = self._make_rule(group)
        self._check_hook(rule, group, algorithm.__name__)
        self._check_rounding(rule, group, algorithm.__name__)
        law = self._law(rule, group)
        if self.execution == "compiled" and (rule.reads_parameters or isinstance(law, InPlaceLaw)):
            raise ValueError(
                f"{self._name}: execution='compiled' cannot run a rule that is given by a Python function of one "
                "parameter; use execution='stacked' or 'per_matrix'"
            )
        if known is None or known[1] != rule:
            for i, p in enumerate(group["params"]):
                if p.numel() and (obstacle := rule.obstacle(p.dtype, p.device)):
                    raise ValueError(f"{algorithm.__name__}: {label(group, i, p)}: {obstacle}")
        if group["capturable"]:
            self._make_capturable(rule, group, f"{algorithm.__name__}: param_groups[{index}]")
            values = _identities(group, ranges)
        self._rules[index] = (values, rule)
        return rule

    def _law(self, rule: Rule, group: Mapping[str, Any]) -> Law | None:
        """The law by which the weights of a group move, if it is not the ordinary one."""
        return rule.hook or make_hook(group["weight_update_hook"])

    @staticmethod
    def _make_capturable(rule: Rule, group: dict[str, Any], owner: str) -> None:
        """Put the learning rate where a graph finds it, or raise ValueError."""
        if rule.needs_host:
            raise ValueError(f"{owner}: capturable=True is not possible: {rule.needs_host}")
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
        parts = rule.init((1, 2, 2)[: 1 if rule.elementwise else 3], torch.float32, torch.device("meta"))._asdict()
        if not any(parts.get(name) is not None for name in rule.rounds):
            raise ValueError(
                f"{owner}: state_dtype={group['state_dtype']} is not possible: of its state ({', '.join(parts)}) "
                "nothing bears rounding; leave it None"
            )

    @staticmethod
    def _check_hook(rule: Rule, group: Mapping[str, Any], owner: str) -> None:
        hook = make_hook(group["weight_update_hook"])
        if hook is None:
            return
        given = f"{owner}: weight_update_hook={group['weight_update_hook']!r} is not possible"
        if rule.hook is not None or rule.rewrites_weight:
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
        if p.ndim < 2 and not rule.elementwise and not rule.takes_vectors:
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
        self._rules: dict[int, tuple[tuple[Any, ...], Rule]] = {}
        self._buckets: list[tuple[int, Bucket]] = []
        self._homes: dict[Tensor, list[tuple[Bucket, int]]] = {}
        self._bound: dict[int, list[int]] = {}  # by group: all of its parameters, where each has its home
        self._seen: tuple[list[int], list[str], list[int]] | None = None

    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = True) -> None:
        """Create the state of a group's parameters now instead of in the first step."""
        index = next(i for i, g in enumerate(self.param_groups) if g is group)
        self._bind(index, self._checked_rule(index), skip_non_grad_params)

    def _bind(self, index: int, rule: Rule, only_trainable: bool = True) -> None:
        """Give every parameter of a group a place in a stack, and adopt the state that it already has."""
        group = self.param_groups[index]
        members = [*map(id, group["params"])]
        if self._bound.get(index) == members:
            return
        homes = self._homes
        strangers = [(i, p) for i, p in enumerate(group["params"]) if p not in homes]
        new = [
            (i, p)
            for i, p in strangers
            if p.numel() and (p.requires_grad or p.grad is not None or p in self.state or not only_trainable)
        ]
        if len(new) == len(strangers):
            self._bound[index] = members
        if new:
            self._install(index, fill_buckets(new, group, rule, self.state))

    def _install(self, index: int, buckets: list[Bucket]) -> None:
        for bucket in buckets:
            self._buckets.append((index, bucket))
            for row, p in enumerate(bucket.parameters):
                self._homes.setdefault(p, []).append((bucket, row))
            self._publish(bucket)

    def _publish(self, bucket: Bucket) -> None:
        for p in bucket.parameters:
            self.state[p] = {**self._views(p)}

    def _views(self, p: Tensor) -> Mapping[str, Tensor]:
        """The state of a parameter: of all its blocks."""
        home = self._homes[p]
        if len(home) == 1:
            bucket, row = home[0]
            return bucket.published[row]
        return {key: view for bucket, row in home for key, view in bucket.published[row].items()}

    def _follow_user(self) -> None:
        """Take over what users did since the last step: moved parameters, replaced or deleted entries of `state`."""
        everything = self.state
        fits = all(bucket.fits() for _, bucket in self._buckets)
        # Parameters, keys and tensors as three lists: nearly always those of the last step. No parameter is hashed.
        states: Iterable[dict[str, Any]] = everything.values()
        tensors = chain.from_iterable(map(dict.values, states))
        seen = [*map(id, everything)], [*chain.from_iterable(states)], [*map(id, tensors)]
        if fits and seen == self._seen:
            return
        if not fits or not all(map(everything.get, self._homes)):
            self._forget_stacks()
            for index in range(len(self.param_groups)):  # the rule may not run where its parameters are now
                self._checked_rule(index)
            return
        self._seen = seen
        for p, home in self._homes.items():
            state, views = everything[p], self._views(p)
            if len(state) == len(views) and all(map(is_, map(state.get, views), views.values())):
                continue
            for bucket, row in home:
                bucket.adopt(row, state, f"a parameter of shape {tuple(p.shape)}")
            everything[p] = {**views}
            self._seen = None  # the user's tensors may go, and others come under their ids

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault("_ahead", Ahead())
        super().__setstate__(state)
        self._forget_stacks()
        for group in self.param_groups:  # a checkpoint from before an option existed
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def state_dict(self) -> dict[str, Any]:
        """As in torch, loadable with `weights_only=True`. The state's tensors are views of the live stacks."""
        packed = super().state_dict()
        for group in packed["param_groups"]:
            hook = group["weight_update_hook"]
            if not (hook is None or isinstance(hook, (str, tuple))):  # code, which whoever resumes brings along
                del group["weight_update_hook"]
        return {**packed, "format": checkpoint.FORMAT}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but the state keeps its own dtype (torch casts it to the parameter's).

        Raises:
            ValueError: the checkpoint does not belong to this optimizer; nothing has changed.
        """
        staged: list[tuple[int, list[Bucket]]] = []
        hooks: list[WeightUpdateHookT] = []

        def stage(_: Any, incoming: dict[str, Any]) -> dict[str, Any]:
            checkpoint.check_format(incoming)
            self._check_route(incoming["param_groups"])
            saved = checkpoint.state_by_parameter([g["params"] for g in self.param_groups], incoming)
            if saved is None:  # torch says what does not correspond
                return incoming
            # What an older or a published checkpoint does not say, and what is code, stays as it is here.
            pairs = list(zip(self.param_groups, incoming["param_groups"], strict=True))
            groups = [{**mine, **theirs, "params": theirs["params"]} for mine, theirs in pairs]
            hooks.extend(theirs.get("weight_update_hook", mine["weight_update_hook"]) for mine, theirs in pairs)
            for index, (mine, group) in enumerate(zip(self.param_groups, groups, strict=True)):
                members = [(i, p) for i, p in enumerate(mine["params"]) if p in saved]
                told = {**group, "params": mine["params"]}
                rule = self._make_rule(told)
                states = {p: rule.translate(saved[p]) for _, p in members}
                staged.append((index, fill_buckets(members, told, rule, states)))
            return {**incoming, "state": {}, "param_groups": groups}

        def install(_: Any) -> None:
            self._forget_stacks()
            self.state.clear()
            for index, buckets in staged:
                self._install(index, buckets)
            for group, hook in zip(self.param_groups, hooks, strict=True):
                group["weight_update_hook"] = hook  # itself; torch has copied it

        # Registered for this call alone, so that it sees what the user's own hooks have made of the checkpoint.
        before = self.register_load_state_dict_pre_hook(stage)
        after = self.register_load_state_dict_post_hook(install, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    # ---- the step -----------------------------------------------------------------------------------------------

    @_eager
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss; it runs with gradients enabled.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: a hyper-parameter or a gradient that cannot be used; no weight and no state has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rules = [self._checked_rule(index) for index in range(len(self.param_groups))]
        self._check_gradients()
        self._follow_user()
        if _is_capturing():
            self._check_capture(rules)
        for index, rule in enumerate(rules):
            self._bind(index, rule)
        for index, bucket in self._buckets:
            if rules[index].starts_from_weight:
                self._start(bucket, rules[index], self.param_groups[index])
        with many_graphs(self.execution):
            for index, bucket in self._buckets:
                rule, group = rules[index], self.param_groups[index]
                if group["spike_guard"] is not None and not bucket.guard:
                    bucket.start_guard()
                    self._publish(bucket)
                BucketStep(bucket, rule, self._law(rule, group), group, self.execution, self._ahead).take()
        return loss

    def _check_capture(self, rules: Sequence[Rule]) -> None:
        """Raise for a step that is recorded in a CUDA graph and that those which repeat it would not equal."""
        for index, (group, rule) in enumerate(zip(self.param_groups, rules, strict=True)):
            where = f"{self._name}: this step is recorded in a CUDA graph, and "
            if not group["capturable"]:
                raise ValueError(f"{where}param_groups[{index}] has capturable=False; make the optimizer with True")
            for i, p in enumerate(group["params"]):
                homes = self._homes.get(p, [])
                count = min((bucket.counts[row] for bucket, row in homes), default=0)
                settled = count > 0 and rule.phase(count + 1) is rule.phase(count + 2)
                if rule.prepares:  # whose graph and handles for this phase come with its first time
                    settled = settled and rule.phase(count) is rule.phase(count + 1)
                guarded = group["spike_guard"] is None or all(bucket.guard for bucket, _ in homes)
                if p.grad is not None and p.numel() and not (settled and guarded):
                    raise ValueError(
                        f"{where}the next step of {label(group, i, p)}, its {count + 1}., differs from the later "
                        "ones, as it makes state; take three steps outside of a graph first"
                    )

    def _check_gradients(self) -> None:
        for group in self.param_groups:
            raises = group["nonfinite"] == "raise"
            gradients = (g for p in group["params"] if (g := p.grad) is not None)
            if not raises and set(map(_LAYOUT, gradients)) <= {torch.strided}:
                continue
            for i, p in enumerate(group["params"]):
                if (grad := p.grad) is None or (grad.layout is torch.strided and not raises):
                    continue
                if raises and not bool(grad.isfinite().all()):
                    raise ValueError(
                        f"{self._name}: the gradient of {label(group, i, p)} is not finite, and its group says "
                        "nonfinite='raise'; nothing has moved. nonfinite='skip' lets it sit the step out"
                    )
                if grad.layout != torch.strided:
                    raise ValueError(
                        f"{self._name}: the gradient of {label(group, i, p)} has layout {grad.layout}; only "
                        "dense gradients can be used (nn.Embedding(sparse=False))"
                    )

    def guard_events(self) -> dict[str, tuple[int, int]]:
        """How often each parameter's gradient was scaled down as a spike, and skipped as non-finite.

        Parameters without an event are left out; a batch of matrices counts each matrix. Waits for the device.
        """
        events: dict[str, tuple[int, int]] = {}
        for index, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p not in self._homes:
                    continue
                counts = [
                    torch.stack([bucket.unit_view(row, n).sum() for n in (bucket.scaled, bucket.skipped)])
                    for bucket, row in self._homes[p]
                ]
                scaled, skipped = map(int, torch.stack(counts).sum(dim=0))
                if scaled or skipped:
                    names = group.get("param_names")
                    events[names[i] if names else f"param_groups[{index}]['params'][{i}]"] = (scaled, skipped)
        return events

    @staticmethod
    def _start(bucket: Bucket, rule: Rule, group: Mapping[str, Any]) -> None:
        """Make the state of matrices before their first step, and of those that have lost it."""
        for i in bucket.collect():
            bucket.counts[i] = 0
        new = {i: p for i, p in enumerate(bucket.parameters) if p.grad is not None and not bucket.counts[i]}
        if new:
            chunk = Chunk(bucket, (bucket.whole[i] for i in new))
            order = {p: i for i, p in enumerate(group["params"])}
            labels = [label(group, order[p], p) for i, p in new.items() for _ in range(bucket.items(i))]
            bucket.write(chunk, rule.start(bucket.stack(chunk, new), labels))


def _is_capturing() -> bool:
    """Whether a CUDA graph is being recorded."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _identities(group: Mapping[str, Any], names: Iterable[str]) -> tuple[Any, ...]:
    """Values of a group as they compare; a tensor, which is not read, by which one it is."""
    return tuple(id(v) if isinstance(v, Tensor) else v for v in map(group.__getitem__, names))
