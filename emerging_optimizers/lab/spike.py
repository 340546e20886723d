"""The spike experiment: how each optimizer answers one gradient that is far too large.

Every optimizer gets the same i.i.d. Gaussian gradients; a scenario multiplies one of them. The update is what a step
takes off the parameter, its RMS and spectral norm are recorded in every step. All scenarios of an optimizer are rows
of one stack. `run_spike` makes a `SpikeResult`; the table, the figures and the JSON are readers of it.

Nothing here imports torch before an experiment runs, so that ``eopt --help`` answers at once.
"""

import inspect
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from emerging_optimizers.lab.config import Names, UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from torch import Tensor

# How a recovery is measured: within 10 % of the mean update RMS of the last 30 steps.
TOLERANCE = 0.10
STEADY_WINDOW = 30


@dataclass(frozen=True, kw_only=True)
class SpikeArm:
    """How one optimizer enters the experiment, with a learning rate of 1 and no weight decay."""

    optimizer: str
    """A name from `eopt list`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the class."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "SpikeArm":
        """The inverse of `dataclasses.asdict` followed by JSON, which has turned tuples into lists."""
        options = {key: tuple(x) if isinstance(x, list) else x for key, x in value["options"].items()}
        return cls(optimizer=value["optimizer"], options=options)


# The published experiment, and beside its two SOAP variants (KL factors, the published start) the same with the
# library's own start. Any other name of the registry runs with its own defaults.
ARMS: dict[str, SpikeArm] = {
    "adamw": SpikeArm(optimizer="adamw", options={"betas": (0.9, 0.95)}),
    "laprop": SpikeArm(optimizer="laprop", options={"betas": (0.9, 0.65)}),
    "muon": SpikeArm(optimizer="muon", options={"momentum": 0.95}),
    "soap": SpikeArm(optimizer="soap", options={"betas": (0.9, 0.95), "use_kl_shampoo": True}),
    "soap-published": SpikeArm(
        optimizer="soap", options={"betas": (0.9, 0.95), "use_kl_shampoo": True, "first_step": "eigenbasis"}
    ),
    "rekls": SpikeArm(optimizer="rekls", options={"betas": (0.9, 0.95)}),
    "rekls-published": SpikeArm(optimizer="rekls", options={"betas": (0.9, 0.95), "first_step": "eigenbasis"}),
}


@dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """The sweep: who runs, on which gradients, with which spikes. Everything that can change a number is here."""

    optimizers: Names = tuple(ARMS)
    """Who runs: soap-published and rekls-published are SOAP and REKLS with the published start; soap has KL factors;
    every other name from `eopt list` runs with its own defaults."""
    shape: tuple[int, int] = (128, 64)
    """Rows and columns of the parameter, which starts at zero."""
    spike_at: tuple[int, ...] = (10, 50, 100)
    """Steps before the spike, one scenario each."""
    spike_scale: tuple[float, ...] = (1e2, 1e3, 1e4, 1e5)
    """What the spike's gradient is multiplied by, one scenario each."""
    steps: int = 200
    """Steps of each scenario."""
    warmup_steps: int = 100
    """Steps of the trajectory without a spike that the first figure shows."""
    spectrum_at: tuple[int, ...] = ()
    """Steps, counted from 1, whose updates' singular values are kept; by default the first, each spike's, the last."""
    spike_guard: float | None = None
    """The guard's threshold, for every optimizer; by default none."""
    seed: int = 0
    """Seed of the gradients."""
    threads: int = 1
    """Threads of torch."""

    def __post_init__(self) -> None:
        for name in ("steps", "warmup_steps", "threads"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if min(self.shape) < 1:
            raise UsageError(f"--shape {self.shape[0]} {self.shape[1]} is no matrix; give two positive sizes")
        for name in ("optimizers", "spike_at", "spike_scale"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UsageError(f"--{name.replace('_', '-')} must name at least one value, and each of them once")
        for at in self.spike_at:
            if not 1 <= at < self.steps - 1:
                raise UsageError(
                    f"--spike-at {at} needs a step before the spike and one after it in --steps {self.steps}"
                )
        for step in self.spectrum_at:
            if not 1 <= step <= self.steps:
                raise UsageError(f"--spectrum-at {step} is not one of the steps 1 to {self.steps}")
        if not all(0 < scale < math.inf for scale in self.spike_scale):
            raise UsageError("--spike-scale must be positive and finite")

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "SpikeConfig":
        """The inverse of `dataclasses.asdict` followed by JSON."""
        fields: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in value.items()}
        return cls(**fields)

    @property
    def scenarios(self) -> tuple[tuple[int, float] | None, ...]:
        """No spike, then each spike's step and size, by rising step: the rows of a stack."""
        return (None, *((at, scale) for at in sorted(self.spike_at) for scale in sorted(self.spike_scale)))

    @property
    def spectrum_steps(self) -> tuple[int, ...]:
        """The steps, counted from 1, whose singular values are kept."""
        return tuple(sorted({*self.spectrum_at} or {1, *(at + 1 for at in self.spike_at), self.steps}))


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """The updates of one scenario, by step."""

    spike: tuple[int, float] | None
    """Steps before the spike and its size, or None."""
    rms: tuple[float, ...]
    spectral_norm: tuple[float, ...]
    singular_values: Mapping[int, tuple[float, ...]]
    """Of the update at some steps, counted from 1, largest first."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object; a number that is not finite becomes null."""
        return {
            "spike": None if self.spike is None else list(self.spike),
            "rms": _finite(self.rms),
            "spectral_norm": _finite(self.spectral_norm),
            "singular_values": {str(step): _finite(values) for step, values in self.singular_values.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Trajectory":
        """The inverse of `to_json`."""
        return cls(
            spike=None if value["spike"] is None else (value["spike"][0], value["spike"][1]),
            rms=_numbers(value["rms"]),
            spectral_norm=_numbers(value["spectral_norm"]),
            singular_values={int(step): _numbers(values) for step, values in value["singular_values"].items()},
        )


@dataclass(frozen=True, kw_only=True)
class SpikeRow:
    """What one optimizer did with one spike: a cell of the recovery table and of the aftershock's."""

    optimizer: str
    spike_at: int
    spike_scale: float
    recovery: int | None
    """Steps after the spike to the first update RMS within 10 % of the steady state at the trajectory's own end, as
    published; None: not within the run."""
    settled: int | None
    """Steps after the spike from which on every update RMS is within 10 % of the steady state without a spike."""
    before: float
    """Largest update RMS in the 30 steps before the spike."""
    at_spike: float
    """Update RMS of the spike's own step."""
    aftershock: float
    """Largest update RMS after the spike's step."""


@dataclass(frozen=True, kw_only=True)
class SpikeArmResult:
    """One optimizer in every scenario; the first has no spike."""

    name: str
    arm: SpikeArm
    trajectories: tuple[Trajectory, ...]

    @property
    def no_spike(self) -> Trajectory:
        """The scenario without a spike."""
        return self.trajectories[0]

    @property
    def rows(self) -> tuple[SpikeRow, ...]:
        """The measures of each spike."""
        steady = mean(self.no_spike.rms[-STEADY_WINDOW:])
        rows = []
        for trajectory in self.trajectories[1:]:
            assert trajectory.spike is not None
            at, scale = trajectory.spike
            rms = trajectory.rms
            rows.append(
                SpikeRow(
                    optimizer=self.name,
                    spike_at=at,
                    spike_scale=scale,
                    recovery=recovery_steps(rms, at),
                    settled=settled_steps(rms, at, steady),
                    before=_largest(rms[max(0, at - STEADY_WINDOW) : at]),
                    at_spike=rms[at],
                    aftershock=_largest(rms[at + 1 :]),
                )
            )
        return tuple(rows)

    def trajectory(self, spike: tuple[int, float]) -> Trajectory:
        """The scenario of one spike."""
        return next(trajectory for trajectory in self.trajectories if trajectory.spike == spike)


@dataclass(frozen=True, kw_only=True)
class SpikeResult:
    """The whole sweep."""

    config: SpikeConfig
    arms: tuple[SpikeArmResult, ...]

    @property
    def rows(self) -> tuple[SpikeRow, ...]:
        """The measures of each optimizer and spike."""
        return tuple(row for arm in self.arms for row in arm.rows)

    def to_json(self) -> dict[str, Any]:
        """A JSON object: the request, the table, the trajectories."""
        return {
            "config": asdict(self.config),
            "table": [
                {key: _finite([x])[0] if isinstance(x, float) else x for key, x in asdict(row).items()}
                for row in self.rows
            ],
            "arms": [
                {
                    "name": arm.name,
                    "arm": asdict(arm.arm),
                    "trajectories": [trajectory.to_json() for trajectory in arm.trajectories],
                }
                for arm in self.arms
            ],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "SpikeResult":
        """The inverse of `to_json`; the table is made again."""
        return cls(
            config=SpikeConfig.from_json(value["config"]),
            arms=tuple(
                SpikeArmResult(
                    name=arm["name"],
                    arm=SpikeArm.from_json(arm["arm"]),
                    trajectories=tuple(Trajectory.from_json(trajectory) for trajectory in arm["trajectories"]),
                )
                for arm in value["arms"]
            ),
        )


def recovery_steps(rms: Sequence[float], spike_at: int) -> int | None:
    """Steps from the spike to the first update RMS within 10 % of the mean of the last 30; None: never.

    The published measure: a trajectory that passes through the band and leaves it again counts as recovered.

    Args:
        rms: Update RMS by step.
        spike_at: Steps before the spike.

    Example:
        >>> recovery_steps([1.0, 9.0, 3.0, 1.05, 2.0] + 30 * [1.0], 1)
        2
    """
    target = mean(rms[-STEADY_WINDOW:])
    after = (k for k, x in enumerate(rms[spike_at + 1 :], start=1) if abs(x - target) <= TOLERANCE * target)
    return next(after, None)


def settled_steps(rms: Sequence[float], spike_at: int, steady: float) -> int | None:
    """Steps from the spike to the update RMS that comes within 10 % of `steady` for good; None: never.

    Args:
        rms: Update RMS by step.
        spike_at: Steps before the spike.
        steady: Update RMS without a spike.

    Example:
        >>> settled_steps([1.0, 9.0, 3.0, 1.05, 2.0] + 30 * [1.0], 1, steady=1.0)
        4
    """
    after = rms[spike_at + 1 :]
    outside = [k for k, x in enumerate(after, start=1) if not abs(x - steady) <= TOLERANCE * steady]
    settled = (outside[-1] if outside else 0) + 1
    return settled if settled <= len(after) else None


def run_spike(config: SpikeConfig) -> SpikeResult:
    """Runs every optimizer through every scenario.

    Args:
        config: The sweep.

    Returns:
        The trajectories; the same configuration gives the same numbers on one machine.

    Raises:
        UsageError: An optimizer that does not exist, or one that cannot run with a learning rate of 1 from zero.
    """
    import torch

    arms = {name: find_arm(name) for name in config.optimizers}
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with torch.random.fork_rng(devices=[]):
            results = tuple(run_arm(config, name, arm) for name, arm in arms.items())
    finally:
        torch.set_num_threads(threads)
    return SpikeResult(config=config, arms=results)


def find_arm(name: str) -> SpikeArm:
    """The arm of a name: from `ARMS`, else the optimizer of that name with its own defaults.

    Raises:
        UsageError: There is none.
    """
    from emerging_optimizers.registry import OPTIMIZERS, entry

    if name not in ARMS and name.lower() not in OPTIMIZERS:
        variants = ", ".join(sorted(set(ARMS) - set(OPTIMIZERS)))
        try:
            entry(name)
        except ValueError as error:
            raise UsageError(f"{error}; --optimizers also takes {variants}") from None
    return ARMS.get(name) or SpikeArm(optimizer=name.lower())


def run_arm(config: SpikeConfig, name: str, arm: SpikeArm) -> SpikeArmResult:
    """Runs one optimizer through every scenario, a row of a stack each.

    Until its spike a scenario is the one without a spike; there its row begins, with that one's weight and state.

    Args:
        config: The sweep.
        name: Name of the arm.
        arm: The optimizer and its options.

    Returns:
        The trajectories.

    Raises:
        UsageError: The optimizer refuses the job.
    """
    import torch

    from emerging_optimizers.registry import entry

    scenarios = config.scenarios
    gradients = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)  # for an optimizer that draws numbers
    weights = torch.zeros(len(scenarios), *config.shape)
    rows = [torch.nn.Parameter(weight) for weight in weights]
    base = rows[0]

    cls = entry(arm.optimizer).load()
    options = {"lr": 1.0, "weight_decay": 0.0, "spike_guard": config.spike_guard, **arm.options}
    if "weight_decay" not in inspect.signature(cls).parameters:
        del options["weight_decay"]
    try:
        optimizer = cls(rows, **options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name} cannot run this experiment: {error}") from error

    measures: list[tuple[list[float], list[float]]] = []
    spectra: dict[int, list[list[float]]] = {}
    for step in range(config.steps):
        grad = torch.randn(config.shape, generator=gradients)
        live = sum(spike is None or spike[0] <= step for spike in scenarios)  # the first rows, since they are sorted
        for row, spike in zip(rows[:live], scenarios, strict=False):
            row.grad = grad
            if spike is not None and spike[0] == step:
                row.grad = grad * spike[1]
                row.data.copy_(base.data)
                optimizer.state[row] = {
                    key: x.clone() if torch.is_tensor(x) else x for key, x in optimizer.state[base].items()
                }
        before = weights[:live].clone()
        optimizer.step()
        updates = before - weights[:live]
        measures.append((_all_rows(_rms(updates), scenarios), _all_rows(_spectral_norm(updates), scenarios)))
        if step + 1 in config.spectrum_steps:
            spectra[step + 1] = _all_rows(_singular_values(updates), scenarios)

    trajectories = tuple(
        Trajectory(
            spike=spike,
            rms=_rounded(rms[i] for rms, _ in measures),
            spectral_norm=_rounded(norms[i] for _, norms in measures),
            singular_values={step: _rounded(values[i]) for step, values in spectra.items()},
        )
        for i, spike in enumerate(scenarios)
    )
    return SpikeArmResult(name=name, arm=arm, trajectories=trajectories)


def save_spike(result: SpikeResult, folder: Path, command: Sequence[str] = ()) -> tuple[Path, ...]:
    """Writes the result with the environment that it comes from, and the figures.

    Args:
        result: The sweep.
        folder: Where to; it is made if it is not there, and what it holds from an earlier sweep is replaced.
        command: The command line, kept with the result.

    Returns:
        The files.
    """
    from emerging_optimizers.lab.plots import plot_spike_aftershock, plot_spike_sweep, plot_spike_warmup
    from emerging_optimizers.lab.record import environment, write_json

    folder.mkdir(parents=True, exist_ok=True)
    json = folder / "result.json"
    write_json(json, {"command": list(command), "environment": environment(result.config.threads), **result.to_json()})
    figures = {"warmup": plot_spike_warmup, "sweep": plot_spike_sweep, "aftershock": plot_spike_aftershock}
    for name, plot in figures.items():
        plot(result, folder / f"{name}.png")
    return (json, *(folder / f"{name}.png" for name in figures))


def print_spike(result: SpikeResult, console: "Console") -> None:
    """Shows the tables of a sweep.

    Args:
        result: The sweep.
        console: Where to.
    """
    console.print(_recovery_table(result), _aftershock_table(result))


def run_command(
    config: SpikeConfig, folder: Path, *, command: Sequence[str] = (), console: "Console | None" = None
) -> SpikeResult:
    """What ``eopt spike`` does: runs, shows and saves.

    Args:
        config: The sweep.
        folder: Where the files go.
        command: The command line, kept with the result.
        console: Where to show the tables.

    Returns:
        The sweep.
    """
    if console is None:
        from rich.console import Console

        console = Console()
    import_module("torch._dynamo")  # the first step of any optimizer needs it; its import is no part of the sweep
    begin, begin_cpu = time.perf_counter(), time.process_time()
    result = run_spike(config)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    print_spike(result, console)
    scenarios = f"{len(config.optimizers)} optimizers, {len(config.scenarios)} scenarios of {config.steps} steps"
    console.print(f"{scenarios}: {seconds:.1f} s, {cpu_seconds:.1f} CPU s", soft_wrap=True)
    for path in save_spike(result, folder, command):
        console.print(str(path), soft_wrap=True)
    return result


def _recovery_table(result: SpikeResult) -> "Table":
    """Both measures of recovery, a pair of numbers a spike."""

    def steps(count: int | None, at: int) -> str:
        return f">{result.config.steps - at - 1}" if count is None else str(count)

    return _grid(
        result,
        "Steps after the spike until the update RMS first / for good is within 10 % of its steady state",
        lambda row: f"{steps(row.recovery, row.spike_at)} / {steps(row.settled, row.spike_at)}",
    )


def _aftershock_table(result: SpikeResult) -> "Table":
    return _grid(
        result,
        "Aftershock: largest update RMS after the spike's step (before: in the 30 steps before it)",
        lambda row: f"{row.aftershock:.2f}",
        lambda row: f"{row.before:.2f}",
    )


def _grid(result: SpikeResult, title: str, cell: Any, before: Any = None) -> "Table":
    """A row for each optimizer and spike time, a column for each spike size."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("optimizer")
    scales = sorted(result.config.spike_scale)
    for heading in ("spike at", *(("before",) if before else ()), *(f"x{scale:g}" for scale in scales)):
        table.add_column(heading, justify="right")
    for arm in result.arms:
        for k, at in enumerate(sorted(result.config.spike_at)):
            rows = [row for row in arm.rows if row.spike_at == at]
            edge = (before(rows[0]),) if before else ()
            table.add_row("" if k else arm.name, str(at), *edge, *map(cell, rows))
    return table


def _rms(updates: "Tensor") -> "Tensor":
    return updates.square().mean(dim=(-2, -1)).sqrt()


def _spectral_norm(updates: "Tensor") -> "Tensor":
    """Largest singular value, from the Gram matrix of the shorter side, scaled so that no square overflows."""
    import torch

    scale = updates.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(updates.dtype).tiny)
    x = updates / scale
    gram = x.mT @ x if x.size(-2) >= x.size(-1) else x @ x.mT
    sound = gram.isfinite().all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    top = torch.linalg.eigvalsh(torch.where(sound, gram, 0.0))[..., -1].clamp_min(0).sqrt()
    return torch.where(sound[..., 0, 0], top * scale[..., 0, 0], torch.nan)


def _singular_values(updates: "Tensor") -> "Tensor":
    """Singular values of each row, largest first; NaN where the row is not finite."""
    import torch

    sound = updates.isfinite().all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    values = torch.linalg.svdvals(torch.where(sound, updates, 0.0))
    return torch.where(sound[..., 0], values, torch.nan)


def _all_rows(live: "Tensor", scenarios: Sequence[object]) -> list[Any]:
    """A measure of every scenario: those that have not begun yet share the first one's."""
    values = live.tolist()
    return values + (len(scenarios) - len(values)) * values[:1]


def _rounded(values: Iterable[float]) -> tuple[float, ...]:
    """Six digits: about what float32 holds, and files of half the size."""
    return tuple(float(f"{value:.6g}") for value in values)


def _finite(values: Sequence[float]) -> list[float | None]:
    return [x if math.isfinite(x) else None for x in values]


def _numbers(values: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if x is None else x for x in values)


def _largest(values: Sequence[float]) -> float:
    """The maximum, NaN if one of the values is."""
    return math.nan if any(math.isnan(x) for x in values) else max(values)
