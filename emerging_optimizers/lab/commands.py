"""The commands of the lab: they train, and show what came of it.

A command is a frozen dataclass with a ``run`` method and a place in `Command`. It imports what it needs when it runs,
so that help does not wait for torch.
"""

import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, get_args

import tyro

from emerging_optimizers.cli import FailedError, StoppedError, UsageError
from emerging_optimizers.cli.progress import Progress, Say
from emerging_optimizers.lab.config import TrainConfig, require_positive
from emerging_optimizers.lab.eigenbasis import EigenbasisConfig
from emerging_optimizers.lab.experiment import KilledError
from emerging_optimizers.lab.gallery import GalleryConfig
from emerging_optimizers.lab.parsing import NEWEST, ResumeFolder, parsed
from emerging_optimizers.lab.places import Existing
from emerging_optimizers.lab.precision import PrecisionConfig
from emerging_optimizers.lab.spike import SpikeConfig
from emerging_optimizers.lab.tf32 import TF32Config

if TYPE_CHECKING:
    from emerging_optimizers.lab.runs import TrainResult


@contextmanager
def resumable(command: Sequence[str], has_kept: Callable[[], bool]) -> Iterator[None]:
    """A block whose early end names the command that goes on, if something of the run has been kept by then."""
    try:
        yield
    except (KeyboardInterrupt, KilledError) as error:
        if not has_kept():
            raise
        goes_on = f"`{shlex.join(command)}` goes on"
        if isinstance(error, KilledError):
            raise FailedError(f"{error}; {goes_on}") from None
        raise StoppedError(f"interrupted; {goes_on}") from None


def _resuming(name: str, args: Sequence[str]) -> list[str]:
    """The command line that goes on with what a command has kept."""
    return ["eopt", name, *(word for word in args if word not in ("--overwrite", "--resume")), "--resume"]


def _shown(result: "TrainResult", as_json: bool) -> None:
    """Shows a run; one that has diverged is a failure."""
    from emerging_optimizers.lab.present import present_training

    present_training(result, as_json=as_json)
    if lost := [run.optimizer for run in result.runs if not math.isfinite(run.final_loss)]:
        given = ",".join(f"{name}=..." for name in lost)
        raise FailedError(f"{', '.join(lost)} diverged: the last loss is not finite; give a lower rate, --lr {given}")


def _version(path: Path) -> tuple[int, int] | None:
    """Another one where a file has been replaced."""
    return (found.st_ino, found.st_mtime_ns) if path.exists() and (found := path.stat()) else None


@dataclass(frozen=True, kw_only=True)
class Overwriting:
    """What every command has that writes."""

    overwrite: bool = False
    """Replace the results that are there; without it they are left alone and the command ends."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Continuing(Overwriting):
    """What a command has whose results are continued in their place."""

    resume: bool = False
    """Go on with the results that are there; what they hold already is not run again."""

    @property
    def existing(self) -> Existing:
        """What may become of results that are there."""
        return Existing(resume=self.resume, overwrite=self.overwrite)


@dataclass(frozen=True, kw_only=True)
class Train(Overwriting):
    """Train a small GPT on real text with several optimizers and compare them."""

    config: tyro.conf.OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)
    out: Path | None = None
    """Folder of the run; by default a new one under runs/."""
    resume: ResumeFolder = None
    """Continue an interrupted run: the newest under runs/, or the one in DIR."""
    nproc: int | None = None
    """Train on so many processes of this machine, under torchrun: FSDP2 shards the model, each process takes its rows
    of a batch. Losses are shown, without tables and figures; --resume goes on with any number of processes."""

    def run(self, args: Sequence[str]) -> None:
        """Begins or continues a run."""
        from emerging_optimizers.lab.train import new_folder, newest_run, read_run, resume_train, run_train

        if self.resume is None:
            folder = self.out or new_folder()
            with self._resumable(folder):
                if self.nproc is None:
                    _shown(run_train(self.config, folder, overwrite=self.overwrite), self.json)
                else:
                    from emerging_optimizers.lab.sharded import begin

                    begin(self.config, folder, self.nproc, self.overwrite)
                    self._say(folder)
            return
        Existing(resume=True, overwrite=self.overwrite)  # which cannot be
        if self.out is not None:
            raise UsageError("--resume continues a run in its own folder; leave out --out")
        folder = newest_run() if self.resume == NEWEST else self.resume
        stored = asdict(read_run(folder)[0])
        # Parsed again with the stored values as defaults, what differs from them is what was asked for.
        asked = asdict(parsed(Train, args, Train(config=TrainConfig.from_json(stored))).config)
        if changed := [key for key in stored if asked[key] != stored[key]]:
            differences = "; ".join(f"--{key.replace('_', '-')} is {asked[key]}, was {stored[key]}" for key in changed)
            raise UsageError(f"{folder} was begun with other settings: {differences}")
        from emerging_optimizers.lab.sharded import go_on, is_sharded

        if (self.nproc is not None) != is_sharded(folder):
            how = "without --nproc; leave it out" if self.nproc else "with --nproc; say how many processes go on"
            raise UsageError(f"{folder} was begun {how}")
        with self._resumable(folder):
            if self.nproc is None:
                _shown(resume_train(folder), self.json)
            else:
                go_on(folder, read_run(folder)[0], self.nproc)
                self._say(folder)

    def _resumable(self, folder: Path) -> AbstractContextManager[None]:
        processes = [] if self.nproc is None else ["--nproc", str(self.nproc)]
        command = ["eopt", "train", "--resume", str(folder), *processes]
        return resumable(command, (folder / "config.json").exists)

    def _say(self, folder: Path) -> None:
        """Where a run of several processes is; its losses have been shown as they came."""
        if self.json:
            from emerging_optimizers.lab.present import show

            show((), (folder,), as_json=True)


@dataclass(frozen=True, kw_only=True)
class Grid(Continuing):
    """Run each optimizer over its learning rates."""

    config: tyro.conf.OmitArgPrefixes[TrainConfig] = field(
        default_factory=lambda: TrainConfig(optimizers=("adamw", "muon", "soap", "rekls"))
    )
    out: Path = Path("benchmarks/results/train_grid.json")
    """The results; environment and figure stand beside it under the same name."""

    def run(self, args: Sequence[str]) -> None:
        """Runs what is missing."""
        from emerging_optimizers.lab.grid import run_grid
        from emerging_optimizers.lab.places import claim
        from emerging_optimizers.lab.present import present_grid
        from emerging_optimizers.lab.record import sole_writer

        with sole_writer(self.out.parent, self.out.name):
            resume = claim(self.out, "grid", self.existing)
            before = None if resume else _version(self.out)
            with resumable(_resuming("grid", args), lambda: _version(self.out) != before):
                rows = run_grid(self.config, self.out, resume=resume)
            present_grid(rows, self.out, as_json=self.json)


@dataclass(frozen=True, kw_only=True)
class Spike(Continuing):
    """Send one gradient that is far too large through each optimizer: recovery and aftershock."""

    config: tyro.conf.OmitArgPrefixes[SpikeConfig] = field(default_factory=SpikeConfig)
    out: Path = Path("runs/spike")
    """Folder of the result and the figures."""
    processes: int = 2
    """Processes that share the optimizers."""

    def run(self, args: Sequence[str]) -> None:
        """Runs the sweep, shows its tables and writes its files."""
        from emerging_optimizers.lab.present import carry_out, in_one_go
        from emerging_optimizers.lab.spike import SpikeResult, run_spike
        from emerging_optimizers.lab.views.spike import spike_view

        def sweep(say: Say) -> SpikeResult:
            # The drawing library takes two seconds to import: meanwhile the processes start.
            Thread(target=import_module, args=("emerging_optimizers.lab.plots",)).start()
            return run_spike(self.config, self.processes, say)

        require_positive(self, "processes")
        run = in_one_go(SpikeResult, self.config, self.out, sweep)
        carry_out(run, spike_view, self.out, ("eopt", "spike", *args), self.existing, self.json)


@dataclass(frozen=True, kw_only=True)
class Eigenbasis(Continuing):
    """Follow SOAP's eigenbases around a gradient spike, in float32 and in emulated reduced precision."""

    config: tyro.conf.OmitArgPrefixes[EigenbasisConfig] = field(default_factory=EigenbasisConfig)
    out: Path = Path("runs/eigenbasis")
    """Folder of the result and the figure."""

    def run(self, args: Sequence[str]) -> None:
        """Runs the experiment, shows its tables and writes its files."""
        from emerging_optimizers.lab.eigenbasis import EigenbasisResult, run_eigenbasis
        from emerging_optimizers.lab.present import carry_out, in_one_go
        from emerging_optimizers.lab.views.eigenbasis import eigenbasis_view

        run = in_one_go(EigenbasisResult, self.config, self.out, partial(run_eigenbasis, self.config))
        carry_out(run, eigenbasis_view, self.out, ("eopt", "eigenbasis", *args), self.existing, self.json)


@dataclass(frozen=True, kw_only=True)
class Precision(Continuing):
    """Measure eigenvalues and KL updates in float32 and in emulated reduced precision over the spectrum's range."""

    config: tyro.conf.OmitArgPrefixes[PrecisionConfig] = field(default_factory=PrecisionConfig)
    out: Path = Path("runs/precision")
    """Folder of the result, the tables and the figure."""

    def run(self, args: Sequence[str]) -> None:
        """Runs the experiment, shows its tables and writes its files."""
        from emerging_optimizers.lab.precision import PrecisionResult, run_precision
        from emerging_optimizers.lab.present import carry_out, in_one_go
        from emerging_optimizers.lab.views.precision import precision_view

        run = in_one_go(PrecisionResult, self.config, self.out, lambda say: run_precision(self.config))
        carry_out(run, precision_view, self.out, ("eopt", "precision", *args), self.existing, self.json)


@dataclass(frozen=True, kw_only=True)
class TF32(Continuing):
    """Train with SOAP and REKLS in float32 and in emulated TF32, with and without a spike, and compare the losses."""

    config: tyro.conf.OmitArgPrefixes[TF32Config] = field(default_factory=TF32Config)
    out: Path = Path("runs/tf32")
    """Folder of the result and the figure."""
    processes: int = 2
    """Processes that share the runs; they change no number."""

    def run(self, args: Sequence[str]) -> None:
        """Runs what is missing, shows the table and writes the files."""
        from emerging_optimizers.lab.places import RESULT, UNSAVED
        from emerging_optimizers.lab.present import carry_out
        from emerging_optimizers.lab.record import sole_writer
        from emerging_optimizers.lab.tf32 import TF32Result, run_tf32
        from emerging_optimizers.lab.views.tf32 import tf32_view

        def runs(resume: bool, say: Say) -> TF32Result:
            if not resume:
                (self.out / UNSAVED).unlink(missing_ok=True)
            return run_tf32(self.config, self.out / "result.json", self.processes, resume=resume, say=say)

        require_positive(self, "processes")
        with sole_writer(self.out):
            before = None if self.resume else _version(self.out / RESULT)
            with resumable(
                _resuming("tf32", args),
                lambda: (self.out / UNSAVED).exists() or _version(self.out / RESULT) != before,
            ):
                carry_out(runs, tf32_view, self.out, ("eopt", "tf32", *args), self.existing, self.json)
            (self.out / UNSAVED).unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class Gallery(Continuing):
    """Train a small task with a tuned AdamW and with matrix optimizers, three seeds each."""

    config: tyro.conf.OmitArgPrefixes[GalleryConfig] = field(default_factory=GalleryConfig)
    out: Path | None = None
    """Folder of the result and the figure; by default runs/gallery-ITEM."""

    def run(self, args: Sequence[str]) -> None:
        """Lists the tasks, or trains one, shows its tables and writes its files."""
        from emerging_optimizers.lab.gallery import GalleryResult, run_gallery
        from emerging_optimizers.lab.present import carry_out, in_one_go, show
        from emerging_optimizers.lab.views.gallery import gallery_view, list_of_items

        if not self.config.item:
            show((list_of_items(),), as_json=self.json)
            return
        out = self.out or Path(f"runs/gallery-{self.config.item}")
        run = in_one_go(GalleryResult, self.config, out, partial(run_gallery, self.config))
        carry_out(run, gallery_view, out, ("eopt", "gallery", *args), self.existing, self.json)


@dataclass(frozen=True, kw_only=True)
class Report(Overwriting):
    """Put the results of every finished run into one HTML file, with tables and interactive figures."""

    runs: Path = Path("runs")
    """The folder that holds the run folders."""
    out: Path = Path("runs/report.html")
    """The file; a report that is there is replaced."""

    def run(self, args: Sequence[str]) -> None:
        """Writes the file and says where it is."""
        from emerging_optimizers.lab.present import show
        from emerging_optimizers.lab.report import write_report

        with Progress("eopt report"):
            sections = write_report(self.runs, self.out, overwrite=self.overwrite)
        if self.json:
            show((), (self.out,), as_json=True)
            return
        for section in sections:
            print(f"{section.view.title} ({self.runs / section.id})")
        print(self.out)


Command = Train | Grid | Spike | Eigenbasis | Precision | TF32 | Gallery | Report
COMMANDS = {kind.__name__.lower(): kind for kind in get_args(Command)}
