"""`utils.modules.Conv1dFlatWeights` and `utils.SinkhornMapper`, against torch."""

import copy

import pytest
import torch
from torch import nn

from emerging_optimizers import Muon
from emerging_optimizers.utils import SinkhornMapper
from emerging_optimizers.utils.modules import Conv1dFlatWeights

CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "without_bias": {"kernel_size": 2, "bias": False},
    "depthwise": {"kernel_size": 4, "groups": 4, "padding": 3},
    "strided": {"kernel_size": 3, "stride": 2, "dilation": 2, "padding": "valid"},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("how", ["constructed", "converted"])
def test_it_is_torchs_convolution_forwards_and_backwards(options, how):
    torch.manual_seed(1)
    conv = nn.Conv1d(4, 8, **options)
    torch.manual_seed(1)
    flat = Conv1dFlatWeights(4, 8, **options) if how == "constructed" else Conv1dFlatWeights.from_conv1d(conv)
    x = torch.randn(2, 4, 12)
    torch.testing.assert_close(flat(x), conv(x), rtol=0, atol=0)

    flat(x).square().sum().backward()
    conv(x).square().sum().backward()
    columns = [conv.weight.grad.flatten(1)] + ([conv.bias.grad[:, None]] if conv.bias is not None else [])
    torch.testing.assert_close(flat.weight.grad, torch.cat(columns, dim=1))
    assert flat.weight_shape == tuple(conv.weight.shape)


def test_its_one_parameter_is_a_matrix_that_muon_updates():
    conv = Conv1dFlatWeights(4, 6, kernel_size=3)
    assert list(conv.state_dict()) == ["weight"]
    assert conv.weight.shape == (6, 4 * 3 + 1)
    assert "bias=True, flattened_param_shape=(6, 13)" in repr(conv)
    twin = copy.deepcopy(conv)
    optimizer = Muon(conv.parameters(), lr=0.1)
    conv(torch.randn(2, 4, 5)).sum().backward()
    optimizer.step()
    assert not torch.equal(conv.weight, twin.weight)
    twin.load_state_dict(conv.state_dict())
    assert torch.equal(conv.weight, twin.weight)


def test_a_conversion_copies_and_keeps_dtype_and_freezing():
    conv = nn.Conv1d(2, 3, 2, dtype=torch.float64).requires_grad_(False)
    flat = Conv1dFlatWeights.from_conv1d(conv)
    assert flat.weight.dtype == torch.float64
    assert not flat.weight.requires_grad
    flat.weight.zero_()
    assert conv.weight.all()


def test_other_padding_is_refused():
    with pytest.raises(ValueError, match="padding_mode='circular' is not allowed"):
        Conv1dFlatWeights(2, 3, 2, padding=1, padding_mode="circular")


@pytest.mark.parametrize(
    ("shape", "rows", "columns"), [((5, 5), 1, 1), ((4, 8), 2, 1), ((9, 3), 1, 3), ((2, 6, 3), 1, 2)]
)
def test_sinkhorn_gives_rows_and_columns_their_sums(shape, rows, columns):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = SinkhornMapper(num_iters=50)(x)
    torch.testing.assert_close(y.sum(-1), torch.full(shape[:-1], float(rows)))
    torch.testing.assert_close(y.sum(-2), torch.full((*shape[:-2], shape[-1]), float(columns)))
    assert (y > 0).all()


def test_sinkhorn_scales_rows_and_columns_of_the_exponential():
    """Y = diag(a) exp(X) diag(b): log Y - X has rank one."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = x.clone()
    difference = SinkhornMapper()(x).log() - x
    assert torch.equal(x, before)
    centred = difference - difference.mean(0) - difference.mean(1, keepdim=True) + difference.mean()
    torch.testing.assert_close(centred, torch.zeros_like(centred), rtol=0, atol=1e-12)


def test_sinkhorn_in_place_and_each_matrix_for_itself():
    stack = torch.stack([torch.zeros(3, 3), torch.full((3, 3), 500.0)])
    out = SinkhornMapper()(stack, inplace=True)
    assert out is stack
    torch.testing.assert_close(out, torch.full((2, 3, 3), 1 / 3))


def test_sinkhorn_refuses():
    with pytest.raises(ValueError, match=r"x has shape \(3,\)"):
        SinkhornMapper()(torch.zeros(3))
    with pytest.raises(ValueError, match="num_iters=-1"):
        SinkhornMapper(num_iters=-1)
    with pytest.raises(ValueError, match=r"eps=0\.0"):
        SinkhornMapper(eps=0.0)
