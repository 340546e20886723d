"""The learning-rate grid behind the tuned defaults: one training run for each optimizer and rate."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from emerging_optimizers.lab import report
from emerging_optimizers.lab.config import GRID, GRID_FACTORS, Arm, TrainConfig, UsageError, checked
from emerging_optimizers.lab.data import load_text
from emerging_optimizers.lab.record import environment, json_bytes, read_json, reading, sole_writer, write_atomically
from emerging_optimizers.lab.train import make_model, make_optimizer, train_one


@dataclass(frozen=True, kw_only=True)
class GridRow:
    """One run of the grid."""

    optimizer: str
    arm: Arm
    final_loss: float
    curve: Mapping[int, float]
    """Held-out loss after each evaluated step."""
    cpu_seconds: float

    def to_json(self) -> dict[str, Any]:
        """A flat JSON object."""
        value = asdict(self)
        return {"optimizer": value.pop("optimizer"), **value.pop("arm"), **value}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "GridRow":
        """The inverse of `to_json`; JSON has turned the steps into strings."""
        row = cls(
            optimizer=value["optimizer"],
            arm=checked(Arm(lr=value["lr"], companion_lr=value["companion_lr"], options=value["options"])),
            final_loss=value["final_loss"],
            curve={int(step): loss for step, loss in value["curve"].items()},
            cpu_seconds=value["cpu_seconds"],
        )
        return checked(row)


def run_grid(
    config: TrainConfig, out: Path, *, fresh: bool = False, console: Console | None = None
) -> tuple[GridRow, ...]:
    """Runs each optimizer over its learning rates and saves every result as it comes.

    Beside ``out`` (JSON) stand the environment and the figure, under the same name. Runs that the file
    holds already are not repeated.

    Args:
        config: The job and the optimizers.
        out: The JSON file.
        fresh: Whether to forget the results in the file.
        console: Where to show progress and the closing table.

    Returns:
        Every run in the file, by optimizer and rising learning rate.

    Raises:
        UsageError: The file is damaged, holds results of another job or is being written by another process, the disk
            refuses, or an optimizer has no learning rate to begin at.
    """
    with sole_writer(out.parent, out.name):
        return _run_grid(config, out, fresh, console or Console())


def _run_grid(config: TrainConfig, out: Path, fresh: bool, console: Console) -> tuple[GridRow, ...]:
    text = load_text(config.text, config.context)
    job = {key: value for key, value in asdict(config).items() if key not in ("optimizers", "lr", "companion_lr")}
    job["text_sha256"] = text.sha256
    now, environment_path = environment(config.threads, text), out.with_suffix(".environment.json")
    rows: list[GridRow] = []
    beside: dict[Path, bytes] = {}
    if os.path.lexists(out) and not fresh:
        with reading(out, "bring it back, or give --fresh or another --out"):
            stored = read_json(out)
            rows = [GridRow.from_json(row) for row in stored["runs"]]
            changed = [key for key in job if stored["job"].get(key) != job[key]]
            then = dict(read_json(environment_path))
        if changed:
            raise UsageError(
                f"{out} holds another job (it differs in {', '.join(changed)}): give --fresh or another --out"
            )
        report.print_changes(console, then, now)
    else:
        beside = {environment_path: json_bytes(now)}

    wanted = [(name, arm) for name in config.optimizers for arm in _arms(config, name)]
    for name, arm in wanted:
        make_optimizer(name, arm, make_model(config, text))
    for name, arm in wanted:
        if any((row.optimizer, row.arm) == (name, arm) for row in rows):
            continue
        title = f"{name} {arm.lr:g}"
        with report.watching(console, title, config.steps, config.batch * config.context) as watch:
            result = train_one(config, name, arm, text, watch=watch)
        row = GridRow(
            optimizer=name,
            arm=arm,
            final_loss=result.final_loss,
            curve={step.step: loss for step, loss in result.evaluations},
            cpu_seconds=round(result.steps[-1].cpu_s, 2),
        )
        rows = sorted([*rows, row], key=lambda row: (row.optimizer, row.arm.lr or 0))
        best = {row.optimizer: best_row(rows, row.optimizer).to_json() for row in rows}
        found = {"job": job, "best": best, "runs": [row.to_json() for row in rows]}
        write_atomically({**beside, out: json_bytes(found)})

    from emerging_optimizers.lab.plots import plot_grid

    plot_grid(_curves(rows), out.with_suffix(".png"))
    console.print(_table(rows))
    for what, path in (
        ("results", out),
        ("environment", environment_path),
        ("figure", out.with_suffix(".png")),
    ):
        console.print(f"{what:<12} {path}", soft_wrap=True)
    return tuple(rows)


def best_row(rows: Sequence[GridRow], optimizer: str) -> GridRow:
    """The run of an optimizer with the lowest final loss."""
    own = [row for row in rows if row.optimizer == optimizer]
    return min(own, key=lambda row: row.final_loss if math.isfinite(row.final_loss) else math.inf)


def _arms(config: TrainConfig, name: str) -> list[Arm]:
    """The rates to try: the optimizer's row of GRID, or GRID_FACTORS around its tuned or given rate."""
    arm = config.arm(name)
    if name in GRID and name not in config.lr:
        return [replace(arm, lr=lr) for lr in GRID[name]]
    if arm.lr is None:
        raise UsageError(f"{name} has no tuned learning rate to build a grid around; give --lr {name}=RATE")
    return [replace(arm, lr=float(f"{arm.lr * factor:.6g}")) for factor in GRID_FACTORS]


def _curves(rows: Sequence[GridRow]) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        curves.setdefault(row.optimizer, []).append((row.arm.lr or 0, row.final_loss))
    return curves


def _table(rows: Sequence[GridRow]) -> Table:
    table = Table(title="Final held-out loss over the learning rate", box=box.SIMPLE_HEAD)
    for heading in ("optimizer", "lr", "final loss", "CPU s", ""):
        table.add_column(heading, justify="left" if heading in ("optimizer", "") else "right")
    for name, points in _curves(rows).items():
        best = best_row(rows, name)
        edges = (points[0][0], points[-1][0])
        for row in rows:
            if row.optimizer == name:
                at_edge = " at the edge of the grid" if row.arm.lr in edges else ""
                note = f"best{at_edge}" if row is best else ""
                table.add_row(name, f"{row.arm.lr:g}", f"{row.final_loss:.4f}", f"{row.cpu_seconds:.1f}", note)
    return table
