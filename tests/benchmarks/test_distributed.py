"""The benchmark of several processes: tiny rows, and the saved ones."""

from functools import partial

from torch.multiprocessing import start_processes

from benchmarks import distributed as benchmark
from emerging_optimizers.lab.record import read_json


def test_tiny_rows(monkeypatch):
    """The three ways take the same step; ours sends an agreement, gradients and updates."""
    # Processes that need not import torch each anew.
    monkeypatch.setattr(benchmark.mp, "spawn", partial(start_processes, start_method="forkserver"))
    shapes = ((2, (8, 16)), (1, (16, 8)))
    (row,) = benchmark.run(2, [(shapes, "float32")], rounds=2, warm=1)
    assert row.distance["gather"] < 1e-5  # rounding, times what five steps of the iteration make of it
    assert row.distance["torch"] < 1e-3  # and torch adds 1e-7 to the norm
    assert row.collectives["ours"] == 3
    assert row.collectives["gather"] == 3  # a gradient each
    assert row.collectives["torch"] > 10 * 3
    assert all(row.milliseconds[way] > 0 for way in benchmark.WAYS)
    lines = benchmark.markdown([row]).splitlines()
    assert "2 of 8 x 16, 1 of 16 x 8 | float32" in lines[2]


def test_the_saved_rows_can_be_shown():
    saved = [benchmark.restored(row) for row in read_json(benchmark.OUT)["rows"]]
    assert {row.processes for row in saved} == {2, 4}
    assert {row.precision for row in saved} == {"float32", "bfloat16"}
    assert len(benchmark.markdown(saved).splitlines()) == 2 + len(saved)
