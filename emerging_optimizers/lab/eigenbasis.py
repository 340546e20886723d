"""The eigenbasis experiment: what a gradient spike does to SOAP's bases, and what matmul precision has to do with it.

SOAP with KL factors and REKLS see the same i.i.d. Gaussian gradients, one of which is far too large. Each runs at
several float32 matmul precisions, emulated on the CPU. Two measures: the angles between the bases and the one before
the spike, as published; and how far each trajectory is from the one at "highest".

Nothing here imports torch before an experiment runs, so that ``eopt --help`` answers at once.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from emerging_optimizers.cli import UsageError
from emerging_optimizers.cli.progress import Say, quiet
from emerging_optimizers.lab.config import Names, lower_names, require_positive
from emerging_optimizers.lab.experiment import from_json, reproducible, require_distinct, rounded, to_json
from emerging_optimizers.lab.measures import relative_difference

if TYPE_CHECKING:
    from torch import Tensor

# "soap_kl" is SOAP with KL factors: a step of orthogonal iteration where REKLS has a whole eigh.
OPTIMIZERS = {"soap_kl": False, "rekls": True}
PRECISIONS = ("highest", "high", "medium")
# How many eigenvalues of a factor are kept.
KEPT = 10


@dataclass(frozen=True, kw_only=True)
class EigenbasisConfig:
    """The experiment. Everything that can change a number is here."""

    optimizers: Names = tuple(OPTIMIZERS)
    """soap_kl, rekls or both."""
    precisions: Names = ("high", "highest")
    """Float32 matmul precisions of factors and projections; "highest", the reference, runs in any case. On the CPU
    "high" is emulated TF32 and "medium" emulated bfloat16."""
    qr_precision: Literal["highest", "high", "medium"] = "high"
    """Precision of the refresh of the bases, in every run."""
    start: Literal["published", "eigenbasis", "adam"] = "published"
    """The published start and KL update; the published start with the library's update; or the library's default."""
    shape: tuple[int, int] = (128, 64)
    """Rows and columns of the parameter."""
    steps: int = 140
    """Steps of each run."""
    spike_at: int = 50
    """Steps before the spike."""
    spike_scale: float = 1e3
    """What the spike's gradient is multiplied by."""
    offsets: tuple[int, ...] = (1, 2, 5, 10)
    """Steps before and after the last basis without the spike at which the tables show the angles."""
    top: int = 8
    """Columns of the basis whose common subspace is compared, besides the first one alone."""
    seed: int = 0
    """Seed of the gradients."""
    threads: int = 1
    """Threads of torch."""

    def __post_init__(self) -> None:
        lower_names(self)
        require_positive(self, "steps", "threads", "top")
        require_distinct(self, "optimizers", "precisions")
        for name, known in (("optimizers", tuple(OPTIMIZERS)), ("precisions", PRECISIONS)):
            if unknown := sorted(set(getattr(self, name)) - set(known)):
                raise UsageError(f"--{name} names {', '.join(unknown)}; known are {', '.join(known)}")
        if self.top > min(self.shape):
            raise UsageError(f"--top {self.top} is more than the {min(self.shape)} columns of the smaller basis")
        if not self.offsets or min(self.offsets) < 1:
            raise UsageError("--offsets must name at least one number of steps, each at least 1")
        if not max(self.offsets) < self.spike_at <= self.steps - max(self.offsets):
            raise UsageError(
                f"--spike-at {self.spike_at} needs more than {max(self.offsets)} steps (the largest of --offsets) "
                f"before it and as many after it in --steps {self.steps}"
            )
        if not 0 < self.spike_scale < math.inf:
            raise UsageError(f"--spike-scale is {self.spike_scale:g}; it must be positive and finite")


@dataclass(frozen=True, kw_only=True)
class EigenbasisRun:
    """One optimizer at one precision, by step. Angles are in degrees, to the basis after step `spike_at`."""

    optimizer: str
    precision: str
    update_rms: tuple[float, ...]
    top1_left: tuple[float, ...]
    """Between the first columns of Q_L."""
    topk_left: tuple[float, ...]
    """Largest principal angle between the spans of the `top` first columns of Q_L."""
    top1_right: tuple[float, ...]
    topk_right: tuple[float, ...]
    eigenvalues: tuple[tuple[float, ...], ...]
    """The largest eigenvalues of L, falling."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Largest relative difference from the run at "highest", over all steps."""

    optimizer: str
    precision: str
    update_rms: float
    eigenvalues: float
    """Of the ten largest eigenvalues of L."""


@dataclass(frozen=True, kw_only=True)
class EigenbasisResult:
    """Every run; the agreement follows from them."""

    config: EigenbasisConfig
    runs: tuple[EigenbasisRun, ...]

    def run(self, optimizer: str, precision: str) -> EigenbasisRun:
        """The run of an optimizer at a precision."""
        return next(run for run in self.runs if (run.optimizer, run.precision) == (optimizer, precision))

    @property
    def agreement(self) -> tuple[Agreement, ...]:
        """Of each run at a lower precision with the one at "highest"."""
        found = []
        for run in self.runs:
            if run.precision != "highest":
                exact = self.run(run.optimizer, "highest")
                rms = relative_difference(run.update_rms, exact.update_rms)
                top = max(relative_difference(*pair) for pair in zip(run.eigenvalues, exact.eigenvalues, strict=True))
                found.append(
                    Agreement(optimizer=run.optimizer, precision=run.precision, update_rms=rms, eigenvalues=top)
                )
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """A JSON object, with the agreement."""
        return {**to_json(self), "agreement": to_json(self.agreement)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "EigenbasisResult":
        """The inverse of `to_json`."""
        stored = from_json(value)
        runs = tuple(EigenbasisRun(**run) for run in stored["runs"])
        return cls(config=EigenbasisConfig(**stored["config"]), runs=runs)


def run_eigenbasis(config: EigenbasisConfig, say: Say = quiet) -> EigenbasisResult:
    """Runs every optimizer at every precision.

    Args:
        config: The experiment.
        say: Told how many runs have ended.

    Returns:
        The runs; the same configuration gives the same numbers on one machine.

    Example:
        >>> config = EigenbasisConfig(shape=(8, 6), steps=8, spike_at=4, offsets=(1,), top=2)
        >>> result = run_eigenbasis(config)
        >>> [(run.optimizer, run.precision) for run in result.runs]
        [('soap_kl', 'high'), ('rekls', 'high'), ('soap_kl', 'highest'), ('rekls', 'highest')]
    """
    precisions = (*config.precisions, *({"highest"} - set(config.precisions)))
    with reproducible(config):
        runs: list[EigenbasisRun] = []
        for precision, name in (wanted := [*product(precisions, config.optimizers)]):
            say(f"{len(runs)} of {len(wanted)} runs")
            runs.append(_run(config, name, precision))
    return EigenbasisResult(config=config, runs=tuple(runs))


def _run(config: EigenbasisConfig, optimizer: str, precision: str) -> EigenbasisRun:
    import torch

    from emerging_optimizers.lab.published import PublishedSOAP
    from emerging_optimizers.linalg.emulation import emulate_bf16, emulate_tf32
    from emerging_optimizers.soap.soap import SOAP

    gradients = torch.Generator().manual_seed(config.seed)
    weight = torch.nn.Parameter(torch.zeros(config.shape))
    soap = (PublishedSOAP if config.start == "published" else SOAP)(
        [weight],
        lr=1.0,
        weight_decay=0.0,
        use_kl_shampoo=True,
        use_eigh=OPTIMIZERS[optimizer],
        first_step="adam" if config.start == "adam" else "eigenbasis",
        fp32_matmul_prec=precision,  # type: ignore[arg-type]  # one of PRECISIONS
        qr_fp32_matmul_prec=config.qr_precision,
    )
    medium = emulate_bf16 if "medium" in (precision, config.qr_precision) else nullcontext
    rms, spectra, left, right = [], [], [], []
    for step in range(config.steps):
        scale = config.spike_scale if step == config.spike_at else 1.0
        weight.grad = torch.randn(config.shape, generator=gradients) * scale
        before = weight.detach().clone()
        with emulate_tf32(), medium():
            soap.step()
        state = soap.state[weight]
        rms.append((before - weight.detach()).square().mean().sqrt().item())
        spectra.append(torch.linalg.eigvalsh(state["L"].double()).flip(-1)[:KEPT])
        left.append(state["Q_L"].double())
        right.append(state["Q_R"].double())
    return EigenbasisRun(
        optimizer=optimizer,
        precision=precision,
        update_rms=rounded(rms),
        top1_left=_angles(left, config.spike_at - 1, 1),
        topk_left=_angles(left, config.spike_at - 1, config.top),
        top1_right=_angles(right, config.spike_at - 1, 1),
        topk_right=_angles(right, config.spike_at - 1, config.top),
        eigenvalues=tuple(rounded(spectrum.tolist()) for spectrum in spectra),
    )


def _angles(bases: "Sequence[Tensor]", reference: int, k: int) -> tuple[float, ...]:
    """Largest principal angle between the first k columns of each basis and those of one of them, in degrees.

    From sine and cosine both: the cosine alone cannot tell angles below 0.02 degrees from rounding.
    """
    import torch

    old = bases[reference][:, :k]
    new = torch.stack([basis[:, :k] for basis in bases])
    shared = old.mT @ new
    cosine = torch.linalg.svdvals(shared)[:, -1]
    sine = torch.linalg.svdvals(new - old @ shared)[:, 0]
    return rounded(torch.atan2(sine, cosine).rad2deg().tolist())
