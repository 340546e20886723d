"""How the weights of a chunk move: W <- keep W - lr direction, or as a law says."""

from collections.abc import Container, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from emerging_optimizers.engine.buckets import Bucket
from emerging_optimizers.engine.chunks import Chunk
from emerging_optimizers.engine.commit import Write
from emerging_optimizers.engine.fused import accepts, subtract_
from emerging_optimizers.engine.hooks import InPlaceLaw, Law
from emerging_optimizers.engine.weight_decay import cautious_keep, keep_factor


class Movement:
    """What holds for the weights of a bucket in one step.

    Attributes:
        lr: the learning rate, a number or a 0-D tensor.
        moves: whether it is other than zero, for all that the host knows.
        keep: what the weight is multiplied by.
        masks_decay: only some elements are.
        hook: the law; None: the ordinary one.
    """

    def __init__(self, bucket: Bucket, hook: Law | None, group: Mapping[str, Any]) -> None:
        self.bucket, self.hook = bucket, hook
        self.lr: Any = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
        self.moves = isinstance(self.lr, Tensor) or self.lr != 0
        self.keep = keep_factor(group["weight_decay_method"], self.lr, group["weight_decay"])
        self.masks_decay = group["weight_decay_method"] == "cautious"

    def writes(self, chunk: Chunk, members: Container[int], live: Tensor | None, direction: Tensor) -> list[Write]:
        """W <- keep W - lr direction, or as the hook says; rounded once to the parameter's dtype.

        A law that modifies parameters in place moves here already, and takes its step back if it raises.
        """
        bucket, hook, lr, keep = self.bucket, self.hook, self.lr, self.keep
        if not self.moves:
            return []
        if hook is None and live is None and not isinstance(lr, Tensor) and not self.masks_decay:
            parts, directions = bucket.targets(chunk, direction, members)
            wide = bucket.wide(parts)
            if not accepts(bucket.device, chain(wide, directions)):  # copies, so that it is rounded alike
                wide, directions = ([x.contiguous() for x in xs] for xs in (wide, directions))
            if wide is parts:
                return subtract_(wide, directions, lr, keep)
            for write in subtract_(wide, directions, lr, keep):
                write()
            return [partial(torch._foreach_copy_, parts, wide)]
        if isinstance(hook, InPlaceLaw):
            if live is None or bool(live.any()):  # one parameter, or one matrix of it
                self._follow_law(hook, bucket.parameters[chunk[0].row], *bucket.targets(chunk, direction, members))
            return []
        old = bucket.stack(chunk, {row: bucket.parameters[row] for row, _, _ in chunk})
        if hook is None:
            new = old * self._keep_for(old, direction) - direction * lr
        else:
            new = bucket.map_units(chunk, lambda w, u: hook.move(w, u, self._keep_for(w, u), lr), old, direction)
        if isinstance(lr, Tensor):  # at 0 nothing moves, and the host does not look
            live = lr != 0 if live is None else live & (lr != 0)
        new = new if live is None else torch.where(live, new, old)
        return [partial(torch._foreach_copy_, *bucket.targets(chunk, new, members))]

    def _keep_for(self, weight: Tensor, direction: Tensor) -> Any:
        """What the weight is multiplied by: a number, or with cautious decay one for each element."""
        return cautious_keep(self.keep, weight, direction) if self.masks_decay else self.keep

    def _follow_law(self, law: InPlaceLaw, p: Tensor, parts: list[Tensor], directions: list[Tensor]) -> None:
        before = [part.clone() for part in parts]
        try:
            for part, direction in zip(parts, directions, strict=True):
                direction = direction.view(part.shape)
                law.step(p if part.shape == p.shape else part, direction, self._keep_for(part, direction), self.lr)
        except BaseException:
            torch._foreach_copy_(parts, before)
            raise
