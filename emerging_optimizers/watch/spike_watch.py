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
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from emerging_optimizers.distributed.dtensor import is_dtensor
from emerging_optimizers.engine import RuleOptimizer
from emerging_optimizers.engine.matrix_view import Block, blocks
from emerging_optimizers.engine.options import COUNT, POSITIVE, WHOLE, optional
from emerging_optimizers.engine.transit import Transit
from emerging_optimizers.engine.validate import check_group, place, suggest
from emerging_optimizers.watch.alarms import THRESHOLDS, Alarm, Judge, in_one_sentence
from emerging_optimizers.watch.measures import Measures, Member
from emerging_optimizers.watch.stacks import wide


class _Reading(NamedTuple):
    """Values on their way to the host, and who takes them there."""

    values: Transit
    deliver: Callable[[list[float]], None]


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
        on_alarm: called with each `Alarm`; None: one RuntimeWarning for all that are read of a step. A value
            alarms when it leaves its range, and again only after it has been back.
        thresholds: limits that replace those of `THRESHOLDS`, by measure; None turns one off.
        path: a file to which JSON lines are appended, one for each observation of a parameter and for each alarm.
        tensorboard: a folder, or a writer with torch's `add_scalar`; the measures become `<measure>/<parameter>`.
        start: steps that were done before, where a run is continued.

    Attributes:
        step: steps done.
        latest: the newest observation: measures by parameter.

    Raises:
        ValueError: a value out of its range, an unknown measure, or a sharded parameter.
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
        checks = {"every": COUNT, "start": WHOLE, **dict.fromkeys(limits, optional(POSITIVE))}
        check_group("SpikeWatch", "its arguments", {"every": every, "start": start, **limits}, checks)
        self.optimizer, self.every, self.on_alarm, self.step = optimizer, every, on_alarm, start
        self.latest: dict[str, dict[str, float]] = {}
        defaults = {measure: threshold.limit for measure, threshold in THRESHOLDS.items()}
        self._judge, self._measures = Judge({**defaults, **thresholds}), Measures(optimizer)
        self._readings: deque[_Reading] = deque()
        self._alarms: list[Alarm] = []  # of the reading that is taken in, to be warned about
        self._due = False
        self._members: list[Member] = []  # of the step that is being observed
        for _ in self._parameters():  # raises for what it cannot measure
            pass
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
                Member(
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
                if is_dtensor(p):
                    raise ValueError(
                        f"SpikeWatch: {place(group, index, i)} is sharded, and what is measured are whole parameters; "
                        "watch a run of one process. spike_guard, which scales spikes down, works for sharded ones too"
                    )
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
            torch.stack(torch._foreach_norm([grad for _, grad in members], 2, dtype=wide(dtype)))
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

    # ---- an observation ---------------------------------------------------------------------------------------------

    def _send_observation(self, members: Sequence[Member]) -> None:
        """Everything that is measured of these parameters, in one tensor."""
        keys, values = self._measures.every(members)
        ages = {m.name: self._measures.basis_age(m) for m in members}
        self._send(values, partial(self._take_observation, self.step, keys, ages))

    # ---- on the host --------------------------------------------------------------------------------------------

    def _take_norms(self, step: int, names: Sequence[str], norms: Sequence[float]) -> None:
        for name, norm in zip(names, norms, strict=True):
            if self._compare(step, name, "grad_norm", norm):
                self._due = True
        self._warn()

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
                    self._compare(step, name, measure, value)
        if self._file is not None:
            self._file.flush()
        self._warn()

    def _compare(self, step: int, name: str, measure: str, value: float) -> bool:
        """Alarm where a value leaves its range; whether it does so now."""
        alarm = self._judge.judge(step, name, measure, value)
        if alarm is None:
            return False
        self._write({"kind": "alarm", **asdict(alarm)})
        if self.on_alarm is None:
            self._alarms.append(alarm)
        else:
            self.on_alarm(alarm)
        return True

    def _warn(self) -> None:
        """Of all parameters at once: a spike of the loss is one in every gradient."""
        alarms, self._alarms = self._alarms, []
        if alarms:
            warnings.warn(in_one_sentence(alarms), RuntimeWarning, stacklevel=2)

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
