"""Who enters the spike experiment: an optimizer by its name, as such or as a variant, and its published numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from emerging_optimizers.cli import UsageError
from emerging_optimizers.registry import entry

# The published experiment's settings; any other name of the registry runs with its own defaults.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "adamw": {"betas": (0.9, 0.95)},
    "laprop": {"betas": (0.9, 0.65)},
    "muon": {"momentum": 0.95},
    "soap": {"betas": (0.9, 0.95), "use_kl_shampoo": True},
    "rekls": {"betas": (0.9, 0.95)},
}
HAS_PUBLISHED_START = ("soap", "rekls")
GUARD = 2.0
DEFAULT_ARMS = (
    *("adamw", "adamw-guarded"),
    *("laprop", "laprop-guarded"),
    *("muon", "muon-guarded"),
    *("soap", "soap-published", "soap-guarded"),
    *("rekls", "rekls-published", "rekls-guarded"),
)

# Steps to recovery in the published notebook (optimizer-update-comparison, on a GPU), by optimizer, steps before the
# spike and size of the spike; SOAP has KL factors.
_SCALES = (1e2, 1e3, 1e4, 1e5)
RECOVERY: Mapping[str, Mapping[int, Mapping[float, int]]] = {
    optimizer: {at: dict(zip(_SCALES, steps, strict=True)) for at, steps in rows.items()}
    for optimizer, rows in {
        "adamw": {10: (7, 13, 26, 41), 50: (9, 19, 33, 46), 100: (15, 28, 44, 56)},
        "laprop": {10: (4, 4, 4, 4), 50: (1, 1, 1, 1), 100: (1, 1, 1, 1)},
        "muon": {10: (1, 1, 1, 1), 50: (1, 1, 1, 1), 100: (1, 1, 1, 1)},
        "soap": {10: (25, 43, 68, 89), 50: (27, 48, 74, 96), 100: (32, 56, 77, 80)},
        "rekls": {10: (26, 51, 72, 148), 50: (26, 54, 77, 98), 100: (33, 59, 80, 81)},
    }.items()
}


@dataclass(frozen=True, kw_only=True)
class SpikeArm:
    """How one optimizer enters the experiment, with a learning rate of 1 and no weight decay."""

    optimizer: str
    """A name from `eopt list`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the class."""


def find_arm(name: str, spike_guard: float = GUARD) -> SpikeArm:
    """The optimizer of a name, with the options of the published experiment and of the name's variants.

    Args:
        name: A name from `eopt list`; with "-guarded" it has the spike guard, with "-published" (SOAP, REKLS) the
            published start, with "-published-guarded" both.
        spike_guard: The guard's threshold in the guarded variants.

    Raises:
        UsageError: There is no such optimizer or variant.

    Example:
        >>> find_arm("muon-guarded").options
        {'momentum': 0.95, 'spike_guard': 2.0}
    """
    optimizer, _, variant = name.lower().partition("-")
    try:
        entry(optimizer)
    except ValueError as error:
        raise UsageError(f"{error}; --optimizers also takes NAME-guarded, soap-published and rekls-published") from None
    start, guard = {"first_step": "eigenbasis"}, {"spike_guard": spike_guard}
    variants: dict[str, dict[str, Any]] = {"": {}, "guarded": guard}
    if optimizer in HAS_PUBLISHED_START:
        variants |= {"published": start, "published-guarded": start | guard}
    if variant not in variants:
        known = ", ".join(f"{optimizer}-{x}" if x else optimizer for x in variants)
        raise UsageError(f"--optimizers names {name!r}; {optimizer} runs as {known}")
    return SpikeArm(optimizer=optimizer, options={**SETTINGS.get(optimizer, {}), **variants[variant]})
