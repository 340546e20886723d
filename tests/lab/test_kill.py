"""kill -9 of `eopt train` at a random moment: the folder can be resumed, and what comes out is the same bit for bit."""

import random
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from emerging_optimizers.lab.__main__ import main
from emerging_optimizers.lab.config import TrainConfig
from emerging_optimizers.lab.train import run_train
from tests.lab.conftest import TINY
from tests.lab.test_train import ENVIRONMENT, EOPT, losses

JOB = {**TINY, "steps": 40, "eval_every": 10, "checkpoint_every": 3}
NAMES = ("muon", "soap")
ARGUMENTS = [word for key, value in JOB.items() for word in (f"--{key.replace('_', '-')}", str(value))]
WORDS = [*EOPT, "train", *ARGUMENTS, "--optimizers", ",".join(NAMES)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_train(replace(TrainConfig(**JOB), optimizers=NAMES), folder, Console(quiet=True))
    return folder


def steps_in(folder: Path) -> int:
    """How many steps of all optimizers are written down."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*/metrics.jsonl"))


def kill_once(folder: Path, draw: random.Random, command: list[str]) -> None:
    """Begin or go on, and end it without a word at a random moment; or it is over before."""
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=folder.parent, stdout=subprocess.DEVNULL)
    until = draw.randrange(steps_in(folder), len(NAMES) * JOB["steps"] + 1)
    while steps_in(folder) < until and process.poll() is None:
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.02))
    process.kill()
    assert process.wait() in (-signal.SIGKILL, 0)


def same_tensors(a: object, b: object) -> bool:
    """Whether two checkpoints hold the same."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same_tensors(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, type(a)) and len(a) == len(b) and all(map(same_tensors, a, b))
    return a == b


def assert_survives(whole: Path, folder: Path, seed: int) -> None:
    """Kill a run, perhaps its continuation too, go on, and compare."""
    draw = random.Random(seed)
    kill_once(folder, draw, [*WORDS, "--out", str(folder)])
    for _ in range(draw.choice((0, 1))):
        if (folder / "config.json").exists():
            kill_once(folder, draw, [*EOPT, "train", "--resume", str(folder)])
    begun = (folder / "config.json").exists()
    main(["train", *(["--resume", str(folder)] if begun else [*WORDS[len(EOPT) + 1 :], "--out", str(folder)])])
    for name in NAMES:
        assert losses(folder, name) == losses(whole, name), (seed, name)
        ours, theirs = (torch.load(run / name / "checkpoint.pt", weights_only=True) for run in (folder, whole))
        assert all(same_tensors(ours[part], theirs[part]) for part in ("model", "optimizer", "schedule")), (seed, name)
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()} | {"loss.png"}


def test_a_kill_at_a_random_moment_changes_nothing(whole: Path, tmp_path: Path) -> None:
    seed = random.randrange(1000)
    print(f"seed {seed}")
    assert_survives(whole, tmp_path / "run", seed)


@pytest.mark.slow  # one kill is in every run
@pytest.mark.parametrize("seed", range(100))
def test_a_hundred_kills_change_nothing(whole: Path, tmp_path: Path, seed: int) -> None:
    assert_survives(whole, tmp_path / "run", seed)
