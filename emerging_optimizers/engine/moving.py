"""How the weights of a chunk move: W <- keep W - lr direction, or as a law says."""

from collections.abc import Container, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from emerging_optimizers.engine.buckets import Bucket, as_dtype
from emerging_optimizers.engine.chunks import Chunk
from emerging_optimizers.engine.commit import Write
from emerging_optimizers.engine.fused import accepts, subtract_
from emerging_optimizers.engine.hooks import InPlaceLaw, Law
from emerging_optimizers.engine.weight_decay import cautious_keep, keep_factor
from emerging_optimizers.linalg.factorizations import Failures, noting


class Movement:
    """What holds for the weights of a bucket in one step.

    Attributes:
        lr: the learning rate, a number or a 0-D tensor.
        moves: whether it is other than zero, for all that the host knows.
        keep: what the weight is multiplied by.
        masks_decay: only some elements are.
        hook: the law; None: the ordinary one.
        failures: matrices that the law could not factorize in the last `writes`, which stay.
    """

    def __init__(self, hook: Law | None, group: Mapping[str, Any]) -> None:
        self.hook = hook
        self.lr: Any = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
        self.moves = isinstance(self.lr, Tensor) or self.lr != 0
        self.keep = keep_factor(group["weight_decay_method"], self.lr, group["weight_decay"])
        self.failures = Failures(looks=False)
        self.lets_in = group["nonfinite"] == "propagate"
        self.masks_decay = group["weight_decay_method"] == "cautious"

    def writes(
        self, bucket: Bucket, chunk: Chunk, members: Container[int], live: Tensor | None, direction: Tensor
    ) -> list[Write]:
        """W <- keep W - lr direction, or as the hook says; rounded once to the parameter's dtype.

        A law that modifies parameters in place moves here already, and takes its step back if it raises.
        """
        hook, lr = self.hook, self.lr
        if not self.moves:
            return []
        if bucket.hands_out:
            out = direction if live is None else torch.where(live, direction, stays(direction))
            return [partial(torch._foreach_copy_, *bucket.targets(chunk, out, members))]
        if live is None and self.is_plain:
            return self._subtract(bucket.dtype, *bucket.targets(chunk, direction, members))
        if isinstance(hook, InPlaceLaw):
            # One parameter, or one matrix of it. Of a rate that is a tensor the host reads here whether it is 0.
            if (live is None or bool(live.any())) and bool(lr):
                self._follow_law(hook, bucket.parameters[chunk[0].row], *bucket.targets(chunk, direction, members))
            return []
        old = bucket.stack(chunk, {row: bucket.parameters[row] for row, _, _ in chunk})
        if hook is None:
            new = old * self._keep_for(old, direction) - direction * lr
        else:
            with noting(bucket.looks) as self.failures:
                new = bucket.map_units(chunk, lambda w, u: hook.move(w, u, self._keep_for(w, u), lr), old, direction)
            if (failed := self.failures.mask(len(old), old.device)) is not None and not self.lets_in:
                sound = ~failed.view(-1, *(1 for _ in bucket.item))
                live = sound if live is None else live & sound
        if isinstance(lr, Tensor):  # at 0 nothing moves, and the host does not look
            live = lr != 0 if live is None else live & (lr != 0)
        new = new if live is None else torch.where(live, new, old)
        return [partial(torch._foreach_copy_, *bucket.targets(chunk, new, members))]

    @property
    def is_plain(self) -> bool:
        """Whether it is W <- keep W - lr direction with numbers."""
        return self.hook is None and not isinstance(self.lr, Tensor) and not self.masks_decay

    def _subtract(self, dtype: torch.dtype, parts: list[Tensor], directions: list[Tensor]) -> list[Write]:
        """W <- keep W - lr direction of parts of weights, computed in `dtype`."""
        if not parts:
            return []
        wide = as_dtype(parts, dtype)
        if not accepts(parts[0].device, chain(wide, directions)):  # copies, so that it is rounded alike
            wide, directions = ([x.contiguous() for x in xs] for xs in (wide, directions))
        if wide is parts:
            return subtract_(wide, directions, self.lr, self.keep)
        for write in subtract_(wide, directions, self.lr, self.keep):
            write()
        return [partial(torch._foreach_copy_, parts, wide)]

    def land(self, parts: list[Tensor], directions: list[Tensor], some_stay: bool) -> list[Write]:
        """The same for parts of weights whose directions were computed elsewhere, and handed out.

        Args:
            parts: of the weights.
            directions: shaped like them, in the dtype of the computation.
            some_stay: whether there may be elements among them that stay where they are.
        """
        if not self.moves or not parts:
            return []
        if self.is_plain and not some_stay:
            return self._subtract(directions[0].dtype, parts, directions)
        new = []
        for part, direction in zip(parts, directions, strict=True):
            old = part.to(direction.dtype)
            moved = old * self._keep_for(old, direction) - direction * self.lr
            live = ~are_marked(direction)
            new.append(torch.where(live & (self.lr != 0) if isinstance(self.lr, Tensor) else live, moved, old))
        return [partial(torch._foreach_copy_, parts, new)]

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


# What stands in a direction that is handed out, where the guard lets the weight stay: a NaN that no computation makes.
_MARKS = {torch.float32: (torch.int32, 0x7FC05EED), torch.float64: (torch.int64, 0x7FF8000000005EED)}


def stays(like: Tensor) -> Tensor:
    """The mark, 0-D."""
    integers, mark = _MARKS[like.dtype]
    return torch.tensor(mark, dtype=integers, device=like.device).view(like.dtype)


def are_marked(direction: Tensor) -> Tensor:
    """Where it stands."""
    integers, mark = _MARKS[direction.dtype]
    return direction.contiguous().view(integers) == mark
