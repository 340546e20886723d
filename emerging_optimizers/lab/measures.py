"""What the lab measures of updates and losses that it has recorded: pure functions of numbers.

Nothing here imports torch.
"""

import math
from collections.abc import Sequence
from statistics import mean
from typing import Any

from emerging_optimizers.lab.config import BASELINE
from emerging_optimizers.lab.runs import RunResult, SpikedRun

# How a recovery is measured: within 10 % of the mean update RMS of the last 30 steps.
TOLERANCE = 0.10
STEADY_WINDOW = 30
# The loss before a spike is a mean of so many batches; a loss is back within so much of the run without the spike, in
# nats on the same batch.
LOSS_WINDOW = 10
LOSS_TOLERANCE = 0.05


def recovery_steps(rms: Sequence[float], spike_at: int) -> int | None:
    """Steps from the spike to the first update RMS within 10 % of the mean of the last 30; None: never.

    The published measure: a trajectory that passes through the band and leaves it again counts as recovered.

    Args:
        rms: Update RMS by step.
        spike_at: Steps before the spike.

    Example:
        >>> recovery_steps([1.0, 9.0, 3.0, 1.05, 2.0] + 30 * [1.0], 1)
        2
    """
    target = mean(rms[-STEADY_WINDOW:])
    after = (k for k, x in enumerate(rms[spike_at + 1 :], start=1) if abs(x - target) <= TOLERANCE * target)
    return next(after, None)


def settled_steps(rms: Sequence[float], spike_at: int, steady: float) -> int | None:
    """Steps from the spike to the update RMS that comes within 10 % of `steady` for good; None: never.

    Args:
        rms: Update RMS by step.
        spike_at: Steps before the spike.
        steady: Update RMS without a spike.

    Example:
        >>> settled_steps([1.0, 9.0, 3.0, 1.05, 2.0] + 30 * [1.0], 1, steady=1.0)
        4
    """
    after = rms[spike_at + 1 :]
    outside = [k for k, x in enumerate(after, start=1) if not abs(x - steady) <= TOLERANCE * steady]
    settled = (outside[-1] if outside else 0) + 1
    return settled if settled <= len(after) else None


def largest(values: Sequence[float]) -> float:
    """The maximum, NaN if one of the values is."""
    return math.nan if any(math.isnan(x) for x in values) else max(values)


def relative_difference(values: Sequence[float], exact: Sequence[float]) -> float:
    """Largest relative difference; 0 where both are equal, infinite where a number is not finite."""
    differences = (
        0.0 if a == b else abs(a - b) / abs(b) if b else math.inf for a, b in zip(values, exact, strict=True)
    )
    return max(x if math.isfinite(x) else math.inf for x in differences)


def baseline_loss(results: Sequence[RunResult]) -> float | None:
    """AdamW's best held-out loss, if AdamW is among the results."""
    return next((result.best_loss for result in results if result.optimizer == BASELINE), None)


def summary(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    """The closing table as data."""
    target = baseline_loss(results)
    rows = []
    for result in results:
        last = result.steps[-1]
        reached = None if target is None else result.reaches(target)
        rows.append(
            {
                "optimizer": result.optimizer,
                "lr": result.arm.lr,
                "final_loss": result.final_loss,
                "best_loss": result.best_loss,
                "steps_to_adamw": reached.step if reached else None,
                "cpu_s_to_adamw": reached.cpu_s if reached else None,
                "cpu_s": last.cpu_s,
                "wall_s": last.wall_s,
                "optimizer_share": result.optimizer_share,
                "state_bytes_per_parameter": result.state_bytes / result.parameters,
            }
        )
    return rows


def recovery(spiked: Sequence[SpikedRun]) -> list[dict[str, Any]]:
    """How each run came back from its spike, as data; a number that is not finite becomes null.

    Both runs see the same batches, so losses are compared batch by batch and updates step by step. Steps count from
    the spike's own: 1 is the first step after it, None is never.
    """
    rows: list[dict[str, Any]] = []
    for spiked_run in spiked:
        run, calm, at = spiked_run.run, spiked_run.calm, spiked_run.spike_at
        losses = [step.loss for step in run.steps]
        excess = [step.loss - other.loss for step, other in zip(run.steps, calm.steps, strict=True)]
        updates = [step.update_rms / other.update_rms for step, other in zip(run.steps, calm.steps, strict=True)]
        above = [k for k, more in enumerate(excess[at + 1 :], start=1) if not more <= LOSS_TOLERANCE]
        within = (k for k, x in enumerate(updates[at + 1 :], start=1) if abs(x - 1) <= TOLERANCE)
        loss_back = max(above, default=0) + 1
        row = {
            "optimizer": run.optimizer,
            "guard": spiked_run.guard,
            "loss_before": mean(losses[max(0, at - LOSS_WINDOW) : at]),
            "worst_loss": max(losses[at + 1 :], key=_nan_last),
            "worst_excess": max(excess[at + 1 :], key=_nan_last),
            "loss_back": loss_back if at + loss_back < len(losses) else None,
            "update_at_spike": updates[at],
            "largest_update": max(updates[at + 1 :], key=_nan_last),
            "update_first_back": next(within, None),
            "update_back": settled_steps(updates, at, steady=1.0),
            "final_loss": run.final_loss,
            "final_loss_without_spike": calm.final_loss,
        }
        rows.append({key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()})
    return rows


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value
