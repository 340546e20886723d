"""A process is killed while all of them save: the checkpoint before loads, and one process goes on from there."""

import runpy
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from emerging_optimizers.linalg.precision import reduced_precision
from tests.distributed.test_fsdp2_train import ENVIRONMENT, EXAMPLE, TOLERANCE, losses_in

# The second save of one rank ends it, before or behind its own file.
PROGRAM = f"""
import os, runpy, signal
from torch.distributed.checkpoint import FileSystemWriter

write, saves = FileSystemWriter.write_data, 0

def write_data(*args):
    global saves
    saves += 1
    dies = saves == 2 and os.environ["RANK"] == os.environ["DIES"]
    if dies and os.environ["WHEN"] == "before":
        os.kill(os.getpid(), signal.{signal.SIGKILL.name})
    written = write(*args)
    if dies:
        written.wait()
        os.kill(os.getpid(), signal.{signal.SIGKILL.name})
    return written

FileSystemWriter.write_data = write_data
runpy.run_path({str(EXAMPLE)!r}, run_name="__main__")
"""


def alone(words: list[str], monkeypatch: Any, capsys: Any) -> dict[int, float]:
    """The losses that the example shows here: a process of its own would take seconds to import torch."""
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *words])
    with warnings.catch_warnings(), reduced_precision("float32"):
        warnings.simplefilter("ignore")  # those of torch about itself
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return losses_in(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("rank", "when"),
    # The others differ in which file of the checkpoint is missing.
    [(1, "behind"), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((0, "before"), (0, "behind"), (1, "before")))],
)
def test_a_process_that_dies_in_a_save_costs_the_steps_since_the_last_one(
    rank: int, when: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    out, asked = tmp_path / "run", ["--optimizer", "soap", "--steps", "4", "--save-every", "2"]
    died = subprocess.run(
        [sys.executable, *torchrun, str(program), "--out", str(out), *asked],
        env={**ENVIRONMENT, "DIES": str(rank), "WHEN": when},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert died.returncode != 0
    assert [path.parent.name for path in sorted(out.glob("step-*/.metadata"))] == ["step-000002"]
    whole = alone(["--out", str(tmp_path / "whole"), *asked], monkeypatch, capsys)
    before = losses_in(died.stdout)
    after = alone(["--out", str(out), *asked, "--resume"], monkeypatch, capsys)
    assert [*whole] == [*before] == [1, 2, 3, 4]
    assert [*after] == [3, 4]
    assert before == pytest.approx(whole, abs=TOLERANCE)
    assert after == pytest.approx({step: whole[step] for step in after}, abs=TOLERANCE)
