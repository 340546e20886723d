"""kill -9 of one of two processes at a random moment: the other ends by itself, and the run ends the same bit for bit.

The program is examples/fsdp2_train.py as it stands, with a smaller model.
"""

import importlib.util
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tests.distributed.processes import PRELOADED
from tests.distributed.test_fsdp2_train import EXAMPLE
from tests.lab.test_kill import same_tensors

STEPS, SAVE_EVERY = 8, 2
NAMES = ("soap", "muon")
SMALL = {"BATCH": 4, "CONTEXT": 16, "WIDTH": 16, "HEADS": 2, "BLOCKS": 1}
ENDS_WITHIN = 30.0  # seconds, of a process whose peer is gone; gloo itself would wait for half an hour
Whole = Callable[[str], tuple[Any, float]]
PHASES = ("before the first step", "between steps and saves", "in a step of the optimizer", "in a save")


class Rank:
    """One process of a run, from outside."""

    def __init__(self, rank: int, port: int, words: Sequence[str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.phase = context.Value("i", 0, lock=False)
        self.pipe, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_main, args=(rank, port, words, self.phase, theirs))
        self.process.start()
        theirs.close()

    def error(self) -> str:
        """What the process has raised, once it has ended; empty if nothing."""
        self.process.join(ENDS_WITHIN)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"it hangs {PHASES[self.phase.value]}")
        try:
            return str(self.pipe.recv())
        except EOFError:
            return "died without a word"


def _main(rank: int, port: int, words: Sequence[str], phase: Any, pipe: connection.Connection) -> None:
    """As torchrun starts it: the store of the group is another process's, and outlives this one."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    spec = importlib.util.spec_from_file_location("example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    vars(example).update(SMALL)
    save = example.save

    def now(value: int) -> Callable[..., None]:
        def note(*_: Any) -> None:
            phase.value = value

        return note

    def saved(*args: Any) -> None:
        phase.value = 3
        save(*args)
        phase.value = 1

    vars(example)["save"] = saved
    register_optimizer_step_pre_hook(now(2))
    register_optimizer_step_post_hook(now(1))
    sys.argv = ["fsdp2_train.py", *words]
    with open(os.devnull, "w") as sys.stdout:
        try:
            example.main()
        except BaseException as error:  # an interrupt, too: the test reads it
            pipe.send(f"{type(error).__name__}: {error}")
        else:
            pipe.send("")


def begin(folder: Path, name: str) -> tuple[list[Rank], dist.TCPStore]:
    """Two processes that start, or go on."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    numbers = ["--steps", str(STEPS), "--save-every", str(SAVE_EVERY)]
    words = ["--out", str(folder), "--optimizer", name, *numbers, "--resume"]
    return [Rank(rank, store.port, words) for rank in range(2)], store


def run_whole(folder: Path, name: str) -> float:
    """How long it takes from the first step on."""
    ranks, _store = begin(folder, name)
    began = wait_for_the_first_step(ranks)
    assert [rank.error() for rank in ranks] == ["", ""]
    return time.monotonic() - began


def wait_for_the_first_step(ranks: Sequence[Rank]) -> float:
    while not all(rank.phase.value for rank in ranks) and all(rank.process.is_alive() for rank in ranks):
        time.sleep(0.001)
    return time.monotonic()


def last(folder: Path, scratch: Path) -> Any:
    """Weights, state and schedule at the end of a run."""
    dcp_to_torch_save(folder / f"step-{STEPS:06}", scratch)
    return torch.load(scratch, weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Of an optimizer, what a run that nobody disturbs ends with, and how long its steps take."""

    @cache
    def found(name: str) -> tuple[Any, float]:
        folder = tmp_path_factory.mktemp("whole")
        seconds = run_whole(folder / "run", name)
        return last(folder / "run", folder / "last.pt"), seconds

    return found


def kill_once(folder: Path, name: str, draw: random.Random, seconds: float) -> str:
    """Ends one process at a moment of the run, which may be over by then; returns what that process was doing."""
    ranks, _store = begin(folder, name)
    wait_for_the_first_step(ranks)
    time.sleep(draw.uniform(0, seconds))
    dies, other = draw.sample(ranks, 2)
    dies.process.kill()
    dies.process.join()
    was = PHASES[dies.phase.value] if dies.process.exitcode == -signal.SIGKILL else "over"
    error = other.error()
    # One that needed nothing more from the other has come to its end.
    finished = (folder / f"step-{STEPS:06}" / ".metadata").exists()
    clear = "onnection" in error or "roken pipe" in error
    assert clear or (not error and finished), (was, error)
    return was


def assert_survives(whole: Whole, folder: Path, seed: int) -> None:
    draw = random.Random(seed)
    name = draw.choice(NAMES)
    expected, seconds = whole(name)
    for _ in range(draw.choice((1, 2))):
        print(f"seed {seed}, {name}: killed {kill_once(folder / 'run', name, draw, seconds)}")
    run_whole(folder / "run", name)
    assert same_tensors(last(folder / "run", folder / "last.pt"), expected)


def test_a_kill_of_one_process_at_a_random_moment_changes_nothing(whole: Whole, tmp_path: Path) -> None:
    assert_survives(whole, tmp_path, random.randrange(1000))


@pytest.mark.slow  # one is in every run
@pytest.mark.parametrize("seed", range(100))
def test_a_hundred_kills_of_one_process_change_nothing(whole: Whole, tmp_path: Path, seed: int) -> None:
    assert_survives(whole, tmp_path, seed)
