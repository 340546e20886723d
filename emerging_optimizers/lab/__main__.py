"""``eopt``: the command line of the lab; also ``python -m emerging_optimizers.lab``.

A command is a frozen dataclass with a ``run`` method and a line in `Command`. It imports what it needs when
it runs, so that help does not wait for torch.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Annotated

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from emerging_optimizers.lab.config import TrainConfig, UsageError
from emerging_optimizers.lab.eigenbasis import EigenbasisConfig
from emerging_optimizers.lab.precision import PrecisionConfig
from emerging_optimizers.lab.spike import SpikeConfig
from emerging_optimizers.lab.tf32 import TF32Config

NEWEST = Path("newest")

ResumeFolder = Annotated[
    Path | None,
    PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[DIR]",
        instance_from_str=lambda words: Path(words[0]) if words else NEWEST,
        is_instance=lambda value: value is None or isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    ),
]


@dataclass(frozen=True, kw_only=True)
class Train:
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
        from emerging_optimizers.lab.present import present_training
        from emerging_optimizers.lab.train import new_folder, newest_run, read_run, resume_train, run_train

        if self.resume is None:
            if self.nproc is None:
                present_training(run_train(self.config, self.out))
            else:
                from emerging_optimizers.lab.sharded import begin

                begin(self.config, self.out or new_folder(), self.nproc)
            return
        if self.out is not None:
            raise UsageError("--resume continues a run in its own folder; leave out --out")
        folder = newest_run() if self.resume == NEWEST else self.resume
        stored = asdict(read_run(folder)[0])
        # Parsed again with the stored values as defaults, what differs from them is what was asked for.
        asked = asdict(tyro.cli(Train, args=args, default=Train(config=TrainConfig.from_json(stored))).config)
        if changed := [key for key in stored if asked[key] != stored[key]]:
            differences = "; ".join(f"--{key.replace('_', '-')} is {asked[key]}, was {stored[key]}" for key in changed)
            raise UsageError(f"{folder} was begun with other settings: {differences}")
        from emerging_optimizers.lab.sharded import go_on, is_sharded

        if (self.nproc is not None) != is_sharded(folder):
            how = "without --nproc; leave it out" if self.nproc else "with --nproc; say how many processes go on"
            raise UsageError(f"{folder} was begun {how}")
        if self.nproc is None:
            present_training(resume_train(folder))
        else:
            go_on(folder, read_run(folder)[0], self.nproc)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Run each optimizer over its learning rates; results already in the file are kept."""

    config: tyro.conf.OmitArgPrefixes[TrainConfig] = field(
        default_factory=lambda: TrainConfig(optimizers=("adamw", "muon", "soap", "rekls"))
    )
    out: Path = Path("benchmarks/results/train_grid.json")
    """The results; environment and figure stand beside it under the same name."""
    fresh: bool = False
    """Forget the results in the file."""

    def run(self, args: Sequence[str]) -> None:
        """Runs what is missing."""
        from emerging_optimizers.lab.grid import run_grid
        from emerging_optimizers.lab.present import present_grid

        present_grid(run_grid(self.config, self.out, fresh=self.fresh), self.out)


@dataclass(frozen=True, kw_only=True)
class Spike:
    """Send one gradient that is far too large through each optimizer: recovery and aftershock."""

    config: tyro.conf.OmitArgPrefixes[SpikeConfig] = field(default_factory=SpikeConfig)
    out: Path = Path("runs/spike")
    """Folder of the result and the figures."""
    processes: int = 2
    """Processes that share the optimizers."""

    def run(self, args: Sequence[str]) -> None:
        """Runs the sweep, shows its tables and writes its files."""
        from emerging_optimizers.lab.experiment import require_positive
        from emerging_optimizers.lab.present import carry_out
        from emerging_optimizers.lab.spike import SpikeResult, run_spike
        from emerging_optimizers.lab.views.spike import spike_view

        def sweep() -> SpikeResult:
            # The drawing library takes two seconds to import: meanwhile the processes start.
            Thread(target=import_module, args=("emerging_optimizers.lab.plots",)).start()
            return run_spike(self.config, self.processes)

        require_positive(self, "processes")
        carry_out(sweep, spike_view, self.out, ("eopt", "spike", *args))


@dataclass(frozen=True, kw_only=True)
class Eigenbasis:
    """Follow SOAP's eigenbases around a gradient spike, in float32 and in emulated reduced precision."""

    config: tyro.conf.OmitArgPrefixes[EigenbasisConfig] = field(default_factory=EigenbasisConfig)
    out: Path = Path("runs/eigenbasis")
    """Folder of the result and the figure."""

    def run(self, args: Sequence[str]) -> None:
        """Runs the experiment, shows its tables and writes its files."""
        from emerging_optimizers.lab.eigenbasis import run_eigenbasis
        from emerging_optimizers.lab.present import carry_out
        from emerging_optimizers.lab.views.eigenbasis import eigenbasis_view

        carry_out(partial(run_eigenbasis, self.config), eigenbasis_view, self.out, ("eopt", "eigenbasis", *args))


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Measure eigenvalues and KL updates in float32 and in emulated reduced precision over the spectrum's range."""

    config: tyro.conf.OmitArgPrefixes[PrecisionConfig] = field(default_factory=PrecisionConfig)
    out: Path = Path("runs/precision")
    """Folder of the result, the tables and the figure."""

    def run(self, args: Sequence[str]) -> None:
        """Runs the experiment, shows its tables and writes its files."""
        from emerging_optimizers.lab.precision import run_precision
        from emerging_optimizers.lab.present import carry_out
        from emerging_optimizers.lab.views.precision import precision_view

        carry_out(partial(run_precision, self.config), precision_view, self.out, ("eopt", "precision", *args))


@dataclass(frozen=True, kw_only=True)
class TF32:
    """Train with SOAP and REKLS in float32 and in emulated TF32, with and without a spike, and compare the losses."""

    config: tyro.conf.OmitArgPrefixes[TF32Config] = field(default_factory=TF32Config)
    out: Path = Path("runs/tf32")
    """Folder of the result and the figure; runs that it holds already are not repeated."""
    processes: int = 2
    """Processes that share the runs; they change no number."""

    def run(self, args: Sequence[str]) -> None:
        """Runs what is missing, shows the table and writes the files."""
        from emerging_optimizers.lab.experiment import require_positive
        from emerging_optimizers.lab.present import carry_out
        from emerging_optimizers.lab.record import sole_writer
        from emerging_optimizers.lab.tf32 import UNSAVED, run_tf32
        from emerging_optimizers.lab.views.tf32 import tf32_view

        require_positive(self, "processes")
        with sole_writer(self.out):
            run = partial(run_tf32, self.config, self.out / "result.json", self.processes)
            carry_out(run, tf32_view, self.out, ("eopt", "tf32", *args))
            (self.out / UNSAVED).unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Put the results of every finished run into one HTML file, with tables and interactive figures."""

    runs: Path = Path("runs")
    """The folder that holds the run folders."""
    out: Path = Path("runs/report.html")
    """The file."""

    def run(self, args: Sequence[str]) -> None:
        """Writes the file and says where it is."""
        from emerging_optimizers.lab.report import write_report

        for section in write_report(self.runs, self.out):
            print(f"{section.view.title} ({self.runs / section.id})")
        print(self.out)


@dataclass(frozen=True, kw_only=True)
class List:
    """Show the optimizers."""

    pattern: tyro.conf.Positional[str] = "*"
    """Which ones, as in '*muon*'."""

    def run(self, args: Sequence[str]) -> None:
        """Prints a table."""
        from rich.console import Console
        from rich.table import Table

        from emerging_optimizers.registry import OPTIMIZERS, list_optimizers

        names = list_optimizers(self.pattern)
        if not names:
            raise UsageError(f"no optimizer matches {self.pattern!r}; known are {', '.join(OPTIMIZERS)}")
        table = Table("name", "what it is", "for", "lr to start from", "unit", "paper")
        for name, entry in OPTIMIZERS.items():
            if name in names:
                shapes = "any shape" if entry.elementwise else "matrices"
                start = "" if entry.start is None else f"{entry.start:g}"
                table.add_row(name, entry.description, shapes, start, entry.unit, entry.paper)
        Console().print(table)


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """Show the named sets of hyper-parameters, as in create_optimizer(..., recipe=NAME)."""

    def run(self, args: Sequence[str]) -> None:
        """Prints each with its options and its source."""
        from emerging_optimizers.routing.recipes import RECIPES

        for name, recipe in RECIPES.items():
            for optimizer, options in recipe.options.items():
                print(f'create_optimizer("{optimizer}", model, recipe="{name}")')
                print(f"  {optimizer}: " + ", ".join(f"{key}={value!r}" for key, value in options.items()))
                beside = {**recipe.companion, **recipe.overrides}
                print("  adamw: " + ", ".join(f"{key}={value!r}" for key, value in beside.items()))
                print(f"  {recipe.source}\n")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Say what a step of an optimizer will cost: bytes of state, bytes for a moment, operations, time.

    With --model and --mesh: what it costs each rank, where each whole matrix is worked on by one of them.
    """

    optimizer: tyro.conf.Positional[str] = "muon"
    """A name from `eopt list`."""
    shapes: str = "12*4*768x768,12*3072x768,12*768x3072"
    """The parameters, as in COUNT*ROWSxCOLUMNS,...; by default the hidden matrices of GPT-2 small."""
    device: str = "cpu"
    """Where the step would run."""
    seconds: bool = True
    """Time the operations."""
    model: str | None = None
    """In place of --shapes: gpt2-small, llama-7b, llama-70b, moe-256, or a .json or .toml file with layers, width,
    heads, vocabulary (and hidden, kv_heads, experts, ...)."""
    mesh: str | None = None
    """SHARDSxTENSOR, as in 64x8: shards of FSDP2 times the degree of tensor parallelism; SHARDS alone; or
    REPLICASxSHARDSxTENSOR, as in 2x32x8, for HSDP."""
    expert_parallel: int = 1
    """Ranks over which the experts of a layer are spread."""
    dtype: str = "float32"
    """Of parameters and gradients on the mesh: float32 or bfloat16."""
    tokens: int = 4 * 2**20
    """Tokens of a step, all ranks together."""
    link: float = 50.0
    """GB/s that a rank sends, and at the same time receives."""
    tflops: float = 400.0
    """TFLOP/s of the model's products on a rank."""
    optimizer_tflops: float | None = None
    """TFLOP/s of the optimizer's operations on a rank; by default as --tflops."""

    def run(self, args: Sequence[str]) -> None:
        """Counts, times and shows."""
        if (self.model is None) != (self.mesh is None):
            raise UsageError("--model and --mesh belong together, as in --model llama-7b --mesh 8x8; give both or none")
        try:
            print(self._on_one() if self.mesh is None else self._on_a_mesh())
        except (ValueError, TypeError) as error:
            raise UsageError(str(error)) from error

    def _on_one(self) -> object:
        import torch

        from emerging_optimizers.cost import estimate

        parameters: list[tuple[str, torch.nn.Parameter]] = []
        for text in self.shapes.split(","):
            *counts, shape = text.split("*")
            for i in range(math.prod(map(int, counts))):
                size = [int(side) for side in shape.split("x")]
                parameters.append((f"{shape} {i}", torch.nn.Parameter(torch.empty(size, device="meta"))))
        return estimate(parameters, self.optimizer, self.device, seconds=self.seconds)

    def _on_a_mesh(self) -> object:
        from emerging_optimizers.cost.scale import Machine, at_scale

        machine = Machine(
            link=self.link, tflops=self.tflops, optimizer_tflops=self.optimizer_tflops, tokens=self.tokens
        )
        return at_scale(
            str(self.model),
            self.optimizer,
            str(self.mesh),
            expert_parallel=self.expert_parallel,
            dtype=self.dtype,
            machine=machine,
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Say which rank of a mesh works on each matrix of a model, what travels for it, and why; no process is started.

    `print(optimizer.plan)` says the same of an optimizer whose parameters are sharded.
    """

    optimizer: tyro.conf.Positional[str] = "muon"
    """A name from `eopt list`."""
    model: str = "gpt2-small"
    """gpt2-small, llama-7b, llama-70b, moe-256, or a .json or .toml file, see `eopt estimate`."""
    mesh: str = "8"
    """SHARDSxTENSOR, SHARDS alone, or REPLICASxSHARDSxTENSOR, see `eopt estimate`."""
    expert_parallel: int = 1
    """Ranks over which the experts of a layer are spread."""
    dtype: str = "float32"
    """Of parameters and gradients: float32 or bfloat16."""

    def run(self, args: Sequence[str]) -> None:
        """Prints a table."""
        from emerging_optimizers.cost.scale import plan_at_scale

        try:
            print(
                plan_at_scale(
                    self.model, self.optimizer, self.mesh, expert_parallel=self.expert_parallel, dtype=self.dtype
                )
            )
        except (ValueError, TypeError) as error:
            raise UsageError(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class Check:
    """Try on an optimizer what people do around one: schedulers, clipping, edits, copies, checkpoints."""

    subject: tyro.conf.Positional[str]
    """A name from `eopt list`, or MODULE:CALLABLE, which makes an optimizer of a list of parameters, as in
    torch.optim:AdamW."""
    lr: float | None = None
    """Its learning rate; by default the one to start from, or its own."""
    json: bool = False
    """Print JSON in place of a table."""

    def run(self, args: Sequence[str]) -> None:
        """Prints what came of each check; a failure is exit status 1."""
        import json

        from emerging_optimizers.testing.conformance import check_optimizer, made_by

        try:
            make = made_by(self.subject, self.lr)
        except ValueError as error:
            raise UsageError(str(error)) from error
        report = check_optimizer(make, name=self.subject, raises=False)
        print(json.dumps(report.to_json(), indent=1) if self.json else report)
        if report.failures:
            raise SystemExit(1)


Command = Train | Grid | Spike | Eigenbasis | Precision | TF32 | Report | Estimate | Plan | Check | List | Recipes


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command.

    Args:
        argv: The arguments; by default those of the process.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        command = tyro.cli(Command, args=args, prog="eopt", description="Experiments on emerging optimizers.")
        command.run(args[1:])
    except UsageError as error:
        raise SystemExit(f"eopt: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("eopt: interrupted; a run continues with `eopt train --resume`") from None


if __name__ == "__main__":
    main()
