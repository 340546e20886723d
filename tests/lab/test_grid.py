"""The learning-rate grid: one run for each rate, none of them twice."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

from emerging_optimizers.lab import grid
from emerging_optimizers.lab.config import GRID, GRID_FACTORS, UsageError
from emerging_optimizers.lab.grid import run_grid
from emerging_optimizers.lab.present import present_grid
from emerging_optimizers.lab.runs import GridRow, best_row


def test_a_grid_continues_where_it_stopped(tiny, tmp_path, monkeypatch):
    runs = []

    def counting(config, name, arm, text, **kwargs):
        runs.append((name, arm.lr))
        return train_one(config, name, arm, text, **kwargs)

    train_one = grid.train_one
    monkeypatch.setattr(grid, "train_one", counting)
    out, quiet = tmp_path / "grid.json", Console(quiet=True)

    run_grid(replace(tiny, optimizers=("adamw",)), out, console=quiet)
    assert runs == [("adamw", lr) for lr in GRID["adamw"]]
    runs.clear()
    rows = run_grid(replace(tiny, optimizers=("adamw", "muon"), lr={"muon": 0.02}), out, console=quiet)
    assert runs == [("muon", 0.02 * factor) for factor in GRID_FACTORS]

    present_grid(rows, out, quiet)
    assert {path.name for path in tmp_path.iterdir()} == {"grid.json", "grid.environment.json", "grid.png"}
    stored = json.loads(out.read_text())
    assert tuple(GridRow.from_json(row) for row in stored["runs"]) == rows
    assert stored["best"]["muon"]["final_loss"] == min(r.final_loss for r in rows if r.optimizer == "muon")
    assert set(rows[0].curve) == {3, 6}

    with pytest.raises(UsageError, match=r"holds results of another job \(it differs in steps\)"):
        run_grid(replace(tiny, steps=7), out, console=quiet)
    runs.clear()
    run_grid(replace(tiny, optimizers=("adamw",)), out, resume=False, console=quiet)
    assert len(runs) == len(GRID["adamw"])
    assert set(json.loads(out.read_text())["best"]) == {"adamw"}


def test_a_run_that_diverged_is_not_the_best():
    def row(lr, loss):
        return GridRow(optimizer="a", arm=grid.Arm(lr=lr), final_loss=loss, curve={1: loss}, cpu_seconds=1.0)

    rows = [row(1.0, float("nan")), row(0.1, 2.0), row(0.2, 3.0)]
    assert best_row(rows, "a").arm.lr == 0.1
