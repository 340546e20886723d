"""What a user is told once, since nothing else would show it."""

import warnings
from typing import Any

import torch

from emerging_optimizers.engine.units import LONG_STREAK


def warn_of_skips(owner: str, label: str, limit: float) -> None:
    """That a weight has not moved for a long time, as its gradients were not finite."""
    warnings.warn(
        f"{owner}: the gradient of {label} was not finite, its norm above {limit:.1e}, or a factorization failed, in "
        f"each of the last {LONG_STREAK} steps, and the weight has not moved since. guard_events() counts the skipped "
        "steps of all parameters; nonfinite='raise' stops at the first one",
        UserWarning,
        stacklevel=2,
    )


def warn_of_failure(owner: str, label: str) -> None:
    """That a matrix could not be factorized."""
    warnings.warn(
        f"{owner}: a factorization that the step of {label} takes has failed in float32 and in float64. The matrix "
        "keeps its weight and state, and sits out each step in which that happens (with overlap=True: each refresh); "
        "guard_events() counts them among the skipped ones; nonfinite='raise' stops at the first one",
        UserWarning,
        stacklevel=2,
    )


def warn_of_rounding(owner: str, index: int, lr: Any, dtype: torch.dtype, share: float) -> None:
    """That a low precision rounds the updates of a group away."""
    warnings.warn(
        f"{owner}: {share:.0%} of the weights in param_groups[{index}] that were looked at stayed where they were at "
        f"lr={float(lr):.3g}: in {dtype} an update below half a unit in the last place is rounded away. Give "
        "weight_rounding='stochastic' or, for bfloat16, 'compensated', or keep the weights in float32 and compute in "
        "low precision (torch.autocast, or FSDP's mixed precision)",
        UserWarning,
        stacklevel=2,
    )
