"""SPlus where its sign is up to rounding, and bases that outlive a zero gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor

from emerging_optimizers import KLShampoo, SPlus


def low_rank(t: int, left: Tensor, right: Tensor) -> Tensor:
    core = torch.randn(left.size(1), right.size(0), generator=torch.Generator().manual_seed(t))
    return left @ core @ right


@pytest.mark.parametrize("options", [{}, {"precondition_frequency": 1}, {"use_eigh": False}], ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (32, 64)])
def test_the_weight_moves_only_where_gradients_have_been(shape: tuple[int, int], options: dict[str, Any]) -> None:
    """The sign of what rounding leaves would be a step like any other: at rank 4, 16 times as long as the rest."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(shape[0], 4, generator=generator), torch.randn(4, shape[1], generator=generator)
    p = torch.nn.Parameter(torch.zeros(shape))
    optimizer = SPlus([p], lr=0.1, **options)
    for t in range(6):
        p.grad = low_rank(t, left, right)
        if t == 1:
            start = p.detach().clone()  # the first step is in the identity
        optimizer.step()
    moved = p.detach() - start
    basis = torch.linalg.qr(left).Q
    inside = basis @ (basis.mT @ moved)
    assert (moved - inside).norm() < inside.norm()


@pytest.mark.parametrize("use_eigh", [True, False])
@pytest.mark.parametrize("cls", [SPlus, KLShampoo])
def test_a_basis_outlives_a_zero_gradient_without_momentum(cls: Any, use_eigh: bool) -> None:
    """What the momentum has forgotten the factors still know; an expert without a token gets a gradient of zeros."""
    p = torch.nn.Parameter(torch.zeros(6, 6))
    optimizer = cls([p], lr=0.1, momentum=0.0, use_eigh=use_eigh, precondition_frequency=1)
    for t in range(8):
        p.grad = torch.randn(6, 6, generator=torch.Generator().manual_seed(t)) * (t != 5)
        optimizer.step()
        assert torch.equal(optimizer.state[p]["Q_L"], torch.eye(6)) == (t == 0)


def test_zero_gradients_before_the_first_leave_the_identity() -> None:
    p = torch.nn.Parameter(torch.zeros(6, 6))
    optimizer = SPlus([p], lr=0.1, precondition_frequency=1)
    for t in range(4):
        p.grad = torch.randn(6, 6, generator=torch.Generator().manual_seed(t)) * (t > 1)
        optimizer.step()
        assert torch.equal(optimizer.state[p]["Q_L"], torch.eye(6)) == (t < 3)
