"""The example of FSDP2: a run goes on with another number of processes, and nothing shows.

In every test run from two processes to one: `test_kill_in_a_save.py` asks it of a run that ends badly.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "fsdp2_train.py"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(sys.path),
    "OMP_NUM_THREADS": "1",
    "EMERGING_OPTIMIZERS_REDUCED_PRECISION": "float32",
}
# Losses of 4 in float32, 1e-6, through bases of factors that lack full rank in the first steps.
TOLERANCE = 1e-4


def begin(processes, out, *arguments):
    """One process needs no torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = [*(torchrun if processes > 1 else []), str(EXAMPLE), "--out", str(out), *arguments]
    return subprocess.Popen([sys.executable, *words], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)


def losses(process):
    shown, _ = process.communicate(timeout=150)
    assert process.returncode == 0
    return losses_in(shown)


def losses_in(shown):
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+)  loss ([\d.]+)", shown)}


@pytest.mark.slow  # eight processes; test_kill_in_a_save.py goes from two to one
@pytest.mark.parametrize("name", ["soap", "muon", "adamw"])
def test_two_processes_then_four_then_one(name, tmp_path):
    whole = losses(begin(1, tmp_path / "whole", "--optimizer", name, "--steps", "9"))
    found = {}
    for processes, until in ((2, 3), (4, 6), (1, 9)):
        asked = ("--optimizer", name, "--steps", str(until), "--save-every", "2", "--resume")
        found |= losses(begin(processes, tmp_path / "parts", *asked))
    assert found == pytest.approx(whole, abs=TOLERANCE)
    again = begin(1, tmp_path / "parts", "--steps", "9")  # it would overwrite the run
    again.communicate(timeout=150)
    assert again.returncode == 1
