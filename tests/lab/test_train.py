"""The training job: what it writes, what it computes, and that a kill costs nothing but time."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from emerging_optimizers.lab.__main__ import main
from emerging_optimizers.lab.config import Arm, TrainConfig, UsageError
from emerging_optimizers.lab.data import load_text
from emerging_optimizers.lab.measures import recovery
from emerging_optimizers.lab.present import present_training
from emerging_optimizers.lab.runs import RunFolder, RunResult, SpikedRun, StepRecord
from emerging_optimizers.lab.train import read_run, resume_train, run_train, train_one

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
EOPT = [sys.executable, "-m", "emerging_optimizers.lab"]


def losses(folder, optimizer):
    """Everything in the metrics that does not depend on the clock."""
    lines = (folder / optimizer / "metrics.jsonl").read_text().splitlines()
    return [[json.loads(line)[key] for key in ("step", "loss", "lr", "validation_loss")] for line in lines]


def test_a_run_learns_and_leaves_its_files(tiny, tmp_path):
    folder = tmp_path / "run"
    result = run_train(tiny, folder, Console(quiet=True))
    present_training(result, Console(quiet=True))

    guessing = math.log(
        json.loads((folder / "environment.json").read_text())["vocabulary"]
    )  # of a text that differs between Pythons
    for run in result.runs:
        assert run.evaluations[-1][1] < run.evaluations[0][1] < guessing + 0.1, run.optimizer
        assert [step.step for step in run.steps] == [1, 2, 3, 4, 5, 6]
        assert 0 < run.optimizer_share < 1
        assert run.state_bytes / run.parameters >= 4
        assert RunResult.from_json(json.loads(json.dumps(asdict(run)))) == run
    assert len({run.steps[0].loss for run in result.runs}) == 1  # equal weights, equal data

    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "environment.json", "summary.json", "loss.png"),
        *("adamw", "muon", "soap"),
    }
    for name in tiny.optimizers:
        assert {path.name for path in (folder / name).iterdir()} == {*("metrics.jsonl", "checkpoint.pt", "result.json")}
    assert read_run(folder)[0] == tiny
    recorded = json.loads((folder / "environment.json").read_text())
    assert len(recorded["text"]["sha256"]) == 64
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["optimizer"] for row in summary] == ["adamw", "muon", "soap"]

    with pytest.raises(UsageError, match="holds results of `eopt train` already"):
        run_train(tiny, folder, Console(quiet=True))


def test_what_was_written_after_the_last_checkpoint_is_dropped(tiny, tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    config = replace(tiny, optimizers=("muon",), checkpoint_every=4)
    run_train(config, whole, Console(quiet=True))

    class Stopped(Exception):
        pass

    class StoppingConsole(Console):
        def print(self, *args: object, **kwargs: object) -> None:
            if "step 6" in str(args[0]):
                raise Stopped

    with pytest.raises(Stopped):
        run_train(replace(config, checkpoint_every=4), torn, StoppingConsole(quiet=True))
    run = torn / "muon"
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    (run / "checkpoint.pt.tmp").write_bytes(b"half a checkpoint")
    resume_train(torn, Console(quiet=True))
    assert losses(torn, "muon") == losses(whole, "muon")


def test_a_finished_optimizer_is_not_run_again(tiny, tmp_path):
    config = replace(tiny, optimizers=("adamw",))
    before = run_train(config, tmp_path / "run", Console(quiet=True))
    after = resume_train(tmp_path / "run", Console(quiet=True))
    assert after.runs == before.runs  # with its seconds


def test_resume_refuses_what_contradicts_the_run(tiny, tiny_args, tmp_path):
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    folder = tmp_path / "run"
    run_train(replace(tiny, optimizers=("adamw",), text=str(text)), folder, Console(quiet=True))
    same = [*tiny_args, "--optimizers", "adamw", "--text", str(text), "--resume", str(folder)]

    main(["train", *same])
    with pytest.raises(SystemExit, match=r"other settings: --width is 128, was 32$"):
        main(["train", *same, "--width", "128"])  # also where it is the value that a new run would have
    with pytest.raises(SystemExit, match=r"--lr is .*was \{\}$"):
        main(["train", *same, "--lr", "adamw=0.5"])
    with pytest.raises(SystemExit, match="leave out --out"):
        main(["train", *same, "--out", "elsewhere"])
    text.write_text("the quick brown fox jumps over the lazy cat. " * 20)
    with pytest.raises(SystemExit, match="is not the text that"):
        main(["train", *same])
    with pytest.raises(SystemExit, match="holds no run"):
        main(["train", "--resume", str(tmp_path)])


def test_resume_without_a_folder_takes_the_newest(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="there is no run under"):
        main(["train", "--resume"])
    one = replace(tiny, optimizers=("adamw",))
    run_train(one, Path("runs/begun-first"), Console(quiet=True))
    newest = run_train(one, None, Console(quiet=True)).folder
    assert newest.parent == Path("runs")
    main(["train", "--resume"])
    assert str(newest) in capsys.readouterr().out


def test_learning_rates_given_on_the_command_line_are_used(tiny_args, tmp_path):
    out = tmp_path / "run"
    rates = ["--optimizers", "adamw,muon", "--lr", "muon=0.05", "--companion-lr", "0.004"]
    main(["train", *tiny_args, *rates, "--out", str(out)])
    _, arms = read_run(out)
    assert arms["muon"].lr == 0.05
    assert arms["muon"].companion_lr == 0.004
    assert max(max(lr) for _, _, lr, _ in losses(out, "muon")) == 0.05


def test_an_unknown_optimizer_is_refused_before_anything_is_written(tiny, tmp_path):
    config = replace(tiny, optimizers=("adamw", "mu0n"))
    with pytest.raises(UsageError, match="mu0n"):
        run_train(config, tmp_path / "run", Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_the_learning_rate_rises_then_falls_to_zero(tiny, tmp_path):
    run_train(replace(tiny, optimizers=("adamw",), lr={"adamw": 1.0}), tmp_path / "run", Console(quiet=True))
    assert [lr[0] for _, _, lr, _ in losses(tmp_path / "run", "adamw")] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    ("arguments", "shown", "hidden"),
    [(["train", "--help"], "adamw,muon,soap", "Traceback"), (["list", "*o*"], "muon", "adamw")],
)
def test_help_and_list_answer(arguments, shown, hidden, tmp_path):
    command = [*EOPT, *arguments]
    output = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shown in output.stdout
    assert hidden not in output.stdout


def test_help_does_not_wait_for_torch():
    code = "import sys; import emerging_optimizers.lab.__main__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True, timeout=60)


def test_the_configuration_survives_json(tiny):
    config = replace(tiny, lr={"soap": 0.01}, companion_lr=0.004)
    assert TrainConfig.from_json(json.loads(json.dumps(asdict(config)))) == config


# ---- with a gradient spike -------------------------------------------------------------------------------------------


@pytest.fixture
def spiked(tiny, tmp_path):
    """A run with a spike of 1000 after four steps."""
    config = replace(tiny, steps=10, spike_at=4, optimizers=("adamw", "muon"))
    return run_train(config, tmp_path / "spiked", Console(quiet=True))


def test_a_spike_is_one_step_of_real_training(spiked, tiny, tmp_path):
    names = [f"{name}{kind}" for name in ("adamw", "muon") for kind in ("", "-spike", "-spike-guard")]
    files = {"config.json", "environment.json", "summary.json", "loss.png", "spike.json", "spike.png"}
    present_training(spiked, Console(quiet=True))
    assert {path.name for path in spiked.folder.iterdir()} == {*files, *names}
    assert [(s.run.optimizer, s.guard) for s in spiked.spiked] == [
        *(("adamw", None), ("adamw", 2.0), ("muon", None), ("muon", 2.0))
    ]
    calm = run_train(replace(tiny, steps=10, optimizers=("adamw",)), tmp_path / "calm", Console(quiet=True))
    without_clock = [(step.loss, step.update_rms) for step in calm.runs[0].steps]
    assert [(step.loss, step.update_rms) for step in spiked.runs[0].steps] == without_clock
    for s in spiked.spiked[::2]:  # the spike's own step is the fifth, and its loss is of the weights before
        same = [x.loss == y.loss for x, y in zip(s.run.steps, s.calm.steps, strict=True)]
        assert same == 5 * [True] + 5 * [False]
        rms = [x.update_rms == y.update_rms for x, y in zip(s.run.steps, s.calm.steps, strict=True)]
        assert rms == 4 * [True] + 6 * [False]


def test_the_guard_brings_training_back(spiked):
    rows = json.loads((spiked.folder / "spike.json").read_text())
    assert rows == recovery(spiked.spiked)
    for bare, guarded in zip(rows[::2], rows[1::2], strict=True):
        assert (bare["guard"], guarded["guard"]) == (None, 2.0)
        assert guarded["worst_excess"] < bare["worst_excess"]
        assert abs(guarded["final_loss"] - guarded["final_loss_without_spike"]) < abs(
            bare["final_loss"] - bare["final_loss_without_spike"]
        )


def test_the_recovery_by_hand():
    def run(losses, updates):
        steps = tuple(
            StepRecord(step=i, loss=loss, update_rms=rms, validation_loss=loss)
            for i, (loss, rms) in enumerate(zip(losses, updates, strict=True), start=1)
        )
        return RunResult(optimizer="adamw", arm=Arm(), parameters=1, state_bytes=0, steps=steps)

    calm = run([5.0, 4.0, 3.0, 2.0, 2.0, 2.0, 2.0], 7 * [0.5])
    hit = run([5.0, 4.0, 3.0, 2.9, 2.0, 2.4, 2.04], [0.5, 0.5, 0.6, 2.0, 0.5, 0.1, 0.5])
    lost = run([5.0, 4.0, 3.0, float("nan"), 2.0, 2.0, 2.5], [0.5, 0.5, 0.6, float("nan"), 2.0, 2.0, 2.0])
    rows = recovery([SpikedRun(run=r, calm=calm, spike_at=2, guard=None) for r in (hit, lost)])
    assert rows[0] == {
        "optimizer": "adamw",
        "guard": None,
        "loss_before": 4.5,
        "worst_loss": 2.9,
        "worst_excess": pytest.approx(0.9),
        "loss_back": 4,
        "update_at_spike": pytest.approx(1.2),
        "largest_update": 4.0,
        "update_first_back": 2,
        "update_back": 4,
        "final_loss": 2.04,
        "final_loss_without_spike": 2.0,
    }
    assert [rows[1][key] for key in ("worst_loss", "loss_back", "largest_update", "update_first_back")] == 4 * [None]


def test_a_killed_run_with_a_spike_continues_with_the_same_losses(spiked, tmp_path):
    torn = tmp_path / "torn"
    shutil.copytree(spiked.folder, torn)
    config, arms = read_run(torn)
    shutil.rmtree(torn / "muon-spike")

    class Stopped(Exception):
        pass

    def stop(record):
        if record.step == 5:  # the spike's own; the last checkpoint is of step 4
            raise Stopped

    text, folder = load_text(config.text, config.context), RunFolder(torn / "muon-spike")
    with pytest.raises(Stopped):
        train_one(config, "muon", arms["muon"], text, folder=folder, watch=stop)
    resume_train(torn, Console(quiet=True))
    assert losses(torn, "muon-spike") == losses(spiked.folder, "muon-spike")
    assert (torn / "spike.json").read_text() == (spiked.folder / "spike.json").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spike_scale": 10.0}, "--spike-scale 10 needs --spike-at"),
        ({"spike_at": 5}, "--spike-at 5 .* one after it in --steps 6"),
        ({"spike_at": 0}, "--spike-at 0 needs a step before the spike"),
        ({"spike_at": 2, "spike_scale": -1.0}, "--spike-scale -1 must be positive and finite"),
        ({"spike_at": 2, "spike_scale": float("inf")}, "--spike-scale inf must be positive and finite"),
    ],
)
def test_a_spike_that_cannot_be_is_refused(changes, message, tiny):
    with pytest.raises(UsageError, match=message):
        replace(tiny, **changes)


def test_the_spike_of_the_command_line_is_a_thousand_by_default(tiny_args, tmp_path):
    out = tmp_path / "run"
    main(["train", *tiny_args, "--optimizers", "adamw", "--spike-at", "3", "--out", str(out)])
    assert read_run(out)[0].spike == (3, 1000.0)
    with pytest.raises(SystemExit, match="--spike-at is 2, was 3"):
        main(["train", *tiny_args, "--optimizers", "adamw", "--spike-at", "2", "--resume", str(out)])


def test_an_average_is_evaluated_and_resumed(tiny, tmp_path):
    """The training losses are those without one, and what is evaluated after a resume is the same."""
    config = replace(tiny, optimizers=("muon",), average=0.9)
    folder = tmp_path / "run"
    run_train(config, folder, Console(quiet=True))
    whole = losses(folder, "muon")
    plain = train_one(replace(config, average=None), "muon", config.arm("muon"), load_text(None, config.context))
    assert [row[1] for row in whole] == [step.loss for step in plain.steps]
    assert [row[3] for row in whole] != [step.validation_loss for step in plain.steps]

    class Killed(Exception):
        pass

    def kill(past):
        if past.step == 5:  # behind the checkpoint of step 4
            raise Killed

    half = RunFolder(tmp_path / "half" / "muon")
    text = load_text(None, config.context)
    with pytest.raises(Killed):
        train_one(config, "muon", config.arm("muon"), text, folder=half, watch=kill)
    train_one(config, "muon", config.arm("muon"), text, folder=half)
    assert losses(tmp_path / "half", "muon") == whole
    with pytest.raises(UsageError, match="--average 2 is no decay"):
        replace(tiny, average=2.0)
