"""The learning-rate grid behind the tuned defaults: one training run for each optimizer and rate."""

import os
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from emerging_optimizers.cli import UsageError
from emerging_optimizers.cli.files import write_atomically
from emerging_optimizers.lab.config import GRID, GRID_FACTORS, Arm, TrainConfig
from emerging_optimizers.lab.data import load_text
from emerging_optimizers.lab.places import same_request
from emerging_optimizers.lab.progress import print_changes, print_windows, waiting, watching
from emerging_optimizers.lab.record import environment, json_bytes, read_json, reading, sealed, sole_writer
from emerging_optimizers.lab.runs import GridRow, best_row
from emerging_optimizers.lab.train import make_model, make_optimizer, train_one
from emerging_optimizers.registry import entry


def run_grid(
    config: TrainConfig, out: Path, *, resume: bool = True, console: Console | None = None
) -> tuple[GridRow, ...]:
    """Runs each optimizer over its learning rates and saves every result as it comes.

    Beside ``out`` (JSON) stands the environment, under the same name. Runs that the file holds already are not
    repeated.

    Args:
        config: The job and the optimizers.
        out: The JSON file.
        resume: Whether to keep the results in the file.
        console: Where to show progress.

    Returns:
        Every run in the file, by optimizer and rising learning rate.

    Raises:
        UsageError: The file is damaged, holds results of another job or is being written by another process, the disk
            refuses, or an optimizer has no learning rate to begin at.
    """
    with sole_writer(out.parent, out.name):
        return _run_grid(config, out, resume, console or Console(stderr=True))


def _run_grid(config: TrainConfig, out: Path, resume: bool, console: Console) -> tuple[GridRow, ...]:
    text = load_text(config.text, config.context)
    job = {key: value for key, value in asdict(config).items() if key not in ("optimizers", "lr", "companion_lr")}
    job["text_sha256"] = text.sha256
    now, environment_path = environment(config.threads, text), out.with_suffix(".environment.json")
    rows: list[GridRow] = []
    beside: dict[Path, bytes] = {}
    if os.path.lexists(out) and resume:
        with reading(out, "bring it back, or give another --out"):
            stored = read_json(out)
            rows = [GridRow.from_json(row) for row in stored["runs"]]
            there = dict(stored["job"])
            then = dict(read_json(environment_path))
        same_request(out, there, job)
        print_changes(console, then, now)
    else:
        beside = {environment_path: json_bytes(now)}

    wanted = [(name, arm) for name in config.optimizers for arm in _arms(config, name)]
    with waiting(console, "eopt grid"):
        for name, arm in wanted:
            make_optimizer(name, arm, make_model(config, text))
    print_windows(console, config, text)
    for name, arm in wanted:
        if any((row.optimizer, row.arm) == (name, arm) for row in rows):
            continue
        title = f"{name} {arm.lr:g}"
        with watching(console, title, config.steps, config.batch * config.context) as watch:
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
        write_atomically({**beside, out: json_bytes(sealed(found))})
    return tuple(rows)


def _arms(config: TrainConfig, name: str) -> list[Arm]:
    """The rates to try: the optimizer's row of GRID, or GRID_FACTORS around its tuned or given rate."""
    arm = config.arm(name)
    if name in GRID and name not in config.lr:
        return [replace(arm, lr=lr) for lr in GRID[name]]
    if arm.lr is None:
        try:
            entry(name)
        except ValueError as error:
            raise UsageError(str(error)) from error
        raise UsageError(f"{name} has no tuned learning rate to build a grid around; give --lr {name}=RATE")
    return [replace(arm, lr=float(f"{arm.lr * factor:.6g}")) for factor in GRID_FACTORS]
