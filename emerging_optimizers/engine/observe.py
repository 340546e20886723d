r"""Watching a run: what each parameter's update looks like, and an alarm when a value leaves its usual range.

In every step the norm of each parameter's gradient :math:`G` is compared with its usual value, a running mean. Every
so many steps, and in a step whose gradient alarms, everything is measured. :math:`U` is the update per unit of learning
rate, :math:`U = (k W_{t-1} - W_t) / \eta` with the weight decay's factor k taken out where the optimizer is this
library's (else k = 1); :math:`M_t` is the momentum after the step.

=================  ===================================================================================================
measure            value
=================  ===================================================================================================
grad_norm          :math:`\|G\|_F`
update_rms         :math:`\|U\|_F / \sqrt{n}` for n elements
alignment          :math:`\langle U, G\rangle / (\|U\|_F \|G\|_F)`
momentum_share     :math:`w \langle G, M_t\rangle / \|M_t\|_F^2`, where the gradient entered the average with weight w
                   (:math:`1 - \beta`); the shares of all gradients so far add up to 1
stable_rank        :math:`\|U\|_F^2 / \|U\|_2^2`, the spectral norm by power iteration
ns_residual        :math:`\|X X^\top - I\|_F / \sqrt{m}` with :math:`X = U \sqrt{m} / \|U\|_F`, m the shorter side: 0
                   where all singular values are equal, 1 where half of them are missing
basis_age          steps since the eigenbases were refreshed
basis_rotation     degrees by which the leading eigenvectors turned since the last observation:
                   :math:`\arccos(\|Q_k^\top Q'_k\|_F / \sqrt{k})` for the k first columns then and now
factor_condition   :math:`\max \lambda / \min \lambda` for :math:`\lambda = \mathrm{diag}(Q^\top K Q)`, eigenvalues
                   below `relative_floor` (where the group sets none 1 %) of their mean counting as it
guard_scaled       how often the spike guard has scaled the gradient down
guard_skipped      how often a gradient that is not finite was skipped
=================  ===================================================================================================

A measure that does not apply to a parameter is absent. Of a batch of matrices, and of the two sides L and R, the worst
counts (the smallest stable rank, the largest of the others).
"""

import json
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from math import inf, isfinite
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from emerging_optimizers.engine.buckets import Bucket
from emerging_optimizers.engine.guard import DECAY
from emerging_optimizers.engine.matrix_view import Block, blocks
from emerging_optimizers.engine.momenta import momentum_of
from emerging_optimizers.engine.optimizer import RuleOptimizer
from emerging_optimizers.engine.options import COUNT, POSITIVE, Check, optional
from emerging_optimizers.engine.rule import Phase
from emerging_optimizers.engine.transit import Transit
from emerging_optimizers.engine.validate import check_group, place, suggest
from emerging_optimizers.engine.weight_decay import keep_factor
from emerging_optimizers.linalg.kronecker import conjugate_diagonal, project_in
from emerging_optimizers.linalg.precision import fp32_matmul_precision

# Rounds of power iteration. The stable rank comes out exact where one direction dominates, and at most 1.3 times too
# large for random and orthogonalized matrices of up to 512 x 128, whose largest singular values are close together.
POWER_STEPS = 8
# Columns whose rotation is measured: they carry most of a decaying spectrum, and a copy of them costs little.
LEADING = 8
# Where the group sets no `relative_floor`, eigenvalues below this share of their mean count as it: in training the
# smallest are rounding noise, and nothing divides by them.
FLOOR = 1e-2
# The options by which a group says that its update is orthogonalized: this library's, and torch.optim.Muon's.
NEWTON_SCHULZ = {"num_ns_steps", "ns_steps"}
START = Check(lambda v: v == 0 or COUNT.holds(v), "an integer >= 0")
NONFINITE = "look at the batch of this step and at the loss; nonfinite='skip' keeps such gradients out of the state"


class Threshold(NamedTuple):
    """When a measure alarms: above `limit`, or above `limit` times its running mean of `settled` values or more.

    Attributes:
        limit: the default of `SpikeWatch(thresholds=...)`.
        settled: observations that make a usual value; 0: the limit is absolute.
        advice: what to look at.
    """

    limit: float
    settled: int
    advice: str


THRESHOLDS: Mapping[str, Threshold] = {
    "grad_norm": Threshold(
        10.0, 20, "look at the batch of this step and at the loss; spike_guard=2.0 scales such gradients down"
    ),
    "update_rms": Threshold(
        4.0, 3, "look for a gradient spike in the steps before, and at basis_rotation and momentum_share"
    ),
    "ns_residual": Threshold(
        1.5, 0, "most directions are missing from the update; look at stable_rank and at the gradient"
    ),
    "factor_condition": Threshold(
        4.0, 3, "one direction rules the factor; look for a gradient spike in the steps before"
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A value outside its usual range.

    Attributes:
        step: the step of the watch in which it was measured.
        parameter: its name.
        measure: a name of `THRESHOLDS`.
        value: what was measured.
        usual: the running mean until then; None for an absolute threshold, or before there is one.
        threshold: what the value exceeds; a value that is not finite exceeds any.
        message: one sentence, with what to look at.
    """

    step: int
    parameter: str
    measure: str
    value: float
    usual: float | None
    threshold: float
    message: str


@dataclass
class _Usual:
    """A bias-corrected running mean; `take` is told what to let through."""

    mean: float = 0.0
    weight: float = 0.0
    seen: int = 0

    def take(self, value: float) -> None:
        self.mean += (1 - DECAY) * (value - self.mean)
        self.weight += (1 - DECAY) * (1 - self.weight)
        self.seen += 1


class _Reading(NamedTuple):
    """Values on their way to the host, and who takes them there."""

    values: Transit
    deliver: Callable[[list[float]], None]


class _Member(NamedTuple):
    """A block of a parameter in an observed step, nearly always all of it.

    `limit` is the norm above which the spike guard scaled its gradient down.
    """

    name: str
    group: int
    p: Tensor
    block: Block
    before: Tensor
    limit: Tensor | None

    @property
    def grad(self) -> Tensor:
        assert self.p.grad is not None
        return self.block.of(self.p.grad)


class SpikeWatch:
    """Observes a torch optimizer while it trains; nothing about the training changes.

    Works through the step hooks of `torch.optim`, so any optimizer of torch's can be watched; what is measured is in
    this module's docstring. An observation is one tensor, read once: at once on the CPU; on an accelerator when it has
    arrived, so that no step waits, and a spike is observed in the step after it. A step that is called with a closure
    makes its own gradients, so there too the observation comes one step late.

    A copy or a pickle of the optimizer is not watched; a watch is not part of a checkpoint. It goes on over
    `load_state_dict` and `add_param_group`. In an observed step it holds a copy of the weights; between observations
    only the leading eigenvectors. The measures of the update's difference are rounded with the weights: in half
    precision they are coarse, and `ns_residual` is absent.

    Args:
        optimizer: what to watch.
        every: steps between observations, >= 1.
        on_alarm: called with each `Alarm`; None: a RuntimeWarning. A value alarms when it leaves its range, and again
            only after it has been back.
        thresholds: limits that replace those of `THRESHOLDS`, by measure; None turns one off.
        path: a file to which JSON lines are appended, one for each observation of a parameter and for each alarm.
        tensorboard: a folder, or a writer with torch's `add_scalar`; the measures become `<measure>/<parameter>`.
        start: steps that were done before, where a run is continued.

    Attributes:
        step: steps done.
        latest: the newest observation: measures by parameter.

    Raises:
        ValueError: a value out of its range, or an unknown measure.
        ModuleNotFoundError: `tensorboard` is a folder and the package tensorboard is not installed.

    Example:
        >>> from emerging_optimizers import AdamW
        >>> w = torch.nn.Parameter(torch.ones(4, 2))
        >>> optimizer = AdamW([("w", w)], lr=0.1)
        >>> with SpikeWatch(optimizer, every=10, on_alarm=lambda alarm: print(alarm.message)) as watch:
        ...     for step in range(1, 31):
        ...         w.grad = torch.ones(4, 2) * (100 if step == 25 else 1)
        ...         optimizer.step()
        step 25: grad_norm of w is 283, 100 times its usual 2.83; look at the batch of this step and at the loss; \
spike_guard=2.0 scales such gradients down.
        >>> round(watch.latest["w"]["alignment"], 3)
        1.0
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        every: int = 50,
        *,
        on_alarm: Callable[[Alarm], None] | None = None,
        thresholds: Mapping[str, float | None] | None = None,
        path: str | Path | None = None,
        tensorboard: Any = None,
        start: int = 0,
    ) -> None:
        thresholds = dict(thresholds or {})
        for measure in thresholds.keys() - THRESHOLDS.keys():
            hint = suggest(measure, THRESHOLDS)
            raise ValueError(f"SpikeWatch: thresholds names {measure!r}{hint}; known are {', '.join(THRESHOLDS)}")
        limits = {f"thresholds[{measure!r}]": limit for measure, limit in thresholds.items()}
        checks = {"every": COUNT, "start": START, **dict.fromkeys(limits, optional(POSITIVE))}
        check_group("SpikeWatch", "its arguments", {"every": every, "start": start, **limits}, checks)
        self.optimizer, self.every, self.on_alarm, self.step = optimizer, every, on_alarm, start
        self.latest: dict[str, dict[str, float]] = {}
        defaults = {measure: threshold.limit for measure, threshold in THRESHOLDS.items()}
        self._limits = {**defaults, **thresholds}
        self._usual: defaultdict[tuple[str, str], _Usual] = defaultdict(_Usual)
        self._alarming: set[tuple[str, str]] = set()
        self._readings: deque[_Reading] = deque()
        self._due = False
        self._members: list[_Member] = []  # of the step that is being observed
        self._leading: dict[tuple[str, str], Tensor] = {}
        self._closes = closes = ExitStack()
        self._writer = tensorboard
        if isinstance(tensorboard, str | Path):
            self._writer = _summary_writer(tensorboard)
            closes.callback(self._writer.close)
        self._file = None
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  # close() does
            closes.callback(self._file.close)
        closes.callback(self._receive, wait=True)
        for register, hook in (
            (optimizer.register_step_pre_hook, self._before_step),
            (optimizer.register_step_post_hook, self._after_step),
        ):
            closes.callback(register(hook).remove)

    def close(self) -> None:
        """Stop watching: take in what is still on its way, and close what was opened here."""
        self._closes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- around a step ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _before_step(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.step += 1
        self._receive()
        closure = _closure(args, kwargs)
        if closure is None:
            self._send_norms()
        if self._due or self.step % self.every == 0:
            self._due = False
            self._members = [
                _Member(
                    name + block.key,
                    index,
                    p,
                    block,
                    block.of(p.detach()).clone(),
                    self._guard_limit(index, p, block.key),
                )
                for name, index, p in self._parameters()
                if closure is not None or p.grad is not None
                for block in self._blocks(index, p)
            ]

    @torch.no_grad()
    def _after_step(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _closure(args, kwargs) is not None:
            self._send_norms()
        if members := [m for m in self._members if m.p.grad is not None]:
            self._send_observation(members)
        self._members = []

    def _parameters(self) -> Iterator[tuple[str, int, Tensor]]:
        for index, group in enumerate(self.optimizer.param_groups):
            for i, p in enumerate(group["params"]):
                if p.numel():
                    yield place(group, index, i), index, p

    def _blocks(self, index: int, p: Tensor) -> list[Block]:
        group = self.optimizer.param_groups[index]
        view = group.get("matrix_view", "auto")
        if isinstance(self.optimizer, RuleOptimizer) and self.optimizer._checked_rule(index).elementwise:
            view = "auto"
        return blocks(p, p.ndim < 2, view)

    def _guard_limit(self, index: int, p: Tensor, end: str) -> Tensor | None:
        threshold, state = self.optimizer.param_groups[index].get("spike_guard"), self.optimizer.state.get(p, {})
        if threshold is None or "guard_norm" + end not in state:
            return None
        limit: Tensor = threshold * state["guard_norm" + end] / state["guard_weight" + end]
        return limit.reshape(-1)

    def _send_norms(self) -> None:
        """The norm of every gradient, in one tensor."""
        kinds: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
        for name, _, p in self._parameters():
            if p.grad is not None:
                kinds.setdefault((p.device, p.grad.dtype), []).append((name, p.grad))
        norms = [
            torch.stack(torch._foreach_norm([grad for _, grad in members], 2, dtype=_wide(dtype)))
            for (_, dtype), members in kinds.items()
        ]
        names = [name for members in kinds.values() for name, _ in members]
        self._send(norms, partial(self._take_norms, self.step, names))

    def _send(self, values: Sequence[Tensor], deliver: Callable[[list[float]], None]) -> None:
        if values:
            flat = torch.cat([x.to(values[0].device) for x in values])
            self._readings.append(_Reading(Transit.send(flat), deliver))
            self._receive()

    def _receive(self, wait: bool = False) -> None:
        while self._readings and (wait or self._readings[0].values.ready):
            values, deliver = self._readings.popleft()
            deliver(values.read().tolist())

    # ---- an observation -----------------------------------------------------------------------------------------

    def _send_observation(self, members: Sequence[_Member]) -> None:
        """Everything that is measured of these parameters, shape by shape, in one tensor."""
        stacks: dict[Any, list[_Member]] = {}
        for m in members:
            kept = frozenset(key for key, x in self._state(m).items() if x is not None)
            stacks.setdefault((m.group, m.before.shape, m.block.item, m.p.dtype, m.p.device, kept), []).append(m)
        keys: list[tuple[str, str]] = []
        values: list[Tensor] = []
        with fp32_matmul_precision("highest"):
            for (*_, kept), stack in stacks.items():
                for measure, value_P in self._measure(stack, kept).items():
                    keys += [(m.name, measure) for m in stack]
                    values.append(value_P)
        ages = {m.name: self._basis_age(m) for m in members}
        self._send(values, partial(self._take_observation, self.step, keys, ages))

    def _state(self, m: _Member) -> Mapping[str, Any]:
        state, end = self.optimizer.state.get(m.p, {}), m.block.key
        return {key.removesuffix(end): x for key, x in state.items() if key.endswith(end)}

    def _measure(self, stack: Sequence[_Member], kept: Container[str]) -> dict[str, Tensor]:
        """The measures of P blocks of one group, shape and dtype, each (P,); `kept` are their states' keys."""
        p, group = stack[0].p, self.optimizer.param_groups[stack[0].group]
        wide = _wide(p.dtype)
        # P b M N for matrices, P n for vectors
        item = stack[0].block.item

        def stacked(tensors: Iterable[Tensor]) -> Tensor:
            return torch.stack([x.to(wide) for x in tensors]).reshape(len(stack), -1, *item)

        def states(key: str) -> Tensor:
            return torch.stack([self._state(m)[key] for m in stack])

        grad = stacked(m.grad for m in stack)
        keep = 1.0
        if isinstance(self.optimizer, RuleOptimizer):
            keep = keep_factor(group["weight_decay_method"], group["lr"], group["weight_decay"])
        update = stacked(m.before for m in stack) * keep - stacked(m.block.of(m.p) for m in stack)
        grad_norm, update_norm = _norm(grad), _norm(update)
        lr = torch.as_tensor(group["lr"], dtype=wide, device=p.device).reshape(())
        found = {
            "grad_norm": grad_norm,
            "update_rms": _ratio(update_norm, lr * grad[0].numel() ** 0.5),
            "alignment": _ratio(_dot(update, grad), update_norm * grad_norm),
        }
        bases = {key: states(key).reshape(len(stack), -1, n, n)
                 for key, n in zip(("Q_L", "Q_R"), item, strict=False)
                 if key in kept and self._state(stack[0])[key].shape[-2:] == (n, n)}  # fmt: skip
        average = momentum_of(self._class(group))
        if average is not None and average.key in kept:
            heard = _guarded(grad, [m.limit for m in stack])
            if average.rotated:
                heard = project_in(heard, bases.get("Q_L"), bases.get("Q_R"))
            momentum = stacked(m.block.restack(self._state(m)[average.key]) for m in stack)
            found["momentum_share"] = average.weight(group) * _ratio(_dot(heard, momentum), _dot(momentum, momentum))
        if item:
            unit = _ratio(update, torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True))
            found["stable_rank"] = _stable_rank(unit).amin(dim=1)
            if group.keys() & NEWTON_SCHULZ and wide == p.dtype:
                found["ns_residual"] = _ns_residual(unit).amax(dim=1)
        sides = [self._side(stack, key, states(key[-1]), basis) for key, basis in bases.items()]
        for measure in {measure for side in sides for measure in side}:
            found[measure] = torch.stack([side[measure] for side in sides if measure in side]).amax(dim=0)
        if isinstance(self.optimizer, RuleOptimizer):
            homes = [self._home(m) for m in stack]
            for measure in ("scaled", "skipped"):
                counts = [bucket.unit_view(row, getattr(bucket, measure)).sum() for bucket, row in homes]
                found[f"guard_{measure}"] = torch.stack(counts)
        return found

    def _side(self, stack: Sequence[_Member], key: str, factor: Tensor, basis: Tensor) -> dict[str, Tensor]:
        """What is measured of one Kronecker factor and its basis, (P, b, N, N) each."""
        values = conjugate_diagonal(factor.reshape(basis.shape), basis)
        asked = self.optimizer.param_groups[stack[0].group].get("relative_floor")
        floor = (FLOOR if asked is None else asked) * values.mean(dim=-1)
        largest, smallest = values.amax(dim=-1), torch.maximum(values.amin(dim=-1), floor)
        smallest = torch.maximum(smallest, largest * torch.finfo(values.dtype).eps)
        found = {"factor_condition": _ratio(largest, smallest).amax(dim=1)}
        k = max(1, min(LEADING, basis.size(-1) // 2))
        leading = basis[..., :k].clone()
        last = [self._leading.get((m.name, key)) for m in stack]
        if all(x is not None and x.shape == leading.shape[1:] for x in last):
            overlap = torch.stack([x for x in last if x is not None]).mT @ leading
            cosine = torch.linalg.vector_norm(overlap, dim=(-2, -1)) / k**0.5
            found["basis_rotation"] = cosine.clamp(max=1).arccos().rad2deg().amax(dim=1)
        self._leading.update({(m.name, key): x for m, x in zip(stack, leading, strict=True)})
        return found

    def _home(self, m: _Member) -> tuple[Bucket, int]:
        """Where the engine keeps a member."""
        assert isinstance(self.optimizer, RuleOptimizer)
        return next(home for home in self.optimizer._homes[m.p] if home[0].blocks[home[1]].key == m.block.key)

    def _class(self, group: Mapping[str, Any]) -> type:
        """Whose update a group follows."""
        return self.optimizer._algorithm(group) if isinstance(self.optimizer, RuleOptimizer) else type(self.optimizer)

    def _basis_age(self, m: _Member) -> dict[str, float]:
        if not (isinstance(self.optimizer, RuleOptimizer) and self._state(m).keys() & {"Q_L", "Q_R"}):
            return {}
        (bucket, row), rule = self._home(m), self.optimizer._checked_rule(m.group)
        count, turn = bucket.counts[row], bucket.turns[row]
        return {"basis_age": next((k for k in range(count) if rule.phase(count - k, turn) is not Phase.REUSE), count)}

    # ---- on the host --------------------------------------------------------------------------------------------

    def _take_norms(self, step: int, names: Sequence[str], norms: Sequence[float]) -> None:
        for name, norm in zip(names, norms, strict=True):
            if self._judge(step, name, "grad_norm", norm):
                self._due = True

    def _take_observation(
        self, step: int, keys: Sequence[tuple[str, str]], ages: dict[str, dict[str, float]], values: Sequence[float]
    ) -> None:
        self.latest = ages
        for (name, measure), value in zip(keys, values, strict=True):
            self.latest[name][measure] = value
        for name, measures in self.latest.items():
            self._write({"kind": "observation", "step": step, "parameter": name, **measures})
            for measure, value in measures.items():
                if self._writer is not None:
                    self._writer.add_scalar(f"{measure}/{name}", value, step)
                if measure != "grad_norm":  # judged in every step
                    self._judge(step, name, measure, value)
        if self._file is not None:
            self._file.flush()

    def _judge(self, step: int, name: str, measure: str, value: float) -> bool:
        """Alarm where a value leaves its range; whether it does so now."""
        limit = self._limits.get(measure)
        if limit is None:
            return False
        usual = None
        if settled := THRESHOLDS[measure].settled:
            record = self._usual[name, measure]
            if record.seen >= settled:
                usual = record.mean / record.weight
            limit = inf if usual is None else limit * usual
            if 0 < value < inf:  # a zero says nothing about the next value, and a spike is let through as in the guard
                record.take(min(value, limit))
        if isfinite(value) and value <= limit:
            self._alarming.discard((name, measure))
            return False
        if (name, measure) in self._alarming:
            return False
        self._alarming.add((name, measure))
        advice = THRESHOLDS[measure].advice if isfinite(value) else NONFINITE
        compared = f"above {limit:.3g}" if usual is None else f"{value / usual:.3g} times its usual {usual:.3g}"
        if not isfinite(value):
            compared = "not a finite number"
        alarm = Alarm(
            step=step,
            parameter=name,
            measure=measure,
            value=value,
            usual=usual,
            threshold=limit,
            message=f"step {step}: {measure} of {name} is {value:.3g}, {compared}; {advice}.",
        )
        self._write({"kind": "alarm", **asdict(alarm)})
        if self.on_alarm is None:
            warnings.warn(alarm.message, RuntimeWarning, stacklevel=2)
        else:
            self.on_alarm(alarm)
        return True

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            strict = {key: None if isinstance(x, float) and not isfinite(x) else x for key, x in line.items()}
            self._file.write(json.dumps(strict, allow_nan=False) + "\n")


def _closure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What `step` was called with; the optimizer itself comes first."""
    return kwargs.get("closure", args[1] if len(args) > 1 else None)


def _summary_writer(folder: str | Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"SpikeWatch: tensorboard={str(folder)!r} needs the package tensorboard, which is not installed: pip "
            "install tensorboard, give a writer with add_scalar(tag, value, step), or write JSON lines with path=..."
        ) from error
    return SummaryWriter(folder)


# ---- measures of stacks: (P, ...) -> (P,), of matrices (P, b, M, N) -> (P, b) ----------------------------------------


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).flatten(1).sum(dim=1)


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y; x where y is zero, since then x is zero too."""
    return x / torch.where(y == 0, 1, y)


def _guarded(grad: Tensor, limits: Sequence[Tensor | None]) -> Tensor:
    """The gradients as the spike guard let them through: its units are matrices, or parameters."""
    known = [limit for limit in limits if limit is not None]
    if len(known) < len(limits):
        return grad
    limit = torch.stack(known)
    units = grad.reshape(*limit.shape, -1)
    norm = torch.linalg.vector_norm(units, dim=-1)
    factor = torch.where(norm > limit, limit / norm, 1)
    return (units * factor.unsqueeze(-1)).reshape(grad.shape)


def _stable_rank(unit: Tensor) -> Tensor:
    """Of matrices with norm 1, or 0; from below the spectral norm, so from above the rank."""
    # Random, since a vector of ones can be orthogonal to what is sought; its own generator leaves training's alone.
    start = torch.randn(
        unit.size(-1), 1, generator=torch.Generator("cpu").manual_seed(0), dtype=unit.dtype, device="cpu"
    )
    v = start.to(unit.device, non_blocking=True)
    for _ in range(POWER_STEPS):
        v = unit.mT @ (unit @ v)
        v = _ratio(v, torch.linalg.vector_norm(v, dim=(-2, -1), keepdim=True))
    top = torch.linalg.vector_norm(unit @ v, dim=(-2, -1)).square()
    return _ratio(torch.ones_like(top), top) * (top > 0)


def _ns_residual(unit: Tensor) -> Tensor:
    x = unit if unit.size(-2) <= unit.size(-1) else unit.mT
    m = x.size(-2)
    distance = m * (x @ x.mT) - torch.eye(m, dtype=x.dtype, device=x.device)
    return torch.linalg.vector_norm(distance, dim=(-2, -1)) / m**0.5
