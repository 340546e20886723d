"""Run folders: one writer, files that are there whole or not at all, and damage that is named."""

import errno
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from emerging_optimizers.cli.files import write_atomically
from emerging_optimizers.lab.__main__ import main
from emerging_optimizers.lab.config import TrainConfig, UsageError
from emerging_optimizers.lab.present import present_training
from emerging_optimizers.lab.record import DamagedError, environment, read_json, sealed, sole_writer, write_json
from emerging_optimizers.lab.report import write_report
from emerging_optimizers.lab.runs import RunFolder, StepRecord, TrainResult
from emerging_optimizers.lab.spike import SpikeConfig, run_spike
from emerging_optimizers.lab.train import resume_train, run_train

QUIET = Console(quiet=True)
SPIKE = SpikeConfig(optimizers=("muon",), shape=(4, 3), steps=12, spike_at=(5,), spike_scale=(10.0,))
# Takes the locks of its arguments, FOLDER or FOLDER::FILE, as soon as a line comes, and keeps them until no more does.
HOLDER = """
import sys
from contextlib import ExitStack
from pathlib import Path
from emerging_optimizers.lab.record import sole_writer
assert "torch" not in sys.modules
print("ready", flush=True)
sys.stdin.readline()
try:
    with ExitStack() as stack:
        for what in sys.argv[1:]:
            folder, _, file = what.partition("::")
            stack.enter_context(sole_writer(Path(folder), file or None))
        print("holds", flush=True)
        sys.stdin.read()
except ValueError as error:
    print(error, flush=True)
"""


def start(*locks):
    """A process that is about to take locks."""
    command = [sys.executable, "-c", HOLDER, *map(str, locks)]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=paths, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def go(process):
    """Lets it take them."""
    process.stdin.write("\n")
    process.stdin.flush()


def contents(folder):
    """Every file under a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(folder, optimizer="adamw"):
    """Everything in the metrics that does not depend on the clock."""
    lines = (folder / optimizer / "metrics.jsonl").read_text().splitlines()
    return [[json.loads(line)[key] for key in ("step", "loss", "lr", "validation_loss")] for line in lines]


# ---- one writer ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """A folder of runs, a spike experiment's among them, that another process is writing."""
    runs = tmp_path_factory.mktemp("runs")
    write_json(runs / "spike" / "result.json", run_spike(SPIKE).to_json())
    write_json(runs / "spike" / "environment.json", environment(1))
    process = start(*(runs / name for name in ("spike", "new")), *(f"{runs}::{name}" for name in ("a.json", "a.html")))
    go(process)
    assert process.stdout.readline() == "holds\n"
    yield runs, process.pid
    process.communicate()
    assert process.returncode == 0
    assert [path.name for path in runs.iterdir()] == ["spike"]  # no lock, and no folder that it had made
    assert not (runs / "spike" / "lock.json").exists()


@pytest.mark.parametrize(
    ("command", "out"),
    [
        *((command, "spike") for command in ("train", "spike", "eigenbasis", "precision", "tf32")),
        *(("train", "new"), ("grid", "a.json"), ("report", "a.html")),
    ],
)
def test_who_writes_where_another_does_is_refused(command, out, held):
    runs, pid = held
    before = contents(runs)
    arguments = ["--runs", str(runs)] if command == "report" else []
    with pytest.raises(SystemExit) as error:
        main([command, "--out", str(runs / out), *arguments])
    message = str(error.value)
    assert message.startswith(f"eopt: {runs / out} is being written by process {pid} on {os.uname().nodename} since 20")
    assert f"kill {pid}" in message
    assert "--out" in message
    assert contents(runs) == before


def test_a_reader_needs_no_lock(held, tmp_path):
    runs, _ = held
    assert [section.id for section in write_report(runs, tmp_path / "report.html")] == ["spike"]


def test_a_killed_writer_is_no_obstacle(tmp_path):
    folder = tmp_path / "run"
    process = start(folder)
    go(process)
    assert process.stdout.readline() == "holds\n"
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert json.loads((folder / "lock.json").read_text())["process"] == process.pid
    (folder / ".config.json.0123.unfinished").write_text('{"half')
    (folder / "mine.unfinished").touch()
    with sole_writer(folder):
        assert json.loads((folder / "lock.json").read_text())["process"] == os.getpid()
    assert [path.name for path in folder.iterdir()] == ["mine.unfinished"]


def test_of_processes_that_start_together_one_writes(tmp_path):
    processes = [start(tmp_path / "run") for _ in range(3)]
    for process in processes:
        go(process)
    said = [process.stdout.readline() for process in processes]
    for process in processes:
        process.communicate()
    assert said.count("holds\n") == 1
    (winner,) = (process for process, line in zip(processes, said, strict=True) if line == "holds\n")
    assert sum(f"is being written by process {winner.pid}" in line for line in said) == 2
    assert not (tmp_path / "run" / "lock.json").exists()


def test_threads_take_turns_too(tmp_path):
    folder, inside, most, refusals = tmp_path / "run", [], [], []

    def enter(number):
        for _ in range(50):
            try:
                with sole_writer(folder), sole_writer(folder):  # a function may call another that takes it too
                    inside.append(number)
                    most.append(len(inside))
                    inside.remove(number)
            except UsageError as error:
                refusals.append(str(error))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(enter, range(4)))
    assert set(most) == {1}
    assert not [refusal for refusal in refusals if f"{folder} is being written by" not in refusal]
    assert not (folder / "lock.json").exists()


def test_the_lock_is_let_go_when_the_block_fails(tmp_path):
    with pytest.raises(RuntimeError), sole_writer(tmp_path / "run"):
        raise RuntimeError
    assert not (tmp_path / "run").exists()
    with sole_writer(tmp_path / "run"):
        (tmp_path / "run" / "kept").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["kept"]


# ---- writing ---------------------------------------------------------------------------------------------------------


class Disk:
    """A disk on which writing fails from the operation of one number on."""

    def __init__(self, monkeypatch, kinds=("write", "fsync", "replace"), code=errno.ENOSPC):
        self.left, self.kinds, self.code = None, kinds, code
        opened = Path.open

        def fake_open(path, mode="r", *args, **kwargs):
            file = opened(path, mode, *args, **kwargs)
            return Half(self, file) if mode in ("ab", "xb") else file

        def failing(kind, operation):
            def operate(*args):
                self.use(kind)
                return operation(*args)

            return operate

        monkeypatch.setattr(Path, "open", fake_open)
        monkeypatch.setattr(os, "fsync", failing("fsync", os.fsync))
        monkeypatch.setattr(os, "replace", failing("replace", os.replace))

    def use(self, kind):
        if kind in self.kinds and self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise OSError(self.code, os.strerror(self.code))


class Half:
    """A file that writes half of what it is given where the disk fails."""

    def __init__(self, disk, file):
        self.disk, self.file = disk, file

    def write(self, content):
        try:
            self.disk.use("write")
        except OSError:
            self.file.write(content[: len(content) // 2])
            raise
        return self.file.write(content)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@pytest.mark.parametrize("kind", ["write", "fsync", "replace"])
@pytest.mark.parametrize(
    ("code", "remedy"),
    [(errno.ENOSPC, "free some space"), (errno.EACCES, "the right to write"), (errno.EIO, "mend that")],
)
def test_what_cannot_be_written_leaves_what_was_there(kind, code, remedy, tmp_path, monkeypatch):
    files = {tmp_path / "one": b"1" * 100, tmp_path / "two": b"2" * 100}
    write_atomically(files)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o666 & ~umask
    disk = Disk(monkeypatch, (kind,), code)
    for left in range(1 if kind == "replace" else 2):  # all new files are complete before the first old one goes
        disk.left = left
        with pytest.raises(UsageError, match=rf"(one|two) cannot be written \({os.strerror(code)}\); .*{remedy}"):
            write_atomically(dict.fromkeys(files, b"new"))
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_what_stands_in_the_place_of_a_file_stays(tmp_path):
    (tmp_path / "one").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "folder", tmp_path / "one" / "below"):
        with pytest.raises(UsageError, match=rf"{place} cannot be written .*; move away what stands in its place"):
            write_atomically({tmp_path / "one": b"new", place: b"new"})
    with pytest.raises(SystemExit, match=r"one cannot be written .*; move away what stands in its place"):
        main(["spike", "--out", str(tmp_path / "one")])
    assert contents(tmp_path) == {Path("one"): b"old"}


def test_writers_of_one_file_do_not_meet(tmp_path):
    """Each leaves a whole file, also where nobody holds a lock."""
    barrier, values = threading.Barrier(4), [bytes([65 + i]) * 200_000 for i in range(4)]

    def write(value):
        barrier.wait()
        for _ in range(5):
            write_atomically({tmp_path / "file": value})
            assert (tmp_path / "file").read_bytes() in values

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, values))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Six steps on a short text, which is read in no time."""
    text = tmp_path_factory.mktemp("text") / "text"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    size = {"batch": 2, "context": 16, "width": 8, "depth": 1, "heads": 1, "warmup": 2}
    often = {"eval_every": 3, "eval_windows": 4, "checkpoint_every": 2}
    return TrainConfig(optimizers=("adamw",), text=str(text), steps=6, **size, **often)


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_train(job, folder, QUIET)
    return folder


def test_a_run_on_a_full_disk_continues_where_there_is_space(job, whole, tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    disk.left = 1000
    run_train(job, tmp_path / "all", QUIET)
    operations = 1000 - disk.left
    for left in (*range(8), *random.sample(range(8, operations - 1), 3), operations - 1):  # the first write the request
        folder = tmp_path / str(left)
        disk.left = left
        with pytest.raises(UsageError, match=r"cannot be written \(No space left on device\); free some space"):
            run_train(job, folder, QUIET)
        disk.left = None
        assert not list(folder.rglob("*.unfinished"))
        assert not list(folder.rglob("lock.json"))
        if (folder / "config.json").exists():
            resume_train(folder, QUIET)
        else:
            run_train(job, folder, QUIET)
        assert losses(folder) == losses(whole), f"operation {left} of {operations}"


def test_a_picture_that_does_not_fit_leaves_the_numbers(job, whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    before, disk, result = contents(folder), Disk(monkeypatch), TrainResult.read(folder, job)
    disk.left = 0
    with pytest.raises(UsageError, match=r"loss\.png cannot be written \(No space left on device\)"):
        present_training(result, QUIET)
    assert contents(folder) == before
    disk.left = None
    present_training(resume_train(folder, QUIET), QUIET)
    assert (folder / "loss.png").exists()


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(job, tmp_path_factory):
    """A run that stopped after its fifth step, with a checkpoint of its fourth."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"

    class Stopped(Exception):
        pass

    class StoppingConsole(Console):
        def print(self, *args, **kwargs):
            if "step 5" in str(args[0]):
                raise Stopped

    with pytest.raises(Stopped):
        run_train(replace(job, eval_every=5), folder, StoppingConsole(quiet=True))
    return folder


@pytest.fixture
def torn(interrupted, tmp_path):
    """A copy of it to be damaged."""
    shutil.copytree(interrupted, tmp_path / "run")
    return tmp_path / "run"


def refused(folder, file, match):
    """Resumes, and sees that it is refused, with the file and a remedy, and that nothing was written."""
    before = contents(folder)
    with pytest.raises(SystemExit) as error:
        main(["train", "--resume", str(folder)])
    message = str(error.value)
    assert message.startswith(f"eopt: {folder / file} cannot be read (")
    assert match in message
    assert "bring it back" in message or "remove it" in message
    assert contents(folder) == before


def test_metrics_longer_than_the_checkpoint_are_cut_back(torn):
    assert [step for step, *_ in losses(torn)] == [1, 2, 3, 4, 5]
    resume_train(torn, QUIET)
    assert [step for step, *_ in losses(torn)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("left", "more"), [(0, b""), (3, b""), (3, b'{"step": 4, "lo'), (None, b"")])
def test_metrics_shorter_than_the_checkpoint_are_refused_with_both_numbers(left, more, torn):
    metrics = torn / "adamw" / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    if left is None:
        metrics.unlink()
    else:
        metrics.write_bytes(b"".join([*lines[:left], more]))
    words = f"it holds {left or 0} whole steps, and checkpoint.pt was saved after step 4"
    refused(torn, "adamw/metrics.jsonl", words)
    shutil.rmtree(torn / "adamw")  # the remedy
    resume_train(torn, QUIET)
    assert len(losses(torn)) == 6


DAMAGE = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "not text": lambda content: b"\xff\xfe\x00" + content,
    "a list": lambda content: b"[1, 2]",
    "another tool's": lambda content: b'{"nbformat": 4, "cells": []}',
    "nested": lambda content: b"[" * 100_000,
}
FILES = ("config.json", "environment.json", "adamw/checkpoint.pt", "adamw/metrics.jsonl")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named(file, damage, torn):
    path = torn / file
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    refused(torn, file, "")


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_may_not_be_read_is_named_and_so_is_a_folder_in_its_place(file, torn, monkeypatch):
    path = torn / file
    name = "read_text" if path.suffix == ".json" else "read_bytes"
    read, saved = getattr(Path, name), path.read_bytes()

    def forbidden(asked, *args, **kwargs):  # a mode would not do: these tests may run as root
        if asked == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return read(asked, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, name, forbidden)
        with pytest.raises(UsageError, match=rf"{path} cannot be read \(Permission denied\); bring it back"):
            resume_train(torn, QUIET)
    assert path.read_bytes() == saved
    path.unlink()
    path.mkdir()
    refused(torn, file, "Is a directory")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"steps": "6"}, "TypeError"),
        ({"seed": "6"}, "seed is '6', not int"),
        ({"a_later_version": True}, "a_later_version"),
        ({"warmup": 100}, "--warmup 100 leaves nothing of --steps 6"),
    ],
)
def test_a_configuration_of_another_version_is_named(change, match, torn):
    stored = json.loads((torn / "config.json").read_text())
    stored["config"] |= change
    (torn / "config.json").write_text(json.dumps(stored))
    refused(torn, "config.json", match)


def test_another_digit_in_the_configuration_or_in_the_metrics_is_noticed(torn):
    """They are still JSON, and no longer what the checkpoint was saved with."""
    config, metrics = torn / "config.json", torn / "adamw" / "metrics.jsonl"
    saved = config.read_text()
    config.write_text(saved.replace('"seed": 0', '"seed": 1'))
    refused(torn, "adamw/checkpoint.pt", "it is of another job, which differs in seed")
    config.write_text(saved)
    text = metrics.read_text()
    metrics.write_text(text.replace("0.0", "0.1", 1))
    assert metrics.read_text() != text
    refused(torn, "adamw/metrics.jsonl", "its first 4 steps are not those that checkpoint.pt was saved with")


def test_another_digit_in_a_result_is_noticed(tiny, tmp_path):
    run_train(replace(tiny, optimizers=("adamw",)), tmp_path / "run", Console(quiet=True))
    result = tmp_path / "run" / "adamw" / "result.json"
    text = result.read_text()
    result.write_text(text.replace("0.0", "0.1", 1))
    assert result.read_text() != text
    refused(tmp_path / "run", "adamw/result.json", "its checksum is another")
    result.write_text(text)
    resume_train(tmp_path / "run", Console(quiet=True))


def test_a_program_in_the_place_of_a_checkpoint_does_not_run(torn, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "done"),)

    torch.save({"step": Evil()}, torn / "adamw" / "checkpoint.pt")
    refused(torn, "adamw/checkpoint.pt", "UnpicklingError")
    (torn / "adamw" / "checkpoint.pt").write_bytes(pickle.dumps(Evil()))
    refused(torn, "adamw/checkpoint.pt", "BadZipFile")
    assert not (tmp_path / "done").exists()


def test_a_flipped_bit_is_found_or_harmless(tmp_path):
    """In a checkpoint and its metrics; torch by itself loads half of the flipped checkpoints, with other weights."""

    class Part:
        def __init__(self, value):
            self.value = value

        def state_dict(self):
            return {"value": self.value}

        def load_state_dict(self, state):
            self.value = state["value"]

    value, job = torch.linspace(-1, 1, 300), {"lr": 0.1}
    folder = RunFolder(tmp_path)
    folder.restore({}, job)
    folder.append(StepRecord(step=1, loss=2.5, lr=(0.1,)))
    folder.save(1, {"part": Part(value)}, job)
    found = 0
    for path in 60 * [folder.checkpoint] + 30 * [folder.metrics]:
        saved, position = path.read_bytes(), random.randrange(8 * path.stat().st_size)
        flipped = bytearray(saved)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        part = Part(torch.zeros(300))
        try:
            (step,) = folder.restore({"part": part}, job)
            assert (step.step, step.loss, step.lr) == (1, 2.5, (0.1,)), (path, position)
            assert part.value.equal(value), (path, position)
        except DamagedError:
            found += 1
        path.write_bytes(saved)
    assert found > 40


def test_a_result_that_is_damaged_or_anothers_is_made_again_from_the_checkpoint(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    result = folder / "adamw" / "result.json"
    saved, stored = result.read_text(), read_json(result)
    for change in ({"optimizer": "muon"}, {"steps": []}, {"parameters": "many"}, None):
        result.write_text(json.dumps(sealed(stored | change)) if change else saved[:-40])
        refused(folder, "adamw/result.json", "remove it and continue with --resume")
        with pytest.raises(UsageError, match=r"adamw/result\.json cannot be read .*; make it again with `eopt train`"):
            write_report(tmp_path, tmp_path / "report.html")
    result.unlink()
    (again,) = resume_train(folder, QUIET).runs
    assert sealed(json.loads(json.dumps(asdict(again)))) == json.loads(saved)


def test_a_device_or_a_pipe_is_not_replaced(tmp_path):
    pipe, file = tmp_path / "pipe", tmp_path / "a.txt"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match=r"pipe cannot be written \(it is a device or a pipe\);"):
        write_atomically({file: b"1", pipe: b"2"})
    assert pipe.is_fifo()
    assert not file.exists()


@pytest.mark.parametrize("text", ["[", "[]", '{"job": 1, "runs": []}', '{"job": {}, "runs": [{}]}', None])
@pytest.mark.parametrize(("command", "name"), [("grid", "grid.json"), ("tf32", "runs.json"), ("tf32", "result.json")])
def test_damaged_results_that_would_be_continued_are_named(command, name, text, tmp_path):
    path = tmp_path / name
    path.write_text(text) if text else path.mkdir()
    before = contents(tmp_path)
    with pytest.raises(SystemExit, match=rf"eopt: {path} cannot be read \(.*bring it back, .*--out"):
        main([command, "--resume", "--out", str(path if command == "grid" else tmp_path)])
    assert contents(tmp_path) == before


def test_a_number_that_cannot_be_shown_is_named(tmp_path):
    stored = run_spike(SPIKE).to_json()
    stored["arms"][0]["trajectories"][0]["rms"][3] = "0.5"
    write_json(tmp_path / "spike" / "result.json", stored)
    write_json(tmp_path / "spike" / "environment.json", environment(1))
    with pytest.raises(
        UsageError, match=r"spike/result\.json cannot be read \(TypeError.*; make it again with `eopt spike`"
    ):
        write_report(tmp_path, tmp_path / "report.html")


def test_a_new_grid_that_is_refused_leaves_the_old_one(tmp_path):
    (tmp_path / "grid.json").write_text('{"job": {}, "best": {}, "runs": []}')
    (tmp_path / "grid.environment.json").write_text("old")
    before = contents(tmp_path)
    with pytest.raises(SystemExit, match="mu0n"):
        main(["grid", "--overwrite", "--optimizers", "mu0n", "--lr", "mu0n=0.1", "--out", str(tmp_path / "grid.json")])
    assert contents(tmp_path) == before
