"""Modules whose parameters are matrices, so that matrix optimizers apply to them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Conv1dFlatWeights"]


class Conv1dFlatWeights(nn.Conv1d):
    """A Conv1d with one parameter: the matrix (out, in / groups * kernel), with the bias as its last column.

    A convolution is a product of this matrix with patches of the input, and a bias is the weight of a constant input.
    Numbers, arguments and initial weights are those of `torch.nn.Conv1d`; `state_dict()` has `weight` only. The
    library's matrix optimizers take a convolution without a bias as it is.

    Args:
        *args: of `torch.nn.Conv1d`.
        **kwargs: of `torch.nn.Conv1d`; the padding mode can only be "zeros".

    Attributes:
        has_bias: whether the last column is a bias.

    Raises:
        ValueError: another padding mode.

    Example:
        >>> conv = Conv1dFlatWeights(4, 8, kernel_size=3)
        >>> conv.weight.shape, conv(torch.ones(1, 4, 10)).shape
        (torch.Size([8, 13]), torch.Size([1, 8, 8]))
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.padding_mode != "zeros":
            raise ValueError(
                f"Conv1dFlatWeights: padding_mode={self.padding_mode!r} is not allowed; give 'zeros', or pad the input"
            )
        self.has_bias = self.bias is not None
        self.weight = nn.Parameter(_flatten(self.weight, self.bias))
        self.bias = None

    @classmethod
    def from_conv1d(cls, conv1d: nn.Conv1d) -> "Conv1dFlatWeights":
        """The same convolution, with a copy of the weights."""
        flat = cls(
            conv1d.in_channels,
            conv1d.out_channels,
            kernel_size=conv1d.kernel_size,
            stride=conv1d.stride,
            padding=conv1d.padding,
            dilation=conv1d.dilation,
            groups=conv1d.groups,
            bias=conv1d.bias is not None,
            padding_mode=conv1d.padding_mode,
            device="meta",
        )
        flat.weight = nn.Parameter(_flatten(conv1d.weight, conv1d.bias), requires_grad=conv1d.weight.requires_grad)
        return flat

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        """Of the convolution's kernel: (out, in / groups, kernel)."""
        return (self.out_channels, self.in_channels // self.groups, self.kernel_size[0])

    def forward(self, x: Tensor) -> Tensor:
        """As `torch.nn.Conv1d`."""
        weight, bias = (self.weight[:, :-1], self.weight[:, -1]) if self.has_bias else (self.weight, None)
        kernel = weight.reshape(self.weight_shape)
        return F.conv1d(x, kernel, bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """As `torch.nn.Conv1d`, and the shape of the parameter."""
        base = super().extra_repr().removesuffix(", bias=False")  # type: ignore[no-untyped-call]  # untyped in torch
        return f"{base}, bias={self.has_bias}, flattened_param_shape={tuple(self.weight.shape)}"


def _flatten(weight: Tensor, bias: Tensor | None) -> Tensor:
    columns = [weight.detach().flatten(1)] + ([] if bias is None else [bias.detach()[:, None]])
    return torch.cat(columns, dim=1)
