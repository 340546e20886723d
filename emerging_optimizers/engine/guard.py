r"""Protection of every matrix against its own gradient: non-finite ones are skipped, spikes are scaled down.

A unit is a matrix for a matrix rule and a parameter for an element-wise rule. Its gradient's Frobenius norm
:math:`n_t` is compared with the running mean of the norms that it let through,

.. math::
    f_t = \min\!\left(1, \; c\,\bar n_{t-1} / n_t\right), \qquad
    \bar n_t = \text{bias-corrected average of } f_t n_t \text{ with decay } 0.95

and :math:`f_t G_t` is what enters momentum, factors and moments. A unit whose norm is not finite is skipped: its weight
and every part of its state, its step count included, stay as they are. All of it is decided on the device.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from emerging_optimizers.engine.buckets import Bucket

NonfiniteT = Literal["skip", "raise", "propagate"]
DECAY = 0.95


def decide(
    bucket: Bucket,
    members: Sequence[int],
    group: Mapping[str, Any],
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor | None:
    """By what the gradient of each unit is multiplied, 0: not at all; None: every member's by one.

    `total` sums over the processes among which a unit is spread.

    Updates the running means and the counters of the bucket. Where looking is free, on the CPU, nothing to do is None.
    """
    threshold, skips = group["spike_guard"], group["nonfinite"] == "skip"
    if threshold is None and not skips:
        return None
    norm = _unit_norms(bucket, members)
    if total is not None:
        norm = total(norm.double().square()).sqrt().to(norm.dtype)
    finite = norm.isfinite()
    everywhere = len(members) == len(bucket.parameters)
    if threshold is None and everywhere and bucket.looks and bool(finite.all()):
        return None

    factor = torch.ones_like(norm)
    index: Any = slice(None) if everywhere else bucket.units_of(members)
    if threshold is not None:
        mean, weight = bucket.guard["guard_norm"], bucket.guard["guard_weight"]
        limit = threshold * mean[index] / weight[index]  # no history: 0 / 0, which no norm exceeds
        spikes = finite & (norm > limit)
        factor = torch.where(spikes, limit / norm, factor)
        bucket.scaled[index] += spikes
        # A zero gradient (an expert without tokens) says nothing about the size of the next one.
        counts = finite & (norm > 0)
        for stack, new in ((mean, norm * factor), (weight, torch.ones_like(norm))):
            stack[index] = torch.where(counts, torch.lerp(stack[index], new, 1 - DECAY), stack[index])
    if skips:
        factor = torch.where(finite, factor, 0)
        bucket.skipped[index] += ~finite
    if bucket.looks and bool((factor == 1).all()):
        return None
    if everywhere:
        return factor
    return torch.zeros(bucket.units, dtype=factor.dtype, device=bucket.device).index_copy(0, index, factor)


def _unit_norms(bucket: Bucket, members: Sequence[int]) -> Tensor:
    grads = [bucket.blocks[i].of(g) for i in members if (g := bucket.parameters[i].grad) is not None]
    if bucket.item and any(bucket.items(i) > 1 for i in members):
        batches = [g.reshape(-1, *bucket.item) for g in grads]
        return torch.cat([torch.linalg.vector_norm(g, dim=(1, 2), dtype=bucket.dtype) for g in batches])
    return torch.stack(torch._foreach_norm(grads, 2, dtype=bucket.dtype))
