"""What a training run says while it runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from emerging_optimizers.cli import progress
from emerging_optimizers.cli.progress import Say, quiet
from emerging_optimizers.lab.config import TrainConfig
from emerging_optimizers.lab.data import Text
from emerging_optimizers.lab.runs import StepRecord

Watch = Callable[[StepRecord], None]


@contextmanager
def watching(console: Console, title: str, steps: int, tokens_per_step: int) -> Iterator[Watch]:
    """Shows the progress of one optimizer: a bar in a terminal; elsewhere a line an evaluation, and what waits longer.

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
        say(f"step {step.step} of {steps}")
        bar.update(task, completed=step.step, status=status)
        if step.validation_loss is not None and not console.is_terminal:
            console.print(f"{title:>12}  step {step.step}/{steps}  {status}", soft_wrap=True)

    with nullcontext(quiet) if console.is_terminal else waiting(console, title) as say, bar:
        yield watch


def waiting(console: Console, what: str) -> AbstractContextManager[Say]:
    """A block that may take long, and tells so where the console is not quiet."""
    return nullcontext(quiet) if console.quiet else progress.Progress(what, console.file)


def print_windows(console: Console, config: TrainConfig, text: Text) -> None:
    """Notes that an evaluation takes all the held-out text that there is, where more was asked for."""
    if config.eval_windows > (most := text.places(config.context)):
        console.print(
            f"note: --eval-windows {config.eval_windows}: the held-out text has {most:,} windows, all of which are "
            "evaluated each time",
            soft_wrap=True,
        )


def print_changes(console: Console, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Notes where results continued now and results begun earlier may not be those of one run."""
    for key in ("emerging_optimizers", "revision", "python", "torch", "cpu", "medium"):
        if then.get(key) != now[key]:
            console.print(
                f"note: {key} was {then.get(key)}, is now {now[key]}; losses may differ from one run's",
                soft_wrap=True,
            )
