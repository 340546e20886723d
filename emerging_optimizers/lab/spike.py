"""The spike experiment: how each optimizer answers one gradient that is far too large.

Every optimizer gets the same i.i.d. Gaussian gradients; a scenario multiplies one of them. The update is what a step
takes off the parameter, its RMS and spectral norm are recorded in every step. All scenarios of an optimizer are rows
of one stack. `run_spike` makes a `SpikeResult`, which `lab/views/spike.py` shows.

Nothing here imports torch before an experiment runs, so that ``eopt --help`` answers at once.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_all_start_methods, get_context
from statistics import mean
from typing import TYPE_CHECKING, Any

from emerging_optimizers.cli import UsageError
from emerging_optimizers.cli.progress import Say, quiet
from emerging_optimizers.lab.config import Names, lower_names, require_positive
from emerging_optimizers.lab.experiment import (
    from_json,
    interrupted_behind,
    reproducible,
    require_distinct,
    rounded,
    to_json,
    workers,
)
from emerging_optimizers.lab.measures import STEADY_WINDOW, largest, recovery_steps, settled_steps
from emerging_optimizers.lab.spike_arms import DEFAULT_ARMS, GUARD, SpikeArm, find_arm

if TYPE_CHECKING:
    from torch import Tensor

# The singular values "after" a spike are those of the update this many steps later.
AFTER = 10


@dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """The sweep: who runs, on which gradients, with which spikes. Everything that can change a number is here."""

    optimizers: Names = DEFAULT_ARMS
    """Who runs: names from `eopt list`, with the published experiment's settings (SOAP: KL factors) or else their
    own defaults. NAME-published has the published start (soap, rekls), NAME-guarded the spike guard."""
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
    """Steps, counted from 1, whose updates' singular values are kept; by default the one before each spike, the
    spike's, and the tenth after it."""
    spike_guard: float = GUARD
    """The guard's threshold in the guarded variants."""
    seed: int = 0
    """Seed of the gradients."""
    threads: int = 1
    """Threads of torch."""

    def __post_init__(self) -> None:
        lower_names(self)
        require_positive(self, "steps", "warmup_steps", "threads")
        require_distinct(self, "optimizers", "spike_at", "spike_scale")
        if min(self.shape) < 1:
            raise UsageError(f"--shape {self.shape[0]} {self.shape[1]} is no matrix; give two positive sizes")
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

    @property
    def scenarios(self) -> tuple[tuple[int, float] | None, ...]:
        """No spike, then each spike's step and size, by rising step: the rows of a stack."""
        return (None, *((at, scale) for at in sorted(self.spike_at) for scale in sorted(self.spike_scale)))

    @property
    def spectrum_steps(self) -> tuple[int, ...]:
        """The steps, counted from 1, whose singular values are kept."""
        return tuple(sorted({step for at in self.spike_at for step in self.spectrum_steps_around(at)}))

    def spectrum_steps_around(self, at: int) -> tuple[int, ...]:
        """Those of them that belong to the spike after `at` steps."""
        return tuple(sorted({*self.spectrum_at} or {at, at + 1, min(at + 1 + AFTER, self.steps)}))


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """The updates of one scenario, by step."""

    spike: tuple[int, float] | None
    """Steps before the spike and its size, or None."""
    rms: tuple[float, ...]
    spectral_norm: tuple[float, ...]
    singular_values: Mapping[int, tuple[float, ...]]
    """Of the update at some steps, counted from 1, largest first."""


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
    def variant(self) -> str:
        """What the name adds to that of the optimizer: "published", "guarded", "published-guarded" or nothing."""
        return self.name.lower().partition("-")[2]

    @property
    def no_spike(self) -> Trajectory:
        """The scenario without a spike."""
        return self.trajectories[0]

    @property
    def rows(self) -> tuple[SpikeRow, ...]:
        """The measures of each spike."""
        steady = mean(self.no_spike.rms[-STEADY_WINDOW:])
        return tuple(
            SpikeRow(
                optimizer=self.name,
                spike_at=at,
                spike_scale=scale,
                recovery=recovery_steps(rms, at),
                settled=settled_steps(rms, at, steady),
                before=largest(rms[max(0, at - STEADY_WINDOW) : at]),
                at_spike=rms[at],
                aftershock=largest(rms[at + 1 :]),
            )
            for at, scale, rms in ((*t.spike, t.rms) for t in self.trajectories if t.spike is not None)
        )

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
        """A JSON object: the request, the trajectories, the measures."""
        return {**to_json(self), "table": to_json(self.rows)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "SpikeResult":
        """The inverse of `to_json`; the measures are made again."""
        stored = from_json(value)
        arms = (
            SpikeArmResult(
                name=arm["name"],
                arm=SpikeArm(**arm["arm"]),
                trajectories=tuple(
                    Trajectory(**{**x, "singular_values": {int(step): y for step, y in x["singular_values"].items()}})
                    for x in arm["trajectories"]
                ),
            )
            for arm in stored["arms"]
        )
        return cls(config=SpikeConfig(**stored["config"]), arms=tuple(arms))


def run_spike(config: SpikeConfig, processes: int = 1, say: Say = quiet) -> SpikeResult:
    """Runs every optimizer through every scenario.

    Args:
        config: The sweep.
        processes: Among how many processes the optimizers are shared out; it changes no number. A script that gives
            more than one keeps its own work under ``if __name__ == "__main__":``, since they import it.
        say: Told how many optimizers have ended.

    Returns:
        The trajectories; the same configuration gives the same numbers on one machine.

    Raises:
        UsageError: An optimizer that does not exist, or one that cannot run with a learning rate of 1 from zero.

    Example:
        >>> config = SpikeConfig(optimizers=("muon-guarded",), steps=12, spike_at=(5,), spike_scale=(1e3,))
        >>> [(row.recovery, row.settled) for row in run_spike(config).rows]
        [(1, 1)]
    """
    arms = {name: find_arm(name, config.spike_guard) for name in config.optimizers}
    if processes == 1:
        alone = ((name, run_arm(config, name, arm)) for name, arm in arms.items())
        return SpikeResult(config=config, arms=tuple(_counted(alone, len(arms), say).values()))
    # Not "fork": a process that has used torch may hold locks. The fork server imports it once for all.
    context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    with workers(processes, len(arms), context) as pool:
        # The costliest come last in the default; begun first, they leave no process idle at the end.
        names = tuple(reversed(arms))
        with interrupted_behind():
            shared = pool.map(partial(run_arm, config), names, map(arms.get, names))
        results = _counted(zip(names, shared, strict=True), len(arms), say)
    return SpikeResult(config=config, arms=tuple(results[name] for name in arms))


def _counted(results: Iterable[tuple[str, SpikeArmResult]], count: int, say: Say) -> dict[str, SpikeArmResult]:
    found: dict[str, SpikeArmResult] = {}
    say(f"0 of {count} optimizers")
    for name, result in results:
        found[name] = result
        say(f"{len(found)} of {count} optimizers")
    return found


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
    weights = torch.zeros(len(scenarios), *config.shape)
    rows = [torch.nn.Parameter(weight) for weight in weights]
    base = rows[0]
    gradients = torch.Generator().manual_seed(config.seed)
    rms, norms, spectra = [], [], {}
    with reproducible(config):
        try:
            optimizer = entry(arm.optimizer).load()(rows, lr=1.0, weight_decay=0.0, **arm.options)
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"{name} cannot run this experiment, whose weight starts at zero and whose learning rate is 1: {error}"
            ) from error
        for step in range(config.steps):
            grad = torch.randn(config.shape, generator=gradients)
            begun = torch.tensor([spike is None or spike[0] <= step for spike in scenarios])
            live = int(begun.sum())  # the first rows, since scenarios are sorted
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
            measured = torch.arange(len(scenarios)).where(begun, 0)  # one that has not begun is the one without a spike
            rms.append(updates.square().mean(dim=(-2, -1)).sqrt()[measured])
            norms.append(_spectral_norms(updates)[measured])
            if step + 1 in config.spectrum_steps:
                spectra[step + 1] = _where_finite(updates, torch.linalg.svdvals)[measured]
    if not any(bool(x.any()) for x in rms):
        raise UsageError(
            f"{name} cannot run this experiment: it does not move a weight that is zero, where this one starts"
        )
    trajectories = tuple(
        Trajectory(
            spike=spike,
            rms=rounded(torch.stack(rms)[:, i].tolist()),
            spectral_norm=rounded(torch.stack(norms)[:, i].tolist()),
            singular_values={step: rounded(values[i].tolist()) for step, values in spectra.items()},
        )
        for i, spike in enumerate(scenarios)
    )
    return SpikeArmResult(name=name, arm=arm, trajectories=trajectories)


def _spectral_norms(updates: "Tensor") -> "Tensor":
    """From the Gram matrices of the shorter side, scaled so that no square overflows: a third of the SVD's time."""
    import torch

    scale = updates.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(updates.dtype).tiny)
    x = updates / scale
    gram = x.mT @ x if x.size(-2) >= x.size(-1) else x @ x.mT
    return _where_finite(gram, torch.linalg.eigvalsh)[:, -1].clamp_min(0).sqrt() * scale[:, 0, 0]


def _where_finite(matrices: "Tensor", measure: "Callable[[Tensor], Tensor]") -> "Tensor":
    """A vector for each matrix, NaN for those that are not finite, of which LAPACK would make an error for all."""
    import torch

    finite = matrices.isfinite().flatten(1).all(dim=1)
    values = measure(torch.where(finite[:, None, None], matrices, 0.0))
    return torch.where(finite[:, None], values, torch.nan)
