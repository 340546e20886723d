"""`eopt`: wrong and awkward command lines end with a sentence or two, the right exit status, and no traceback."""

import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from emerging_optimizers import create_optimizer, plan_parameters
from emerging_optimizers._version import __version__
from emerging_optimizers.cli import progress
from emerging_optimizers.cli.progress import Progress
from emerging_optimizers.cli.questions import QUESTIONS
from emerging_optimizers.cost.scale import at_scale
from emerging_optimizers.lab.__main__ import LAB, main
from emerging_optimizers.lab.commands import COMMANDS
from emerging_optimizers.lab.config import TrainConfig
from emerging_optimizers.lab.eigenbasis import EigenbasisConfig
from emerging_optimizers.lab.spike import SpikeConfig
from emerging_optimizers.lab.tf32 import TF32Config
from emerging_optimizers.registry import OPTIMIZERS
from emerging_optimizers.routing.recipes import RECIPES
from emerging_optimizers.testing.conformance import made_by

EOPT = [sys.executable, "-W", "error", "-m", "emerging_optimizers.lab"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
TINY = "--steps 4 --batch 4 --context 16 --width 16 --depth 1 --heads 2 --warmup 1 --eval-every 2 --eval-windows 16"


@pytest.fixture
def tiny_text(tmp_path: Path) -> Path:
    """800 characters, of which 80 are held out."""
    path = tmp_path / "text"
    path.write_text("abcdefgh" * 100)
    return path


def ended(words: str, capsys: Any) -> tuple[int, str, str]:
    """Exit status, output and errors of a command line."""
    status = 0
    try:
        main(shlex.split(words))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1 if end.code else 0
    told = capsys.readouterr()
    assert "Traceback" not in told.out + told.err
    return status, told.out, told.err


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("", 2, "no command"),
        ("trian", 2, "there is no command 'trian'; did you mean 'train'?"),
        ("--verison", 2, "there is no command '--verison'"),
        ("list nothing*", 2, "no optimizer matches 'nothing*'"),
        ("list --what", 2, "unrecognized arguments: --what"),
        ("list a b", 2, "unrecognized arguments: b"),
        ("recipes soap", 2, "unrecognized arguments: soap"),
        ("estimate nobody", 2, "there is no optimizer 'nobody'"),
        ("estimate mun", 2, "did you mean 'muon'"),
        ("estimate --shapes 12xx", 2, "'12xx' is not COUNT*ROWSxCOLUMNS"),
        ("estimate --shapes 12*", 2, "'12*' is not COUNT*ROWSxCOLUMNS"),
        ("estimate --shapes 0*4x4", 2, "has a number below 1"),
        ("estimate --shapes=-1x4", 2, "has a number below 1"),
        ("estimate --device tpu", 2, "device"),
        ("estimate --device cuda:99", 2, "cuda:99"),
        ("estimate --tokens many", 2, "invalid int value: 'many'"),
        ("estimate --model llama-7b", 2, "--model and --mesh belong together"),
        ("estimate --model llama-8b --mesh 8", 2, "llama-8b"),
        ("estimate --model nowhere.json --mesh 8", 2, "nowhere.json"),
        ("estimate --model llama-7b --mesh 8x", 2, "mesh='8x' is not SHARDSxTENSOR"),
        ("estimate --model llama-7b --mesh 0x8", 2, "mesh"),
        ("estimate --model llama-7b --mesh 8 --link 0", 2, "link=0.0 is not allowed"),
        ("estimate --model llama-7b --mesh 8 --dtype int4", 2, "int4"),
        ("plan nobody", 2, "there is no optimizer 'nobody'"),
        ("plan --mesh eight", 2, "mesh='eight' is not"),
        ("check", 2, "the following arguments are required: subject"),
        ("check nobody", 2, "there is no optimizer 'nobody'"),
        ("check torch.optim:Nobody", 2, "names no callable"),
        ("check json:dumps", 2, ""),
        ("train --optimizers nobody", 2, "there is no optimizer 'nobody'"),
        ("train --optimizers ,", 2, "must name each optimizer once"),
        ("train --optimizers muon,muon", 2, "must name each optimizer once"),
        ("train --lr muon=0", 2, "--lr muon=0 is not allowed; give a number > 0"),
        ("train --lr muon=-1", 2, "--lr muon=-1 is not allowed"),
        ("train --lr muon", 2, "muon"),
        ("train --lr lion=0.1", 2, "--lr names lion, which --optimizers does not run"),
        ("train --threads 1000000", 2, "--threads 1000000 is more than any machine has"),
        ("train --steps 0", 2, "--steps is 0; it must be at least 1"),
        ("train --width 10 --heads 3", 2, "cannot be split"),
        ("train --text nowhere.txt", 2, "nowhere.txt"),
        ("spike --overwrite --resume", 2, "give one of the two"),
        ("train --resume nowhere", 2, "nowhere holds no run"),
        ("train --resume", 2, "runs"),
        ("train --average 2", 2, "--average 2 is no decay"),
        ("train --out /proc/nowhere/run", 1, "/proc/nowhere"),
        ("report --runs nowhere", 2, "nowhere"),
        ("spike --processes 0", 2, "--processes"),
        ("convert a.pt --from nobody --to adamw --out b.pt", 2, "--from nobody is not one of torch.adamw,"),
        ("convert nowhere.pt --to adamw --out b.pt", 2, "'nowhere.pt' cannot be read (No such file or directory)"),
        ("convert a.pt --to adamw --out / --overwrite", 2, "--out '/' is no file"),
        ("--json list", 2, "options stand behind the command, as in `eopt list --json`"),
        ("version", 2, "did you mean '--version'?"),
        ("list --json=1", 2, "ignored explicit argument '1'; `eopt list --help` says what it takes"),
        ("estimate --shapes 99999999999999999999x4", 2, "more elements than torch can count"),
        ("estimate --shapes 1000000000000*4x4", 2, "more than 100,000 parameters"),
        ("estimate --link 4", 2, "--link says nothing without --model and --mesh"),
        ("estimate --model llama-7b --mesh 8 --shapes 4x4", 2, "--shapes says nothing beside --model and --mesh"),
        ("estimate --model llama-7b --mesh 1000000x1000000", 2, "1,000,000,000,000 ranks; at most 131,072"),
        ("plan --mesh 1000000", 2, "1,000,000 ranks"),
        ("check builtins:list", 2, "gave a list, which is no torch optimizer (no step, zero_grad,"),
        ("check builtins:exit", 2, "builtins:exit makes no optimizer of a list of parameters: SystemExit"),
        ("check ../x:y", 2, "'../x:y' names no callable"),
        ("check nosuchmodule:x", 2, "'nosuchmodule:x' names no callable: No module named 'nosuchmodule'"),
        ("train --out ''", 2, "--out PATH: it is empty; give a name"),
        ("train --resume ''", 2, "--resume [DIR]: it is empty"),
        ("spike --out ''", 2, "--out PATH: it is empty"),
        ("report --runs ''", 2, "--runs PATH: it is empty"),
        ("train --text /dev/zero", 2, "--text /dev/zero is a device; give a file"),
        ("train --text /", 2, "--text '/' cannot be read (Is a directory)"),
        ("train --lr =1", 2, "'=1' is not NAME=RATE"),
        ("train --widht 3", 2, "did you mean --width INT?"),
        *(
            (f"{command} {10**30}", 2, f"{command.split()[-1]} {10**30} is larger than any number here may be")
            for command in (
                "spike --seed",
                "precision --draws",
                "tf32 --seeds",
                "gallery physics --steps",
                "train --batch",
            )
        ),
        (f"estimate --model llama-7b --mesh 8 --tokens {10**30}", 2, "--tokens"),
        ("estimate --model llama-7b --mesh 8 --tflops 1e300", 2, "tflops=1e+300 is not allowed"),
        *(
            (f"{command} --threads 2000", 2, "--threads 2000 is more than any machine has; give at most 1024")
            for command in ("spike", "eigenbasis", "precision", "tf32", "gallery physics")
        ),
        ("grid --optimizers nobody", 2, "there is no optimizer 'nobody'"),
        ("grid --out /", 2, "--out / is a folder; give a file"),
        ("grid --out / --resume", 2, "--out / is a folder; give a file"),
        ("grid --out /dev/null --overwrite", 2, "--out /dev/null is no regular file; give a file"),
        ("spike --shape a b", 2, "--shape INT INT: Could not parse arguments ['a', 'b']; `eopt spike --help` says"),
    ],
)
def test_an_awkward_line_ends_with_a_sentence(
    words: str, status: int, said: str, capsys: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    found, out, err = ended(words, capsys)
    shown = " ".join((out + err).replace("│", " ").split())
    assert (found, said in shown) == (status, True), shown
    assert len((out + err).splitlines()) == 1 or words == "", out + err
    assert not list(tmp_path.iterdir())


def test_a_name_is_known_in_any_case(capsys: Any, tmp_path: Path) -> None:
    assert ended("LIST MUON", capsys)[0] == 0
    assert ended("estimate SOAP --shapes 8x8 --no-seconds", capsys)[0] == 0
    assert ended(f"train --optimizers Lion --lr LION=0.001 {TINY} --out {tmp_path / 'run'}", capsys)[0] == 0


def test_help_and_version(capsys: Any) -> None:
    status, out, _ = ended("--help", capsys)
    assert status == 0
    assert all(name in out for name in (*QUESTIONS, *LAB))
    assert ended("--version", capsys) == (0, f"eopt {__version__}\n", "")
    for name in (*QUESTIONS, *LAB):
        status, out, _ = ended(f"{name} --help", capsys)
        assert status == 0
        assert f"usage: eopt {name}" in out.replace("\n", " ")
        assert "{None}" not in out
        assert "--json" in out
        assert ended(f"{name} --version", capsys) == (0, f"eopt {__version__}\n", "")


def test_version_as_json_says_what_a_report_of_a_fault_needs(capsys: Any) -> None:
    status, out, err = ended("--version --json", capsys)
    said = json.loads(out)
    assert (status, err) == (0, "")
    assert said["eopt"] == __version__
    assert said["packages"]["torch"]
    assert str(Path.home()) not in out


def test_what_help_says_of_the_labs_commands_is_what_they_say() -> None:
    assert {name: (kind.__doc__ or "").splitlines()[0] for name, kind in COMMANDS.items()} == LAB


@pytest.mark.parametrize(
    "words",
    [
        "list muon",
        "recipes",
        "estimate lion --shapes 8x8",
        "plan --mesh 4",
        "estimate --model gpt2-small --mesh 4",
        "check lion",
    ],
)
def test_json(words: str, capsys: Any) -> None:
    status, out, _ = ended(f"{words} --json", capsys)
    assert status == 0
    assert json.loads(out)


def test_json_of_an_experiment(capsys: Any, tmp_path: Path) -> None:
    words = "precision --shape 4 6 --ranges 1e2 --draws 2 --json"
    status, out, _ = ended(f"{words} --out {tmp_path / 'run'}", capsys)
    assert status == 0
    found = json.loads(out)
    assert all(Path(path).is_file() for path in found["files"])
    assert {*found["tables"][0]} == {"title", "head", "rows"}


@pytest.mark.parametrize(
    "words", ["train --optimizers adamw --batch 99999999999999", "spike --shape 9999999999 9999999999"]
)
def test_what_no_memory_holds_is_a_failure(words: str, capsys: Any, tmp_path: Path) -> None:
    processes = "--processes 1" if words.startswith("spike") else ""
    status, _, err = ended(f"{words} {processes} --out {tmp_path / 'run'}", capsys)
    assert status == 1
    assert "eopt: what was asked for is too large for the memory (" in err


def test_a_run_that_diverges_is_a_failure(capsys: Any, tmp_path: Path) -> None:
    status, _, err = ended(f"train --optimizers adamw --lr adamw=1e30 {TINY} --out {tmp_path / 'run'}", capsys)
    assert status == 1
    assert "adamw diverged" in err


# One process for all of them: each would take seconds to import torch.
_WITHOUT_EXTRAS = """
import sys
sys.modules.update(dict.fromkeys(("tyro", "rich", "matplotlib", "jinja2", "plotly")))
from emerging_optimizers.lab.__main__ import main
for words in sys.argv[1:]:
    main(words.split())
    print("= = =")
"""


def test_questions_need_no_extra_and_no_more_than_ascii_and_the_rest_names_the_extra() -> None:
    said = {
        "list": "Newton-Schulz",
        "recipes": "moonlight",
        "estimate lion --shapes 8x8": "8x8",
        "plan --mesh 4": "rank",
    }
    command = [sys.executable, "-W", "error", "-c", _WITHOUT_EXTRAS, *said, "train"]
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    answers = done.stdout.split("= = =\n")
    assert len(answers) == len(said) + 1, done.stderr
    assert all(word in answer for word, answer in zip(said.values(), answers, strict=False))
    # A slow machine is told how long it has taken.
    other = [line for line in done.stderr.splitlines() if not line.startswith(("eopt estimate: ", "eopt plan: "))]
    assert len(other) == 1, done.stderr
    assert "`eopt train` needs tyro; pip install 'emerging-optimizers[lab]'" in other[0]
    assert (answers[-1], done.returncode) == ("", 1)


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    line = f"{shlex.join(EOPT)} list | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def interrupted(words: Sequence[str], kept: Path) -> str:
    """What a command says that is interrupted once there is something in a file."""
    # Where the tests run in the background, a shell has told all of them to ignore the interrupt.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    # Not with -W error: an interrupt in the middle of Python's own `open` leaves a file to the collector, which warns.
    eopt = [word for word in EOPT if word not in ("-W", "error")]
    with subprocess.Popen(
        [*eopt, *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, preexec_fn=heeding
    ) as process:
        for _ in range(1200):
            if kept.exists() and kept.stat().st_size:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    return err


_INTERRUPTED_AT_ITS_END = """
import atexit, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
atexit.register(signal.raise_signal, signal.SIGINT)
from emerging_optimizers.lab.__main__ import command
command()
"""


def test_an_interrupt_when_all_has_been_said_changes_nothing() -> None:
    for words, status, said in ((["list"], 0, ""), (["lisst"], 2, "eopt: there is no command")):
        python = [sys.executable, "-c", _INTERRUPTED_AT_ITS_END, *words]
        done = subprocess.run(python, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
        assert done.returncode == status
        assert done.stderr.startswith(said)
        assert "KeyboardInterrupt" not in done.stderr


_FAILS_BEHIND_AN_INTERRUPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from emerging_optimizers.cli import UsageError
from emerging_optimizers.cli.questions import List
from emerging_optimizers.lab.__main__ import command

def run(self):
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:  # as torch's and numpy's C++ does while they are imported
        raise {"ImportError": ImportError, "UsageError": UsageError}[sys.argv.pop()]("cannot load") from None

List.run = run
command()
"""


@pytest.mark.parametrize("error", ["ImportError", "UsageError"])
def test_what_fails_behind_an_interrupt_is_the_interrupt(error: str) -> None:
    python = [sys.executable, "-c", _FAILS_BEHIND_AN_INTERRUPT, "list", error]
    done = subprocess.run(python, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "eopt: interrupted\n")


def test_an_interrupt_names_the_command_that_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    words = ["train", "--optimizers", "adamw", *TINY.replace("--steps 4", "--steps 2000").split(), "--out", str(folder)]
    err = interrupted(words, folder / "adamw" / "metrics.jsonl")
    assert f"eopt: interrupted; `eopt train --resume '{folder}'` goes on" in err


def test_an_interrupted_grid_names_the_command_that_goes_on(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "a grid.json"
    rates = [*TINY.split(), "--optimizers", "adamw,muon,soap,rekls"]
    err = interrupted(["grid", *rates, "--out", str(out), "--overwrite"], out)
    said = err.partition("eopt: interrupted; `eopt ")[2].partition("` goes on")[0]
    assert shlex.split(said) == ["grid", *rates, "--out", str(out), "--resume"]
    before = len(json.loads(out.read_text())["runs"])
    assert ended(said, capsys)[0] == 0
    assert len(json.loads(out.read_text())["runs"]) > before


@pytest.mark.slow  # as a grid's, whose test is quicker
def test_an_interrupted_comparison_of_precisions_names_the_command_that_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "tf32"
    words = ["--steps", "25", "--spike-at", "3", "--optimizers", "rekls", "--processes", "1", "--out", str(out)]
    err = interrupted(["tf32", *words], out / "runs.json")
    assert f"eopt: interrupted; `{shlex.join(['eopt', 'tf32', *words, '--resume'])}` goes on" in err


class Stream(io.StringIO):
    """A place to write that may say that it is a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: terminal


def test_who_waits_is_told_on_a_terminal_by_one_line_and_elsewhere_by_plain_ones(monkeypatch: Any) -> None:
    monkeypatch.setattr(progress, "LINES_S", (0.05, 0.1))
    monkeypatch.setattr(progress, "EVERY_S", 60.0)
    terminal, file = Stream(True), Stream(False)
    for stream in (terminal, file):
        with Progress("eopt grid", stream) as say:
            say("run 3 of 16")
            time.sleep(0.5)
    assert file.getvalue() == "eopt grid: run 3 of 16, 0 s\n" * 2
    assert terminal.getvalue() == "\r\x1b[Keopt grid: run 3 of 16, 0 s\r\x1b[K"


def test_training_says_what_it_does_before_the_first_evaluation_and_that_all_windows_are_evaluated(
    tiny_text: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(progress, "LINES_S", (0.0,))
    words = f"{TINY} --eval-windows 99999999 --text {tiny_text}"
    for command in ("train", "grid"):
        status, _, err = ended(f"{command} --optimizers adamw {words} --out {tmp_path / command}", capsys)
        assert status == 0
        assert "note: --eval-windows 99999999: the held-out text has 64 windows, all of which are evaluated" in err
        assert any(line.strip().startswith("adamw") and line.endswith(" s") for line in err.splitlines()), err


def test_what_is_quick_and_what_fails_leave_no_line() -> None:
    stream = Stream(True)
    with contextlib.suppress(ValueError), Progress("eopt plan", stream):
        raise ValueError
    assert stream.getvalue() == ""


def test_progress_is_not_part_of_an_answer(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(progress, "LINES_S", (0.0,))
    status, out, err = ended("check lion --json", capsys)
    assert status == 0
    assert json.loads(out)
    assert err.startswith("eopt check: ")


def test_names_of_optimizers_are_taken_in_any_case(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["estimate", "MuOn", "--shapes", "8x4", "--no-seconds"],
        ["estimate", "MuOn", "--model", "gpt2-small", "--mesh", "2"],
        ["plan", "MuOn", "--mesh", "2"],
        ["list", "MUON"],
    ):
        main(words)
        upper = capsys.readouterr().out
        main([word.lower() for word in words])
        assert upper == capsys.readouterr().out
    for kind in (TrainConfig, TF32Config, EigenbasisConfig, SpikeConfig):
        assert kind(optimizers=("ReKLS",)).optimizers == ("rekls",)
    assert TrainConfig(optimizers=("Muon",), lr={"MUON": 0.1}).lr == {"muon": 0.1}
    assert at_scale("gpt2-small", "MUON", "2") == at_scale("gpt2-small", "muon", "2")
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    recipe, known = next(iter(RECIPES.items()))
    create_optimizer(next(iter(known.options)).upper(), model, recipe=recipe.upper())
    create_optimizer("MUON", model, companion="AdamW", embedding="Sinkhorn", overrides={"2.weight": "LION"})
    assert plan_parameters(model, "MUON")["1.weight"].optimizer == "muon"
    assert made_by("LION")([torch.nn.Parameter(torch.ones(2))]).param_groups


def test_a_shell_completes_commands_options_and_optimizers(capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", "bash"])
    script = capsys.readouterr().out

    def completed(*words: str) -> list[str]:
        asked = f'COMP_WORDS=({shlex.join(["eopt", *words])}); COMP_CWORD={len(words)}; _eopt; echo "${{COMPREPLY[*]}}"'
        found = subprocess.run(["bash", "-c", f"{script}\n{asked}"], capture_output=True, text=True, timeout=60)
        assert found.returncode == 0, found.stderr
        return found.stdout.split()

    assert {*completed("")} == {*QUESTIONS, *LAB, "completion"}
    assert completed("est") == ["estimate"]
    assert {*completed("estimate", "")} == {*OPTIMIZERS}
    assert completed("train", "--optimizers", "adamw,mu") == [f"adamw,{x}" for x in OPTIMIZERS if x.startswith("mu")]
    assert completed("train", "--eval-") == ["--eval-every", "--eval-windows"]
    assert completed("check", "--l") == ["--lr"]
    main(["completion", "zsh"])
    assert capsys.readouterr().out.startswith("autoload -U +X bashcompinit")
    assert ended("completion fish", capsys) == (2, "", "eopt: there is no completion for 'fish'; give bash or zsh\n")
