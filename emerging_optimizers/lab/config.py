"""What a run is asked to do: the job, each optimizer's learning rates, and the error of a wrong request.

Nothing here imports torch, so that ``eopt --help`` answers at once.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import UnionType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from tyro.constructors import PrimitiveConstructorSpec

from emerging_optimizers.cli import UsageError
from emerging_optimizers.registry import OPTIMIZERS

T = TypeVar("T")


def checked(value: T) -> T:
    """Refuses a dataclass that a file filled with values of other types than its fields have.

    Args:
        value: The dataclass; of what its fields contain nothing is looked at.

    Raises:
        UsageError: A field has another type.

    Example:
        >>> checked(Arm(lr="high"))
        Traceback (most recent call last):
            ...
        emerging_optimizers.cli.UsageError: lr is 'high', not float | None
    """
    cls: type = type(value)
    for name, (kinds, hint) in _kinds(cls).items():
        if not isinstance(getattr(value, name), kinds):
            raise UsageError(f"{name} is {getattr(value, name)!r}, not {hint}")
    return value


@cache
def _kinds(cls: type) -> dict[str, tuple[tuple[type, ...], str]]:
    """What each field of a dataclass may be, and how its annotation reads."""
    found = {}
    for name, hint in get_type_hints(cls).items():
        kinds = get_args(hint) if isinstance(hint, UnionType) else (get_origin(hint) or hint,)
        whole = (int,) if float in kinds else ()  # JSON has one kind of number
        found[name] = ((*kinds, *whole), hint.__name__ if isinstance(hint, type) else str(hint))
    return found


@dataclass(frozen=True, kw_only=True)
class Arm:
    """How one optimizer enters the comparison."""

    lr: float | None = None
    """Learning rate; None is the optimizer's own default."""
    companion_lr: float | None = None
    """Learning rate of the AdamW that takes embeddings, head and norms beside a matrix optimizer."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further keyword arguments of `create_optimizer`."""


# Further arguments that the default job was tuned with.
_OPTIONS: dict[str, dict[str, Any]] = {
    "adaptive_muon": {"nesterov": True},
    "muon": {"nesterov": True},
    "muon_mix": {"nesterov": True},
    "scion": {"spectral_radius": 10.0},
    "spectron": {"truncation_tolerance": 1.0},
    "soap": {"nesterov": True},
    "splus": {"precondition_frequency": 10, "refresh_ramp": 5},
    "rekls": {"nesterov": True},
    "tp_rekls": {"fp32_matmul_prec": "highest"},
    "psgd_pro": {"damping_noise_scale": 1e-3},
}

# What the others are compared with.
BASELINE = "adamw"

# The default job: the registry's learning rates, which were measured with it; `eopt grid` searches around them and says
# where a better one lies.
TUNED: dict[str, Arm] = {
    name: Arm(lr=known.start, companion_lr=None if known.elementwise else 4e-3, options=_OPTIONS.get(name, {}))
    for name, known in OPTIMIZERS.items()
    if known.start is not None
}

# What `eopt grid` tries; an optimizer without a row tries GRID_FACTORS times its learning rate.
GRID: dict[str, tuple[float, ...]] = {
    "adamw": (5e-4, 1e-3, 2e-3, 3e-3, 6e-3),
    "laprop": (5e-4, 1e-3, 2e-3, 3e-3, 6e-3),
    "lion": (1.5e-4, 3e-4, 6e-4, 1.2e-3),
    "muon": (1e-3, 2e-3, 4e-3, 8e-3),
    "soap": (4.5e-3, 9e-3, 1.2e-2, 1.8e-2),
    "rekls": (6e-3, 9e-3, 1.2e-2, 1.8e-2),
}
GRID_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)

# The spike of a training run where only its time is given, and the guard that it meets in the guarded run.
SPIKE_SCALE = 1000.0
SPIKE_GUARD = 2.0


def lower_names(config: Any) -> None:
    """Write the optimizers of a request as the registry has them: upper and lower case are the same."""
    object.__setattr__(config, "optimizers", tuple(name.lower() for name in config.optimizers))


def require_positive(config: object, *names: str) -> None:
    """Refuses a request whose whole numbers of these names are not at least 1, or more threads than torch can start."""
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if name == "threads" and value > 1024:
            raise UsageError(f"--threads {value} is more than any machine has; give at most 1024")


def _parse_names(words: list[str]) -> tuple[str, ...]:
    return tuple(name.strip().lower() for name in words[0].split(",") if name.strip())


def _parse_rates(words: list[str]) -> dict[str, float]:
    rates: dict[str, float] = {}
    for item in _parse_names(words):
        name, equals, value = item.partition("=")
        if not (name.strip() and equals):
            raise ValueError(f"{item!r} is not NAME=RATE, as in muon=0.03,soap=0.01")
        rates[name.strip().lower()] = float(value)
    return rates


Names = Annotated[
    tuple[str, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME,NAME,...",
        instance_from_str=_parse_names,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda names: [",".join(names)],
    ),
]
Rates = Annotated[
    Mapping[str, float],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME=RATE,...",
        instance_from_str=_parse_rates,
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda rates: [",".join(f"{name}={rate:g}" for name, rate in rates.items()) or "tuned"],
    ),
]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training job: text, model, schedule. Everything that can change a loss is here."""

    optimizers: Names = ("adamw", "muon", "soap")
    """Who runs: names from `eopt list`, separated by commas."""
    lr: Rates = field(default_factory=dict)
    """Learning rates that replace the tuned ones, as in muon=0.03,soap=0.01."""
    companion_lr: float | None = None
    """Learning rate of the companion AdamW (embeddings, head, norms) of every matrix optimizer."""
    text: str | None = None
    """A UTF-8 file to learn; by default CPython's own language reference, `pydoc_data.topics`."""
    steps: int = 200
    """Optimizer steps of each run."""
    batch: int = 16
    """Windows of text in a batch."""
    context: int = 64
    """Characters in a window."""
    width: int = 128
    """Width of the model."""
    depth: int = 4
    """Transformer blocks."""
    heads: int = 4
    """Attention heads of a block."""
    warmup: int = 10
    """Steps of linear warm-up, after which the learning rate falls linearly to zero."""
    eval_every: int = 25
    """Steps between evaluations on the held-out text."""
    eval_windows: int = 256
    """Held-out windows of an evaluation, the same ones each time."""
    checkpoint_every: int = 25
    """Steps between checkpoints."""
    spike_at: int | None = None
    """Steps before a gradient spike; each optimizer then runs without it, with it, and with it behind the guard."""
    spike_scale: float | None = None
    """What the gradients of the spike's step are multiplied by; 1000 where --spike-at is given."""
    average: float | None = None
    """Evaluate an average of the weights with this decay, in [0, 1], in their place."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    threads: int = 1
    """Threads of torch; two are slower than one on a loaded machine."""

    def __post_init__(self) -> None:
        lower_names(self)
        object.__setattr__(self, "lr", {name.lower(): rate for name, rate in self.lr.items()})
        model = ("batch", "context", "width", "depth", "heads")
        require_positive(self, "steps", *model, "warmup", "eval_every", "eval_windows", "checkpoint_every", "threads")
        if self.warmup >= self.steps:
            raise UsageError(f"--warmup {self.warmup} leaves nothing of --steps {self.steps}; give fewer warm-up steps")
        if self.width % self.heads:
            raise UsageError(f"--width {self.width} cannot be split into --heads {self.heads} equal heads")
        if not self.optimizers or len(set(self.optimizers)) < len(self.optimizers):
            raise UsageError(f"--optimizers {','.join(self.optimizers)!r} must name each optimizer once")
        for name, rate in self.lr.items():
            if not (rate > 0 and math.isfinite(rate)):
                raise UsageError(f"--lr {name}={rate:g} is not allowed; give a number > 0")
        if unused := sorted(set(self.lr) - set(self.optimizers)):
            raise UsageError(f"--lr names {', '.join(unused)}, which --optimizers does not run")
        if self.average is not None and not 0 <= self.average <= 1:
            raise UsageError(f"--average {self.average:g} is no decay; give a number in [0, 1]")
        if self.spike_at is None and self.spike_scale is not None:
            raise UsageError(f"--spike-scale {self.spike_scale:g} needs --spike-at, the steps before the spike")
        if self.spike_at is not None and not 1 <= self.spike_at < self.steps - 1:
            raise UsageError(
                f"--spike-at {self.spike_at} needs a step before the spike and one after it in --steps {self.steps}"
            )
        if self.spike_scale is not None and not 0 < self.spike_scale < math.inf:
            raise UsageError(f"--spike-scale {self.spike_scale:g} must be positive and finite")

    @property
    def spike(self) -> tuple[int, float] | None:
        """Steps before the spike and its size, or None."""
        if self.spike_at is None:
            return None
        return self.spike_at, SPIKE_SCALE if self.spike_scale is None else self.spike_scale

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TrainConfig":
        """The inverse of `dataclasses.asdict` followed by JSON."""
        return checked(cls(**{**value, "optimizers": tuple(value["optimizers"])}))

    def arm(self, name: str) -> Arm:
        """The learning rates and options that an optimizer runs with: the tuned ones, then the overrides."""
        tuned = TUNED.get(name, Arm())
        companion_lr = tuned.companion_lr if self.companion_lr is None else self.companion_lr
        if name in OPTIMIZERS and OPTIMIZERS[name].elementwise:  # it takes every parameter itself
            companion_lr = None
        return Arm(lr=self.lr.get(name, tuned.lr), companion_lr=companion_lr, options=tuned.options)
