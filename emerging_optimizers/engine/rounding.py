"""Weights of a low precision whose updates are rounded away: an update below half a unit in the last place is lost."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from emerging_optimizers.engine.buckets import Bucket
from emerging_optimizers.engine.transit import Transit

# In which of its steps a bucket is looked at: behind the first ones, and where rates have warmed up and decayed.
LOOKS_AT = (16, 256, 4096)
# How many numbers of a parameter are looked at, and which share of them may stay where it is.
SAMPLE = 2**14
MOST = 0.75


class Watched(NamedTuple):
    """Some weights of a bucket before a step, and whether their gradients are other than zero."""

    now: Tensor
    before: Tensor
    pushed: Tensor

    def unmoved(self) -> Transit:
        """The share of them that the step has left where they were, on its way to the host."""
        same = (self.now == self.before) & self.pushed
        return Transit.send(same.sum() / self.pushed.sum().clamp_min(1))


def watch(bucket: Bucket, gradients: Mapping[int, Tensor]) -> Watched | None:
    """A look at the row with the most numbers, in those few steps in which it is taken."""
    if bucket.param_dtype not in (torch.bfloat16, torch.float16) or bucket.capturable:
        return None
    if max(bucket.counts) + 1 not in LOOKS_AT:
        return None
    i = max(gradients, key=lambda i: bucket.parameters[i].numel())
    p = bucket.parameters[i]
    if not p.is_contiguous():
        return None
    part = p.detach().view(-1)[:SAMPLE]
    return Watched(part, part.clone(), gradients[i].reshape(-1)[:SAMPLE] != 0)
