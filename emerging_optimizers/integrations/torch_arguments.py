"""Arguments of `torch.optim`'s classes, in this library's words."""

from emerging_optimizers.routing.torch_arguments import from_torch

__all__ = ["from_torch"]
