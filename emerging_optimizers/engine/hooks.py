"""What is done to a weight around its update, for rules whose law constrains the weight itself."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class WeightHook(ABC):
    """Runs before and after the parameters of a bucket are written, in place and without reading a value."""

    @abstractmethod
    def before(self, parameters: list[Tensor]) -> Any:
        """What `after` needs to know about the weights before they move."""

    @abstractmethod
    def after(self, parameters: list[Tensor], context: Any) -> None:
        """Correct the new weights in place."""


class KeepNorm(WeightHook):
    """Give every parameter the Frobenius norm that it had before the update (0 if it has become 0)."""

    def before(self, parameters: list[Tensor]) -> list[Tensor]:
        """The norms, 0-D each."""
        return [torch.linalg.vector_norm(p, dtype=_wide(p)) for p in parameters]

    def after(self, parameters: list[Tensor], context: list[Tensor]) -> None:
        """W <- W ||W_old|| / ||W||."""
        for p, old in zip(parameters, context, strict=True):
            p.mul_(old / torch.linalg.vector_norm(p, dtype=_wide(p)).clamp_min(torch.finfo(old.dtype).tiny))


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)
