"""Values that go from the device to the host while neither waits for the other."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Transit(NamedTuple):
    """A tensor on its way to the host; on the CPU it is there at once."""

    host: Tensor
    arrived: Any  # a torch.Event, or None on the CPU

    @classmethod
    def send(cls, x: Tensor) -> "Transit":
        """Start the copy."""
        if x.device.type == "cpu":
            return cls(x, None)
        host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
        arrived = torch.Event(x.device)
        arrived.record()
        return cls(host, arrived)

    @property
    def ready(self) -> bool:
        """Whether `read` would not wait."""
        return self.arrived is None or self.arrived.query()

    def read(self) -> Tensor:
        """The values; waits for them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host
