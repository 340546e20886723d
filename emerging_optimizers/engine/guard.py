r"""Protection of every matrix against its own gradient: non-finite ones are skipped, spikes are scaled down.

A unit is a matrix for a matrix rule and a parameter for an element-wise rule. Its gradient's Frobenius norm
:math:`n_t` is compared with the running mean of the norms that it let through,

.. math::
    f_t = \min\!\left(1, \; c\,\bar n_{t-1} / n_t\right), \qquad
    \bar n_t = \text{bias-corrected average of } f_t n_t \text{ with decay } 0.95

and :math:`f_t G_t` is what enters momentum, factors and moments. A unit whose norm is not finite, or so large that the
step would overflow (`Rule.largest_norm`), is skipped: its weight and every part of its state, its step count included,
stay as they are. All of it is decided on the device. A matrix that could not be factorized in the step sits it out in
the same way (`sit_out`), which is known only when the rule has run.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emerging_optimizers.engine.buckets import Bucket
from emerging_optimizers.engine.rule import Rule

DECAY = 0.95


class Decision(NamedTuple):
    """What the guard makes of the gradients of a bucket; all tensors run over its units.

    Attributes:
        factor: by what each gradient is multiplied, 0: not at all; None: by one, every one of them.
        news: what becomes of the bucket's running means and counters, by name, when the step is taken.
    """

    factor: Tensor | None
    news: Mapping[str, Tensor]


def decide(bucket: Bucket, members: Sequence[int], group: Mapping[str, Any], rule: Rule) -> Decision | None:
    """A decision for the gradients of `members`, which changes nothing yet; None: there is nothing to do.

    Processes among which units are spread decide the same, by `sum_norms`.
    """
    threshold, skips = group["spike_guard"], group["nonfinite"] == "skip"
    if threshold is None and not skips:
        return None
    norm = _unit_norms(bucket, members) if bucket.total is None else bucket.norms
    sound = norm <= rule.largest_norm(bucket.dtype)  # which no NaN is
    everywhere = len(members) == len(bucket.parameters)
    if threshold is None and everywhere and bucket.looks and bool(sound.all()):
        return None

    index: Any = slice(None) if everywhere else bucket.units_of(members)
    factor = torch.ones_like(norm)
    new: dict[str, Tensor] = {}
    if threshold is not None:
        mean, weight = bucket.guard["guard_norm"][index], bucket.guard["guard_weight"][index]
        limit = threshold * mean / weight  # no history: 0 / 0, which no norm exceeds
        spikes = sound & (norm > limit)
        factor = torch.where(spikes, limit / norm, factor)
        new["scaled"] = bucket.scaled[index] + spikes
        # A zero gradient (an expert without tokens) says nothing about the size of the next one.
        counts = sound & (norm > 0)
        for name, old, seen in (("guard_norm", mean, norm * factor), ("guard_weight", weight, torch.ones_like(norm))):
            new[name] = torch.where(counts, torch.lerp(old, seen, 1 - DECAY), old)
    if skips:
        factor = torch.where(sound, factor, 0)
        new["skipped"] = bucket.skipped[index] + ~sound
        new["streak"] = torch.where(sound, 0, bucket.streak[index] + 1)
    plain = bucket.looks and bool((factor == 1).all())  # where looking is free
    if everywhere:
        return Decision(None if plain else factor, new)
    news = {name: bucket.guard_stacks[name].index_copy(0, index, value) for name, value in new.items()}
    return Decision(None if plain else factor.new_zeros(bucket.units).index_copy(0, index, factor), news)


def sum_norms(buckets: Iterable[tuple[Bucket, Mapping[str, Any]]]) -> None:
    """The norms of units that are spread over processes, for all buckets that a guard looks at, with their groups.

    They are summed up at once, before the first bucket moves: where a process cannot go on with one, nobody waits for
    it at the next.
    """
    asked: dict[Any, list[tuple[Bucket, Tensor]]] = {}
    for bucket, group in buckets:
        if bucket.total is None or (group["spike_guard"] is None and group["nonfinite"] != "skip"):
            continue
        if members := [*bucket.gradients()]:
            asked.setdefault((bucket.total, bucket.device), []).append((bucket, _unit_norms(bucket, members)))
    for (total, _), some in asked.items():
        sums = total(torch.cat([norm.double().square() for _, norm in some]))
        for (bucket, norm), squares in zip(some, torch.split(sums, [len(norm) for _, norm in some]), strict=True):
            bucket.norms = squares.sqrt().to(norm.dtype)


def sit_out(bucket: Bucket, members: Sequence[int], decision: Decision, failed: Tensor, stale: Tensor) -> Decision:
    """The decision with units that could not be factorized, (units,): they are counted as skipped.

    Args:
        bucket: of the step.
        members: the rows with a gradient.
        decision: without them.
        failed: those that sit the step out; the guard's running means do not see their gradients.
        stale: those whose step was taken, and whose refresh behind it was not.
    """
    factor, stacks, here = decision.factor, bucket.guard_stacks, bucket.units_of(members)
    if factor is None:
        factor = torch.zeros(bucket.units, dtype=bucket.dtype, device=bucket.device).index_fill(0, here, 1)
    new = {"streak": stacks["streak"].index_fill(0, here, 0), **decision.news}
    news = {name: torch.where(failed, old, new.get(name, old)) for name, old in stacks.items()}
    news["skipped"] = news["skipped"] + (failed | stale)
    news["streak"] = news["streak"] + failed
    return Decision(torch.where(failed, 0, factor), news)


def _unit_norms(bucket: Bucket, members: Sequence[int]) -> Tensor:
    grads = [bucket.blocks[i].of(g) for i in members if (g := bucket.shares[i].grad) is not None]
    if bucket.item and any(bucket.items(i) > 1 for i in members):
        batches = [g.reshape(-1, *bucket.item) for g in grads]
        return torch.cat([torch.linalg.vector_norm(g, dim=(1, 2), dtype=bucket.dtype) for g in batches])
    return torch.stack(torch._foreach_norm(grads, 2, dtype=bucket.dtype))
