"""The runs of the training job, and their folder: a kill at any moment leaves one that can be continued.

lock.json           who writes here, while somebody does
config.json         the request, and the learning rates that it came to
environment.json    what it ran on
<optimizer>/        metrics.jsonl (a line a step), checkpoint.pt, result.json once finished
summary.json        the closing table
loss.png            the curves

and of a run with a gradient spike:

<optimizer>-spike/, <optimizer>-spike-guard/    the same job with the spike, without and with the guard
spike.json, spike.png                           how each of them recovers, against <optimizer>/

Nothing here imports torch before a checkpoint is written or read, so that the report does not wait for it.
"""

import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emerging_optimizers.cli import UsageError
from emerging_optimizers.cli.files import storing, write_atomically
from emerging_optimizers.lab.config import SPIKE_GUARD, Arm, TrainConfig, checked
from emerging_optimizers.lab.record import read_json, reading, sweep


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
        return checked(cls(**{**value, "lr": tuple(value["lr"])}))


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
        return checked(cls(**{**value, "arm": checked(Arm(**value["arm"])), "steps": steps}))


@dataclass(frozen=True, kw_only=True)
class SpikedRun:
    """A run with a gradient spike, and the run of the same job without spike and guard."""

    run: RunResult
    calm: RunResult
    spike_at: int
    """Steps before the spike."""
    guard: float | None
    """The guard's threshold."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished comparison."""

    folder: Path
    config: TrainConfig
    runs: tuple[RunResult, ...]
    """Of each optimizer, without a spike."""
    spiked: tuple[SpikedRun, ...] = ()
    """Of each optimizer, without and with the guard, where the job has a spike."""

    @classmethod
    def read(cls, folder: Path, config: TrainConfig) -> "TrainResult":
        """Reads the results of a run whose optimizers have all finished.

        Args:
            folder: Folder of the run.
            config: Its job.

        Raises:
            DamagedError: A result cannot be read, or is another's.
        """
        runs, spiked = [], []
        for name in config.optimizers:
            calm, *others = (RunFolder(folder / title).finished(name, config.steps) for title in titles(config, name))
            runs.append(calm)
            for run, guard in zip(others, (None, SPIKE_GUARD), strict=False):
                assert config.spike_at is not None
                spiked.append(SpikedRun(run=run, calm=calm, spike_at=config.spike_at, guard=guard))
        return cls(folder=folder, config=config, runs=tuple(runs), spiked=tuple(spiked))


def titles(config: TrainConfig, optimizer: str) -> tuple[str, ...]:
    """The folders of an optimizer: without the spike; where the job has one, with it; and with it behind the guard."""
    return (optimizer,) if config.spike is None else (optimizer, f"{optimizer}-spike", f"{optimizer}-spike-guard")


@dataclass(frozen=True, kw_only=True)
class GridRow:
    """One run of the grid."""

    optimizer: str
    arm: Arm
    final_loss: float
    curve: Mapping[int, float]
    """Held-out loss after each evaluated step."""
    cpu_seconds: float

    def to_json(self) -> dict[str, Any]:
        """A flat JSON object."""
        value = asdict(self)
        return {"optimizer": value.pop("optimizer"), **value.pop("arm"), **value}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "GridRow":
        """The inverse of `to_json`; JSON has turned the steps into strings."""
        row = cls(
            optimizer=value["optimizer"],
            arm=checked(Arm(lr=value["lr"], companion_lr=value["companion_lr"], options=value["options"])),
            final_loss=value["final_loss"],
            curve={int(step): loss for step, loss in value["curve"].items()},
            cpu_seconds=value["cpu_seconds"],
        )
        return checked(row)


def best_row(rows: Sequence[GridRow], optimizer: str) -> GridRow:
    """The run of an optimizer with the lowest final loss."""
    own = [row for row in rows if row.optimizer == optimizer]
    return min(own, key=lambda row: row.final_loss if math.isfinite(row.final_loss) else math.inf)


class RunFolder:
    """The folder of one optimizer within a run; whoever writes into it is the `sole_writer` of the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics, self.checkpoint, self.result = (
            path / name for name in ("metrics.jsonl", "checkpoint.pt", "result.json")
        )
        self._written = hashlib.sha256()  # of the metrics so far

    def append(self, record: StepRecord) -> None:
        """Adds a step to the metrics."""
        line = f"{json.dumps(asdict(record))}\n".encode()
        with storing(self.metrics), self.metrics.open("ab") as file:
            file.write(line)
        self._written.update(line)

    def save(self, step: int, parts: Mapping[str, Any], job: Mapping[str, Any]) -> None:
        """Writes a checkpoint, after making sure of the metrics up to it.

        Args:
            step: The last step of the metrics.
            parts: What has a `state_dict`, by name.
            job: What is trained, so that no other job continues from here.
        """
        import torch

        with storing(self.metrics), self.metrics.open("rb") as file:
            os.fsync(file.fileno())
        states = {name: part.state_dict() for name, part in parts.items()}
        content = io.BytesIO()
        torch.save({"step": step, "job": _plain(job), "metrics": self._written.hexdigest(), **states}, content)
        write_atomically({self.checkpoint: content.getvalue()})

    def restore(self, parts: Mapping[str, Any], job: Mapping[str, Any]) -> list[StepRecord]:
        """Goes back to the last checkpoint and drops the metrics after it.

        Args:
            parts: What `save` was given; their states are loaded.
            job: What is to be trained.

        Returns:
            The steps so far; none where there is no checkpoint.

        Raises:
            DamagedError: The checkpoint cannot be read or is of another job, or the metrics are not those that it was
                saved with. Nothing has been written then.
        """
        lines: list[bytes] = []
        steps: list[StepRecord] = []
        if os.path.lexists(self.checkpoint):
            remedy = f"bring it back, or remove the folder {self.path} and this optimizer begins again with --resume"
            with reading(self.checkpoint, remedy):
                checkpoint = _load(self.checkpoint)
                if changed := [key for key, value in _plain(job).items() if checkpoint["job"].get(key) != value]:
                    raise UsageError(f"it is of another job, which differs in {', '.join(changed)}")
                for name, part in parts.items():
                    part.load_state_dict(checkpoint[name])
                step, digest = int(checkpoint["step"]), checkpoint["metrics"]
            with reading(self.metrics, remedy):
                content = self.metrics.read_bytes() if os.path.lexists(self.metrics) else b""
                whole = content.splitlines(keepends=True)[: content.count(b"\n")]
                if len(whole) < step:
                    raise UsageError(
                        f"it holds {len(whole)} whole steps, and {self.checkpoint.name} was saved after step {step}"
                    )
                lines = whole[:step]
                if hashlib.sha256(b"".join(lines)).hexdigest() != digest:
                    raise UsageError(f"its first {step} steps are not those that {self.checkpoint.name} was saved with")
                steps = [StepRecord.from_json(json.loads(line)) for line in lines]
        kept = b"".join(lines)
        write_atomically({self.metrics: kept})
        self._written = hashlib.sha256(kept)
        sweep(self.path)
        return steps

    def finished(self, optimizer: str, steps: int) -> RunResult:
        """Reads the result.

        Args:
            optimizer: Whose result it must be.
            steps: How many steps it must have.

        Raises:
            DamagedError: It cannot be read, or is another's.
        """
        with reading(self.result, "remove it and continue with --resume, which makes it again from the checkpoint"):
            result = RunResult.from_json(read_json(self.result))
            if (result.optimizer, len(result.steps)) != (optimizer, steps):
                raise UsageError(
                    f"it is of {len(result.steps)} steps of {result.optimizer}, and this run has {steps} of {optimizer}"
                )
            if result.steps[-1].validation_loss is None:
                raise UsageError("its last step has no held-out loss")
            return result


def _load(path: Path) -> Any:
    """A checkpoint, after comparing the checksums that it carries: torch does not, and would load flipped bits."""
    import torch

    content = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(content) as archive:
        if damaged := archive.testzip():
            raise UsageError(f"the checksum of {damaged} in it is wrong")
    content.seek(0)
    return torch.load(content, weights_only=True)


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """A request as JSON has it, the same before and after a file."""
    return json.loads(json.dumps(value))
