"""What a run shows while it runs and at its end."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from emerging_optimizers.lab.record import RunResult, StepRecord

BASELINE = "adamw"

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
    for key in ("emerging_optimizers", "revision", "python", "torch", "cpu"):
        if then[key] != now[key]:
            console.print(
                f"note: {key} was {then[key]}, is now {now[key]}; losses may differ from one run's",
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


def baseline_loss(results: Sequence[RunResult]) -> float | None:
    """AdamW's best held-out loss, if AdamW is among the results."""
    return next((result.best_loss for result in results if result.optimizer == BASELINE), None)
