"""One rule for what stands where a command is to write, for every command that writes."""

import json
import shutil
import sys

import pytest

from emerging_optimizers.lab import grid, present, tf32
from emerging_optimizers.lab.__main__ import LAB, main
from emerging_optimizers.lab.places import UNSAVED
from emerging_optimizers.lab.runs import RunResult, StepRecord

SPIKE = "--optimizers muon --shape 4 3 --steps 12 --spike-at 5 --spike-scale 10 --processes 1"
EIGENBASIS = "--shape 8 6 --steps 8 --spike-at 4 --offsets 1 --top 2"
PRECISION = "--shape 4 6 --ranges 1e2 --draws 2"
TF32 = "--optimizers rekls --seeds 0 --steps 12 --spike-at 4"


def trained(config, name, arm, text, **_):
    """A run without training."""
    steps = (StepRecord(step=1, loss=2.0, cpu_s=1.0, wall_s=1.0, validation_loss=2.0),)
    return RunResult(optimizer=name, arm=arm, parameters=1, state_bytes=1, steps=steps)


class Pool:
    """One that trains nothing."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, _, config, run):
        from concurrent.futures import Future

        future = Future()
        future.set_result(tf32.replace(run, final_loss=2.0, losses={"12": 2.0}, update_rms=(1.0,)))
        return future


@pytest.fixture
def line(tiny_args, tmp_path, monkeypatch):
    """The words of a small job of a command, and the place where it writes."""
    monkeypatch.setattr(grid, "train_one", trained)
    monkeypatch.setattr(present, "_draw", lambda view, folder: (folder / "no.png",))  # drawing takes seconds
    monkeypatch.setattr(tf32, "workers", Pool)
    words = {
        "train": [*tiny_args, "--optimizers", "adamw"],
        "grid": [*tiny_args, "--optimizers", "adamw"],
        "spike": SPIKE.split(),
        "eigenbasis": EIGENBASIS.split(),
        "precision": PRECISION.split(),
        "tf32": TF32.split(),
        "gallery": ["physics", "--steps", "1"],
    }
    return lambda command: ([command, *words[command]], tmp_path / ("out.json" if command == "grid" else "out"))


def contents(place):
    """Every file and its bytes, without the pictures, which carry the time."""
    files = [place] if place.is_file() else sorted(place.rglob("*"))
    return {str(path): path.read_bytes() for path in files if path.is_file() and path.suffix != ".png"}


def refused(words, capsys, *said):
    """The command ends with status 2 and says so."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, words)])
    message = capsys.readouterr().err
    assert end.value.code == 2, message
    assert not [words for words in said if words not in message], message


COMMANDS = [name for name in LAB if name != "report"]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_there_is_refused_continued_or_replaced(command, line, capsys):
    words, out = line(command)
    main([*words, "--out", str(out)])
    before = contents(out)
    assert before
    refused([*words, "--out", out], capsys, "holds results of", "--resume", "--overwrite", "--out")
    assert contents(out) == before

    main(["train", "--resume", str(out)] if command == "train" else [*words, "--out", str(out), "--resume"])
    assert contents(out).keys() == before.keys()

    other = ["--threads", "2"]
    if command == "train":
        refused(["train", "--resume", out, *other], capsys, "--threads is 2, was 1")
    else:
        refused(
            [*words, "--out", out, "--resume", *other], capsys, "another job (it differs in threads)", "--overwrite"
        )
    main([*words, "--out", str(out), "--overwrite", *other])
    assert contents(out).keys() == before.keys()
    assert contents(out) != before
    assert not out.is_dir() or not (out / UNSAVED).exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_both_at_once_are_refused(command, line, capsys, tmp_path):
    words, out = line(command)
    (tmp_path / "out").mkdir()
    if command == "train":
        shutil.rmtree(tmp_path / "out")
        main([*words, "--out", str(out)])
    where = ["train", "--resume", out] if command == "train" else [*words, "--out", out, "--resume"]
    refused([*where, "--overwrite"], capsys, "give one of the two")


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "grid"])
def test_files_of_others_are_left_alone(command, line, capsys):
    words, out = line(command)
    out.mkdir()
    (out / "diary.txt").write_text("today")
    for more in ([], ["--overwrite"]):
        refused([*words, "--out", out, *more], capsys, f"not of `eopt {command}` (diary.txt)", "another --out")
    assert [path.name for path in out.iterdir()] == ["diary.txt"]


@pytest.mark.parametrize("text", ["today", '{"notes": []}', "[]", ""])
def test_a_grid_replaces_no_file_but_its_own(text, line, capsys):
    words, out = line("grid")
    out.write_text(text)
    for more in ([], ["--overwrite"]):
        refused([*words, "--out", out, *more], capsys, "no results of `eopt grid`", "another --out")
    assert contents(out.parent) == {str(out): text.encode()}


@pytest.mark.parametrize("name", ["out.png", "out.environment.json"])
def test_a_new_grid_leaves_the_files_that_stand_where_its_own_come(name, line, capsys):
    words, out = line("grid")
    (out.parent / name).write_text("mine")
    for more in ([], ["--overwrite"], ["--resume"]):
        refused([*words, "--out", out, *more], capsys, f"{name} is there already", "another --out")
    assert [(path.name, path.read_text()) for path in out.parent.iterdir()] == [(name, "mine")]


def test_results_are_not_where_their_figure_comes(line, capsys, tmp_path):
    refused([*line("grid")[0], "--out", tmp_path / "a.png"], capsys, "a.png is where the figure comes", "a.json")


def test_results_of_another_command_are_left_alone(line, capsys):
    words, out = line("spike")
    main([*words, "--out", str(out)])
    before = contents(out)
    for command in ("train", "eigenbasis", "precision", "tf32"):
        for more in ([], ["--overwrite"]):
            refused([*line(command)[0], "--out", out, *more], capsys, "results of `eopt spike`", "another --out")
    assert contents(out) == before


def test_a_missing_or_empty_folder_is_made_also_with_a_flag(line):
    for flag in ("--resume", "--overwrite"):
        words, out = line("spike")
        main([*words, "--out", str(out / flag), flag])
        assert (out / flag / "result.json").is_file()


def test_a_new_run_in_place_of_an_old_one_has_nothing_of_it(line):
    words, out = line("train")
    main([*words, "--out", str(out), "--spike-at", "3"])
    assert (out / "adamw-spike").is_dir()
    main([*words, "--out", str(out), "--overwrite", "--seed", "5"])
    assert {path.name for path in out.iterdir()} == {
        "config.json", "environment.json", "adamw", "summary.json"
    }  # fmt: skip
    assert json.loads((out / "config.json").read_text())["config"]["seed"] == 5


def test_a_request_that_is_refused_leaves_the_run_that_it_was_to_replace(line, capsys):
    words, out = line("train")
    main([*words, "--out", str(out)])
    before = contents(out)
    refused([*words, "--out", out, "--overwrite", "--optimizers", "nobody"], capsys, "nobody")
    refused([*words, "--out", out, "--overwrite", "--text", "nowhere.txt"], capsys, "nowhere.txt")
    assert contents(out) == before


def test_the_page_is_made_anew_and_other_files_are_not_written_over(line, capsys, tmp_path):
    words, _ = line("spike")
    main([*words, "--out", str(tmp_path / "runs" / "spike")])
    page = tmp_path / "page.html"
    report = ["report", "--runs", tmp_path / "runs", "--out", page]
    for _ in range(2):
        main([*map(str, report)])
    page.write_text("<p>mine</p>")
    refused(report, capsys, "is no page of `eopt report`", "--overwrite", "--out")
    assert page.read_text() == "<p>mine</p>"
    main([*map(str, report), "--overwrite"])
    assert page.read_text() != "<p>mine</p>"


def test_places_need_no_torch():
    import subprocess

    code = "import sys, emerging_optimizers.lab.places; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
