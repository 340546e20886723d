"""The training job: what it writes, what it computes, and that a kill costs nothing but time."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from emerging_optimizers.lab.__main__ import main
from emerging_optimizers.lab.config import TrainConfig, UsageError
from emerging_optimizers.lab.record import RunResult
from emerging_optimizers.lab.train import read_run, resume_train, run_train

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
EOPT = [sys.executable, "-m", "emerging_optimizers.lab"]


def losses(folder, optimizer):
    """Everything in the metrics that does not depend on the clock."""
    lines = (folder / optimizer / "metrics.jsonl").read_text().splitlines()
    return [[json.loads(line)[key] for key in ("step", "loss", "lr", "validation_loss")] for line in lines]


def test_a_run_learns_and_leaves_its_files(tiny, tmp_path):
    folder = tmp_path / "run"
    result = run_train(tiny, folder, Console(quiet=True))

    for run in result.runs:
        assert run.evaluations[-1][1] < run.evaluations[0][1] < 4.7, run.optimizer
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

    with pytest.raises(UsageError, match="holds a run already"):
        run_train(tiny, folder, Console(quiet=True))


def test_a_killed_run_continues_with_the_same_losses(tiny, tiny_args, tmp_path):
    long = replace(tiny, steps=150, eval_every=10, checkpoint_every=7)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_train(long, whole, Console(quiet=True))

    changes = ["--steps", "150", "--eval-every", "10", "--checkpoint-every", "7", "--out", str(killed)]
    command = [*EOPT, "train", *tiny_args, *changes]
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=tmp_path)
    victim, delay = random.choice(long.optimizers), random.uniform(0, 0.3)
    print(f"to be killed {delay:.3f} s after the first checkpoint of {victim}")
    while not (killed / victim / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    assert not (killed / "summary.json").exists()

    main(["train", "--resume", str(killed)])
    for name in long.optimizers:
        assert losses(killed, name) == losses(whole, name), name


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
