"""`eopt train --nproc`: several processes train as one does, and any number goes on."""

import re
import shutil
from dataclasses import replace

import pytest
from rich.console import Console

from emerging_optimizers.lab.__main__ import main
from emerging_optimizers.lab.train import run_train


def shown(capfd):
    """Losses and held-out losses by optimizer and step; three decimals, which rounding hardly reaches."""
    lines = re.findall(r"(\w+)  step (\d+)/\d+  loss ([\d.]+)  validation ([\d.]+)", capfd.readouterr().err)
    return {(name, int(step)): [float(loss), float(held_out)] for name, step, loss, held_out in lines}


def same(found, whole):
    return found.keys() == whole.keys() and all(found[k] == pytest.approx(whole[k], abs=2e-3) for k in whole)


def test_two_processes_show_the_losses_of_one(tiny, tiny_args, tmp_path, capfd):
    whole = run_train(replace(tiny, optimizers=("soap",)), tmp_path / "whole", Console(quiet=True))
    steps = {("soap", step.step): [step.loss, held_out] for step, held_out in whole.runs[0].evaluations}
    main(["train", *tiny_args, "--optimizers", "soap", "--nproc", "2", "--out", str(tmp_path / "run")])
    assert same(shown(capfd), steps)
    with pytest.raises(SystemExit, match="was begun with --nproc; say how many"):
        main(["train", "--resume", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match=r"was begun without --nproc; leave it out$"):
        main(["train", "--resume", str(tmp_path / "whole"), "--nproc", "2"])
    with pytest.raises(SystemExit, match="holds results of `eopt train` already"):
        main(["train", *tiny_args, "--nproc", "2", "--out", str(tmp_path / "run")])


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["--nproc", "3"], "--nproc 3 cannot share --batch 4"),
        (["--nproc", "2", "--spike-at", "3"], "leave out --nproc"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(words, wrong, tiny_args, tmp_path):
    with pytest.raises(SystemExit, match=wrong):
        main(["train", *tiny_args, *words, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # six processes import torch
@pytest.mark.parametrize("words", [(), ("--average", "0.5")], ids=["plain", "average"])
def test_a_run_goes_on_with_another_number_of_processes(words, tiny_args, tmp_path, capfd):
    folder = tmp_path / "run"
    main(["train", *tiny_args, *words, "--optimizers", "adamw,soap", "--nproc", "2", "--out", str(folder)])
    whole = shown(capfd)
    for name in ("adamw", "soap"):
        shutil.rmtree(folder / name / "step-000006")
        (folder / name / "step-000004" / ".metadata").unlink()  # as after a kill while it was written
    main(["train", "--resume", str(folder), "--nproc", "4"])
    assert same(shown(capfd), whole)
