"""Does TF32 change how well SOAP trains? The lab's training job at two precisions, with and without a spike.

In the eigenbasis experiment TF32 sends the published SOAP's bases elsewhere within two steps of a gradient spike. Here
the same optimizers train the small GPT, in float32 and with every product of model and optimizer in emulated TF32; the
question is whether the held-out loss tells them apart by more than the seed does.

Nothing here imports torch before an experiment runs, so that ``eopt --help`` answers at once.
"""

import math
import os
from collections.abc import Mapping
from concurrent.futures import as_completed
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from emerging_optimizers.cli import UsageError
from emerging_optimizers.cli.progress import Say, quiet
from emerging_optimizers.lab.config import TUNED, Names, TrainConfig, lower_names, require_positive
from emerging_optimizers.lab.experiment import from_json, interrupted_behind, require_distinct, to_json, workers
from emerging_optimizers.lab.places import UNSAVED, same_request
from emerging_optimizers.lab.record import read_json, reading, sealed, sole_writer, write_json

# Each with KL factors. "published": start and update of the published library; "default": this library's.
OPTIMIZERS = {"soap_kl": "soap", "rekls": "rekls"}
FORMS = ("published", "default")
PRECISIONS = ("float32", "tf32")


@dataclass(frozen=True, kw_only=True)
class TF32Config:
    """The runs. Everything that can change a number is here."""

    optimizers: Names = tuple(OPTIMIZERS)
    """soap_kl, rekls or both, each as published and as this library has it."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the initial weights and the order of the data, a run each."""
    steps: int = 200
    """Steps of each run."""
    spike_at: int = 60
    """Steps before the spike; a run without it stands beside each."""
    spike_scale: float = 1e3
    """What the spike's gradients are multiplied by."""
    threads: int = 1
    """Threads of torch in each process."""

    def __post_init__(self) -> None:
        lower_names(self)
        require_positive(self, "steps", "threads")
        require_distinct(self, "optimizers", "seeds")
        if unknown := sorted(set(self.optimizers) - set(OPTIMIZERS)):
            raise UsageError(f"--optimizers names {', '.join(unknown)}; known are {', '.join(OPTIMIZERS)}")
        self.job(seed=0, spike=True)

    def job(self, seed: int, spike: bool) -> TrainConfig:
        """The training job of a run."""
        at, scale = (self.spike_at, self.spike_scale) if spike else (None, None)
        return TrainConfig(steps=self.steps, seed=seed, spike_at=at, spike_scale=scale, threads=self.threads)


@dataclass(frozen=True, kw_only=True)
class TF32Run:
    """One training run."""

    optimizer: str
    form: str
    spike: bool
    seed: int
    precision: str
    final_loss: float = math.nan
    """Held-out, in nats per character."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """Held-out loss by step."""
    update_rms: tuple[float, ...] = ()
    """By step, over the whole model."""

    @property
    def key(self) -> tuple[str, str, bool, int, str]:
        """Which run it is."""
        return self.optimizer, self.form, self.spike, self.seed, self.precision


@dataclass(frozen=True, kw_only=True)
class TF32Row:
    """One line of the table: the same runs at both precisions."""

    optimizer: str
    form: str
    spike: bool
    float32: tuple[float, ...]
    """Final losses by seed."""
    tf32: tuple[float, ...]

    @property
    def differences(self) -> tuple[float, ...]:
        """TF32 less float32, seed by seed."""
        return tuple(y - x for x, y in zip(self.float32, self.tf32, strict=True))


@dataclass(frozen=True, kw_only=True)
class TF32Result:
    """All runs."""

    config: TF32Config
    runs: tuple[TF32Run, ...]

    @property
    def rows(self) -> tuple[TF32Row, ...]:
        """The table."""
        loss = {run.key: run.final_loss for run in self.runs}
        return tuple(
            TF32Row(
                optimizer=optimizer,
                form=form,
                spike=spike,
                **{p: tuple(loss[optimizer, form, spike, seed, p] for seed in self.config.seeds) for p in PRECISIONS},
            )
            for optimizer, form, spike in product(self.config.optimizers, FORMS, (False, True))
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object: the request and the runs."""
        return to_json(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TF32Result":
        """The inverse of `to_json`."""
        stored = from_json(value)
        return cls(config=TF32Config(**stored["config"]), runs=tuple(TF32Run(**run) for run in stored["runs"]))


def run_tf32(
    config: TF32Config,
    out: Path | None = None,
    processes: int = 1,
    *,
    resume: bool = True,
    say: Say = quiet,
) -> TF32Result:
    """Trains at both precisions; a run that the file holds already is not repeated.

    Args:
        config: The runs.
        out: The result of an experiment that ended. Until it is written, every run is added to a file beside it
            (UNSAVED) as it ends, so that a reader finds whole results only.
        processes: Among how many processes the runs are shared out; it changes no number.
        resume: Whether to keep the runs in the file.
        say: Told how many have ended.

    Returns:
        The runs; the same configuration gives the same losses on one machine.

    Raises:
        UsageError: The file is damaged or holds runs of another job, another process writes there, or the disk refuses.
    """
    with sole_writer(out.parent) if out is not None else nullcontext():
        return _run_tf32(config, out, processes, resume, say)


def _run_tf32(config: TF32Config, out: Path | None, processes: int, resume: bool, say: Say) -> TF32Result:
    done: dict[Any, TF32Run] = {}
    unsaved = None if out is None else out.with_name(UNSAVED)
    held = next((path for path in (unsaved, out) if path is not None and os.path.lexists(path)), None)
    if held is not None and resume:
        with reading(held, "bring it back, or give --overwrite or another --out"):
            stored = TF32Result.from_json(read_json(held))
        alike = replace(stored.config, optimizers=config.optimizers, seeds=config.seeds)
        same_request(held, alike, config)
        done = {run.key: run for run in stored.runs}
    wanted = [
        TF32Run(optimizer=optimizer, form=form, spike=spike, seed=seed, precision=precision)
        for seed, optimizer, form, spike, precision in product(
            config.seeds, config.optimizers, FORMS, (False, True), PRECISIONS
        )
    ]
    with workers(processes, len(wanted), get_context("spawn")) as pool:
        with interrupted_behind():
            futures = [pool.submit(train_once, config, run) for run in wanted if run.key not in done]
        say(f"{len(wanted) - len(futures)} of {len(wanted)} runs")
        for ended, future in enumerate(as_completed(futures), len(wanted) - len(futures) + 1):
            run = future.result()
            done[run.key] = run
            say(f"{ended} of {len(wanted)} runs")
            if unsaved is not None:
                write_json(unsaved, sealed(TF32Result(config=config, runs=tuple(done.values())).to_json()))
    return TF32Result(config=config, runs=tuple(done[run.key] for run in wanted))


def train_once(config: TF32Config, run: TF32Run) -> TF32Run:
    """One training run, filled in."""
    from emerging_optimizers.lab.data import load_text
    from emerging_optimizers.lab.published import PublishedSOAP
    from emerging_optimizers.lab.train import train_one
    from emerging_optimizers.linalg.emulation import emulate_tf32
    from emerging_optimizers.linalg.precision import fp32_matmul_precision
    from emerging_optimizers.registry import register_optimizer

    register_optimizer("published_soap")(PublishedSOAP)  # here: other commands do not list it
    tuned = TUNED[OPTIMIZERS[run.optimizer]]
    name = "published_soap" if run.form == "published" else "soap"
    form: dict[str, Any] = {
        "use_kl_shampoo": True,
        "use_eigh": run.optimizer == "rekls",
        "first_step": "eigenbasis" if run.form == "published" else "adam",
    }
    job = config.job(run.seed, run.spike)
    with ExitStack() as stack:
        if run.precision == "tf32":
            stack.enter_context(emulate_tf32())
            stack.enter_context(fp32_matmul_precision("high"))
            form["fp32_matmul_prec"] = "high"
        arm = replace(tuned, options={**tuned.options, **form})
        trained = train_one(job, name, arm, load_text(job.text, job.context))
    return replace(
        run,
        final_loss=trained.final_loss,
        losses={str(step.step): loss for step, loss in trained.evaluations},
        update_rms=tuple(float(f"{step.update_rms:.4g}") for step in trained.steps),
    )
