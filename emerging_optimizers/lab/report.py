"""What a run shows while it runs and at its end."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import mean
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from emerging_optimizers.lab.record import RunResult, SpikedRun, StepRecord
from emerging_optimizers.lab.spike import TOLERANCE, settled_steps

BASELINE = "adamw"
# The loss before a spike is a mean of so many batches; a loss is back within so much of the run without the spike, in
# nats on the same batch.
LOSS_WINDOW = 10
LOSS_TOLERANCE = 0.05

Watch = Callable[[StepRecord], None]


@contextmanager
def watching(console: Console, title: str, steps: int, tokens_per_step: int) -> Iterator[Watch]:
    """Shows the progress of one optimizer: a bar in a terminal, a line an evaluation elsewhere.

    Args:
        console: Where to show it.
        title: Name of the run.
        steps: Number of steps.
        tokens_per_step: Characters in a batch.

    Yields:
        A function to call after each step.
    """
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"), TimeRemainingColumn())
    bar = Progress(TextColumn("{task.description:>12}"), *columns, console=console, disable=not console.is_terminal)
    task = bar.add_task(title, total=steps, status="")
    validation = ""

    def watch(step: StepRecord) -> None:
        nonlocal validation
        speed = step.step * tokens_per_step / step.wall_s
        if step.validation_loss is not None:
            validation = f"  validation {step.validation_loss:.3f}"
        status = f"loss {step.loss:.3f}{validation}  {speed:,.0f} tokens/s"
        bar.update(task, completed=step.step, status=status)
        if step.validation_loss is not None and not console.is_terminal:
            console.print(f"{title:>12}  step {step.step}/{steps}  {status}", soft_wrap=True)

    with bar:
        yield watch


def print_changes(console: Console, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Notes where results continued now and results begun earlier may not be those of one run."""
    for key in ("emerging_optimizers", "revision", "python", "torch", "cpu", "medium"):
        if then.get(key) != now[key]:
            console.print(
                f"note: {key} was {then.get(key)}, is now {now[key]}; losses may differ from one run's",
                soft_wrap=True,
            )


def comparison(results: Sequence[RunResult]) -> Table:
    """The closing table: losses, time, the optimizer's share of the CPU seconds, its state a parameter."""
    target = baseline_loss(results)
    goal = "" if target is None else f"; the target is AdamW's best, {target:.3f}"
    table = Table(
        title=f"Held-out loss, nats per character{goal}",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("optimizer")
    for heading in (
        *("lr", "final\nloss", "steps to\ntarget", "CPU s to\ntarget", "CPU s", "wall s"),
        *("in its\nstep", "bytes a\nweight"),
    ):
        table.add_column(heading, justify="right")
    for row in summary(results):
        reached = ["-" if row[key] is None else f"{row[key]:.0f}" for key in ("steps_to_adamw", "cpu_s_to_adamw")]
        table.add_row(
            *(row["optimizer"], f"{row['lr']:g}", f"{row['final_loss']:.3f}", *reached),
            *(f"{row['cpu_s']:.1f}", f"{row['wall_s']:.1f}", f"{row['optimizer_share']:.0%}"),
            f"{row['state_bytes_per_parameter']:.1f}",
        )
    return table


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


def recovery_table(spiked: Sequence[SpikedRun]) -> Table:
    """The table of the spike: what it did to the loss and to the updates, without and with the guard."""
    table = Table(
        title="After the spike, against the run without it. Back: the loss at most "
        f"{LOSS_TOLERANCE:g} nats above, for good; the update RMS within {TOLERANCE:.0%}, first / for good",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("optimizer", no_wrap=True)
    for heading in (
        *("loss\nbefore", "worst\nloss", "most\nabove", "loss\nback", "update\nx, spike", "most\nafter"),
        *("first\nback", "back\nfor good", "final\nloss"),
    ):
        table.add_column(heading, justify="right")
    for spiked_run, row in zip(spiked, recovery(spiked), strict=True):
        never = f">{len(spiked_run.run.steps) - spiked_run.spike_at - 1}"
        steps = {key: never if x is None else str(x) for key, x in row.items()}
        number = {key: "nan" if x is None else f"{x:.2f}" for key, x in row.items() if not isinstance(x, str)}
        guard = "" if row["guard"] is None else f" guard {row['guard']:g}"
        table.add_row(
            *(f"{row['optimizer']}{guard}", number["loss_before"], number["worst_loss"], number["worst_excess"]),
            *(steps["loss_back"], number["update_at_spike"], number["largest_update"]),
            *(steps["update_first_back"], steps["update_back"]),
            number["final_loss"],
        )
    return table


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def baseline_loss(results: Sequence[RunResult]) -> float | None:
    """AdamW's best held-out loss, if AdamW is among the results."""
    return next((result.best_loss for result in results if result.optimizer == BASELINE), None)
