"""Chunks that are alike are run once and counted as often as there are: a long vector has thousands of them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from emerging_optimizers.cost.meter import Counts, Meter
from emerging_optimizers.engine import RuleOptimizer
from emerging_optimizers.engine.chunks import Chunk
from emerging_optimizers.engine.run import BucketStep


class Repeats:
    """Lets an optimizer without data pass over what it has done already.

    Args:
        optimizer: one whose tensors are fake; others are left alone.

    Attributes:
        meter: what counts now; None: nothing does.
    """

    def __init__(self, optimizer: Any) -> None:
        self.meter: Meter | None = None
        if isinstance(optimizer, RuleOptimizer):
            optimizer._bucket_step = partial(_OnceEach, self)

    def count(self, run: Callable[[], None]) -> Counts:
        """What a call has counted; it is taken out of the meter."""
        if self.meter is None:
            run()
            return Counts()
        with self.meter.apart() as counts:
            run()
        return counts


class _OnceEach(BucketStep):
    """A step of a bucket that runs one of several chunks which differ by their place alone."""

    def __init__(self, repeats: Repeats, *args: Any) -> None:
        super().__init__(*args)
        self._repeats = repeats
        self._alike: dict[Any, tuple[Counts, int]] = {}

    def take(self) -> None:
        super().take()
        if (meter := self._repeats.meter) is not None:
            for counts, times in self._alike.values():
                meter.counts.add(counts, times)

    def _take_chunk(
        self, chunk: Chunk, members: Mapping[int, Tensor], gradients: Mapping[int, Tensor], when: Any, *how: Any
    ) -> None:
        key = (when, self._kind(chunk, members))
        counts, times = self._alike.get(key, (None, 0))
        if counts is None:
            counts = self._repeats.count(partial(super()._take_chunk, chunk, members, gradients, when, *how))
        self._alike[key] = counts, times + 1

    def _kind(self, chunk: Chunk, members: Mapping[int, Tensor]) -> Any:
        """What the calls of a chunk depend on."""
        bucket = self.bucket

        def of_row(row: int) -> Any:
            p, grad = bucket.parameters[row], members.get(row)
            return p.shape, p.stride(), bucket.blocks[row], None if grad is None else (grad.dtype, grad.stride())

        segments = tuple((of_row(i), not start, stop - start) for i, start, stop in chunk)
        return segments, tuple(b - a for a, b in chunk.runs)
