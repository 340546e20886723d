"""Work for the next step: a CUDA device does it on a stream of its own, beside the model; others do it at once."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor


class Ahead:
    """What an optimizer has under way. A reader of its state waits first; the host never waits."""

    def __init__(self) -> None:
        self.streams: dict[torch.device, torch.cuda.Stream] = {}

    @contextmanager
    def beside(self, tensors: Iterable[Tensor]) -> Iterator[Callable[[], AbstractContextManager[object]]]:
        """Launch work on tensors of one device, which starts when what was launched so far is done.

        Yields the context for what goes on behind that work.
        """
        tensors = list(tensors)
        # A tensor without data (`estimate`) says "cuda" too, where there may be no such device.
        device = tensors[0].untyped_storage().device
        if device.type != "cuda":
            yield nullcontext
            return
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # untyped in torch
        side = self.streams[device]
        side.wait_stream(torch.cuda.current_stream(device))
        for x in tensors:  # their memory is given to nobody else before this is done, whoever drops them meanwhile
            x.record_stream(side)
        with torch.cuda.stream(side):
            yield partial(torch.cuda.stream, side)

    def wait(self) -> None:
        """Make the current streams wait for the side streams."""
        for device, side in self.streams.items():
            torch.cuda.current_stream(device).wait_stream(side)
