"""Memory of matrices that have served, for those that come after them."""

from math import prod

import torch
from torch import Tensor

# glibc gives blocks from here on back to the system however often they are needed, and then every page of a new one is
# a fault: 164,000 in an orthogonalization of one 4096 x 4096 matrix in bfloat16, 57,000 with this, which takes a tenth
# off its time (0.07 with two threads). Shorter blocks are kept by itself (`engine/chunks.py`, `keep_pages`), 2048 x
# 2048 gains nothing, and an accelerator's allocator keeps all of them.
_LEAST_BYTES = 32 * 2**20


class Spare:
    """What one calculation no longer needs, and needs again.

    Example:
        >>> spare = Spare()
        >>> spare.give(torch.zeros(2, 4096, 1024))
        >>> spare.take((4096, 4096)) is None, spare.take((1, 2048, 4096)).shape
        (True, torch.Size([1, 2048, 4096]))
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    def give(self, x: Tensor) -> None:
        """Nobody will read `x` again; where that pays, it is kept."""
        if torch.compiler.is_compiling() or x.device.type != "cpu" or x.nbytes < _LEAST_BYTES:
            return
        if not x.requires_grad and x.is_contiguous():
            self._blocks.append(x)

    def take(self, shape: tuple[int, ...]) -> Tensor | None:
        """The smallest block in which that many numbers fit, as a tensor of that shape; None: none does."""
        count = prod(shape)
        fitting = [k for k, x in enumerate(self._blocks) if x.numel() >= count]
        if not fitting:
            return None
        block = self._blocks.pop(min(fitting, key=lambda k: self._blocks[k].numel()))
        return block.view(-1)[:count].view(shape)
