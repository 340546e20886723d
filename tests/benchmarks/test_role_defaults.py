"""The benchmark of the roles' defaults: a run of a few steps, and the saved ones."""

from dataclasses import replace
from math import isfinite
from pathlib import Path

import pytest

from benchmarks import role_defaults as benchmark
from emerging_optimizers.lab.record import read_json
from emerging_optimizers.routing.roles import TREATMENTS

FOUND = read_json(benchmark.OUT)
ROLES = sorted({row["role"] for row in FOUND["rows"]})


def test_the_role_has_the_optimizer_and_the_rate_of_its_cell(monkeypatch):
    monkeypatch.setattr(benchmark, "STEPS", 3)
    cell = benchmark.Cell(task="GPT with experts", main="muon", by="muon", lr=0.01, companion_lr=0.01, role_lr=1.0)
    others = replace(cell, role_lr=0.01), replace(cell, by="adamw")
    losses = [benchmark.train(x).loss for x in (cell, *others)]
    assert all(map(isfinite, losses))
    assert len(set(losses)) == 3


def test_the_page_has_the_table_of_the_runs():
    assert benchmark.table(FOUND) in (Path(__file__).parents[2] / "docs" / "routing.md").read_text()


@pytest.mark.parametrize("role", ROLES)
def test_no_default_loses_in_every_comparison(role):
    """It loses one where the other arm is better with every seed."""
    better = [row["better"] for row in FOUND["rows"] if row["role"] == role and row["arm"] in ("muon", "soap")]
    losing = 0 if TREATMENTS[role].matrix else len(benchmark.FRESH)
    assert len(better) >= 2
    assert set(better) != {losing}
