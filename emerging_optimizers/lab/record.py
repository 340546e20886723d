"""The files of a run: written so that a kill at any moment leaves a folder that can be continued.

config.json         the request, and the learning rates that it came to
environment.json    what it ran on
<optimizer>/        metrics.jsonl (a line a step), checkpoint.pt, result.json once finished
summary.json        the closing table
loss.png            the curves

and of a run with a gradient spike:

<optimizer>-spike/, <optimizer>-spike-guard/    the same job with the spike, without and with the guard
spike.json, spike.png                           how each of them recovers, against <optimizer>/
"""

import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from emerging_optimizers._version import __version__
from emerging_optimizers.lab.config import Arm
from emerging_optimizers.lab.data import Text
from emerging_optimizers.linalg.precision import reduced_dtype


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step; the seconds are sums over the steps so far, without evaluations."""

    step: int
    loss: float = 0.0
    lr: tuple[float, ...] = ()
    """Learning rate of each parameter group."""
    optimizer_s: float = 0.0
    """CPU seconds inside `optimizer.step`."""
    cpu_s: float = 0.0
    wall_s: float = 0.0
    validation_loss: float | None = None
    """Held-out loss after the step, where it was measured."""
    update_rms: float = math.nan
    """RMS, over the whole model, of what the step took off the weights."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "StepRecord":
        """The inverse of `dataclasses.asdict` followed by JSON."""
        return cls(**{**value, "lr": tuple(value["lr"])})


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What one optimizer did with the job."""

    optimizer: str
    arm: Arm
    parameters: int
    state_bytes: int
    steps: tuple[StepRecord, ...]

    @property
    def evaluations(self) -> tuple[tuple[StepRecord, float], ...]:
        """The evaluated steps, each with its held-out loss."""
        return tuple((s, s.validation_loss) for s in self.steps if s.validation_loss is not None)

    @property
    def final_loss(self) -> float:
        """Held-out loss after the last step."""
        return self.evaluations[-1][1]

    @property
    def best_loss(self) -> float:
        """Lowest held-out loss."""
        return min(loss for _, loss in self.evaluations)

    @property
    def optimizer_share(self) -> float:
        """Part of the CPU seconds spent inside `optimizer.step`."""
        return self.steps[-1].optimizer_s / self.steps[-1].cpu_s

    def reaches(self, loss: float) -> StepRecord | None:
        """The first evaluated step at or below a held-out loss, or None."""
        return next((step for step, value in self.evaluations if value <= loss), None)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "RunResult":
        """The inverse of `dataclasses.asdict` followed by JSON."""
        steps = tuple(StepRecord.from_json(step) for step in value["steps"])
        return cls(**{**value, "arm": Arm(**value["arm"]), "steps": steps})


@dataclass(frozen=True, kw_only=True)
class SpikedRun:
    """A run with a gradient spike, and the run of the same job without spike and guard."""

    run: RunResult
    calm: RunResult
    spike_at: int
    """Steps before the spike."""
    guard: float | None
    """The guard's threshold."""


class RunFolder:
    """The folder of one optimizer within a run."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.metrics, self.checkpoint, self.result = (
            path / name for name in ("metrics.jsonl", "checkpoint.pt", "result.json")
        )

    def append(self, record: StepRecord) -> None:
        """Adds a step to the metrics."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(asdict(record)) + "\n")

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Writes a checkpoint, after making sure of the metrics up to it."""
        with self.metrics.open("rb") as file:
            os.fsync(file.fileno())
        write_atomically(self.checkpoint, lambda file: torch.save(checkpoint, file))

    def restore(self) -> tuple[dict[str, Any] | None, list[StepRecord]]:
        """Goes back to the last checkpoint and drops the metrics after it."""
        checkpoint = torch.load(self.checkpoint, weights_only=True) if self.checkpoint.exists() else None
        kept = [] if checkpoint is None else self.metrics.read_text().splitlines()[: checkpoint["step"]]
        write_atomically(self.metrics, lambda file: file.writelines(f"{line}\n".encode() for line in kept))
        return checkpoint, [StepRecord.from_json(json.loads(line)) for line in kept]


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces a file by a complete new one, or leaves it as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: object) -> None:
    """Writes JSON atomically."""
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def read_json(path: Path) -> Any:
    """Reads a JSON file."""
    return json.loads(path.read_text())


def environment(threads: int, text: Text | None = None) -> dict[str, Any]:
    """What a result depends on besides its configuration."""
    value: dict[str, Any] = {
        "emerging_optimizers": __version__,
        "revision": _revision(Path(__file__).parents[2]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "medium": str(reduced_dtype(torch.device("cpu"))).removeprefix("torch."),
        "threads": threads,
    }
    if text is not None:
        value["text"] = {"source": text.source, "characters": len(text), "sha256": text.sha256}
        value["vocabulary"] = len(text.vocabulary)
    return value


def _revision(root: Path) -> str | None:
    """The commit of the checkout that the package runs from, if it runs from one."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_model() -> str:
    try:
        lines: Iterable[str] = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = ()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
