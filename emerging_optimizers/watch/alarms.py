"""When a measure alarms, and what the alarm says."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import NamedTuple

from emerging_optimizers.engine.guard import DECAY

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


class Judge:
    """Compares measures with their ranges, and keeps what is usual of each parameter.

    Args:
        limits: by measure; None: it never alarms.
    """

    def __init__(self, limits: Mapping[str, float | None]) -> None:
        self._limits = limits
        self._usual: defaultdict[tuple[str, str], _Usual] = defaultdict(_Usual)
        self._alarming: set[tuple[str, str]] = set()

    def judge(self, step: int, name: str, measure: str, value: float) -> Alarm | None:
        """An alarm where a value leaves its range; the next one comes when it has been back."""
        limit = self._limits.get(measure)
        if limit is None:
            return None
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
            return None
        if (name, measure) in self._alarming:
            return None
        self._alarming.add((name, measure))
        return _alarm(step, name, measure, value, usual, limit)


def _alarm(step: int, name: str, measure: str, value: float, usual: float | None, limit: float) -> Alarm:
    alarm = Alarm(step=step, parameter=name, measure=measure, value=value, usual=usual, threshold=limit, message="")
    text = f"step {step}: {measure} of {name} is {value:.3g}, {_compared(alarm)}; {_advice(alarm)}."
    return replace(alarm, message=text)


def in_one_sentence(alarms: Sequence[Alarm]) -> str:
    """What the alarms of one reading of a step come to: how many there are of each measure, and the worst of them.

    Example:
        >>> one = Alarm(step=3, parameter="a", measure="ns_residual", value=1.6, usual=None, threshold=1.5, message="")
        >>> in_one_sentence([one, replace(one, parameter="b", value=1.75)]).partition(";")[0]
        "step 3: ns_residual of 2 parameters, worst 'b' at 1.75, above 1.5"
    """
    if len(alarms) == 1:
        return alarms[0].message
    found = []
    for measure in dict.fromkeys(alarm.measure for alarm in alarms):
        those = [alarm for alarm in alarms if alarm.measure == measure]
        worst = max(those, key=_excess)
        many = f"{len(those)} parameters, worst" if len(those) > 1 else "one parameter,"
        compared, advice = _compared(worst), _advice(worst)
        found.append(f"{measure} of {many} {worst.parameter!r} at {worst.value:.3g}, {compared}; {advice}")
    return f"step {alarms[0].step}: {'. '.join(found)}."


def _excess(alarm: Alarm) -> float:
    return alarm.value / alarm.threshold if isfinite(alarm.value) else inf


def _advice(alarm: Alarm) -> str:
    return THRESHOLDS[alarm.measure].advice if isfinite(alarm.value) else NONFINITE


def _compared(alarm: Alarm) -> str:
    if not isfinite(alarm.value):
        return "not a finite number"
    if alarm.usual is None:
        return f"above {alarm.threshold:.3g}"
    return f"{alarm.value / alarm.usual:.3g} times its usual {alarm.usual:.3g}"
