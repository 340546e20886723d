"""Processes that share the work of a command: one that is killed ends it with a sentence, and nothing half written."""

import os
import signal
from pathlib import Path

import pytest

from emerging_optimizers.lab import spike, tf32
from emerging_optimizers.lab.__main__ import main
from emerging_optimizers.lab.commands import resumable
from emerging_optimizers.lab.experiment import KilledError

WORDS = {
    "spike": "--optimizers muon,soap --shape 4 3 --steps 12 --spike-at 5 --spike-scale 10",
    "tf32": "--optimizers rekls --seeds 0 --steps 12 --spike-at 4",
}


def killed(*_: object) -> None:
    """In the place of the work of a process: what `kill -9` does to it, or the system where memory has run out."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("command", WORDS)
def test_a_killed_process_is_a_failure(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spike, "run_arm", killed)
    monkeypatch.setattr(tf32, "train_once", killed)
    with pytest.raises(SystemExit) as end:
        main([command, *WORDS[command].split(), "--out", str(tmp_path / "out")])
    progress = f"eopt {command}: "
    said = [line for line in capfd.readouterr().err.splitlines() if not line.startswith(progress)]
    assert (end.value.code, len(said)) == (1, 1), said
    assert said[0].startswith("eopt: a process has been killed at its work")
    assert not list(tmp_path.iterdir())


def test_what_was_kept_before_is_gone_on_with() -> None:
    with (
        pytest.raises(ValueError, match=r"^killed; `eopt tf32 --out 'a run' --resume` goes on$"),
        resumable(["eopt", "tf32", "--out", "a run", "--resume"], lambda: True),
    ):
        raise KilledError("killed")
