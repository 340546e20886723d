"""What a user is told once, since nothing else would show it."""

import warnings
from collections.abc import Callable
from typing import Any

import torch

from emerging_optimizers.engine.rounding import MOST
from emerging_optimizers.engine.run import BucketStep
from emerging_optimizers.engine.units import LONG_STREAK


def tell(owner: str, name: Callable[[torch.Tensor], str], step: BucketStep, index: int, told: set[int]) -> None:
    """Warn of what the step of a bucket has shown for the first time.

    Args:
        owner: the optimizer.
        name: of a parameter.
        step: of a bucket, taken.
        index: of the group.
        told: groups whose rounding has been told; this one may join them.
    """
    bucket = step.bucket
    for row in step.failed_for_the_first_time():
        _warn_of_failure(owner, name(bucket.sources[row]))
    for row in bucket.skipped_for_long():
        _warn_of_skips(owner, name(bucket.sources[row]), step.rule.largest_norm(bucket.dtype))
    if (share := bucket.unmoved_share()) > MOST and index not in told:
        told.add(index)
        _warn_of_rounding(owner, index, step.group["lr"], bucket.param_dtype, share)


def _warn_of_skips(owner: str, label: str, limit: float) -> None:
    """That a weight has not moved for a long time, as its gradients were not finite."""
    warnings.warn(
        f"{owner}: the gradient of {label} was not finite, its norm above {limit:.1e}, or a factorization failed, in "
        f"each of the last {LONG_STREAK} steps, and the weight has not moved since. guard_events() counts the skipped "
        "steps of all parameters; nonfinite='raise' stops at the first one",
        UserWarning,
        stacklevel=3,
    )


def _warn_of_failure(owner: str, label: str) -> None:
    """That a matrix could not be factorized."""
    warnings.warn(
        f"{owner}: a factorization that the step of {label} takes has failed in float32 and in float64. The matrix "
        "keeps its weight and state, and sits out each step in which that happens (with overlap=True: each refresh); "
        "guard_events() counts them among the skipped ones; nonfinite='raise' stops at the first one",
        UserWarning,
        stacklevel=3,
    )


def _warn_of_rounding(owner: str, index: int, lr: Any, dtype: torch.dtype, share: float) -> None:
    """That a low precision rounds the updates of a group away."""
    warnings.warn(
        f"{owner}: {share:.0%} of the weights in param_groups[{index}] that were looked at stayed where they were at "
        f"lr={float(lr):.3g}: in {dtype} an update below half a unit in the last place is rounded away. Give "
        "weight_rounding='stochastic' or, for bfloat16, 'compensated', or keep the weights in float32 and compute in "
        "low precision (torch.autocast, or FSDP's mixed precision)",
        UserWarning,
        stacklevel=3,
    )
