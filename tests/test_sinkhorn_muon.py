"""SinkhornMuon keeps rows and columns at their sums, descends, and does not forget a weight without a gradient."""

import pytest
import torch
from torch import Tensor, nn

from emerging_optimizers.orthogonalized_optimizers import SinkhornMuon
from emerging_optimizers.utils import SinkhornMapper

SHAPES = [(6, 6), (8, 4), (4, 8), (3, 5, 5)]


def weight(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(SinkhornMapper(50)(torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype))


def is_balanced(w: Tensor, tolerance: float) -> bool:
    m, n = w.shape[-2:]
    rows, columns = w.sum(-1) - max(1, n / m), w.sum(-2) - max(1, m / n)
    return bool((w >= 0).all() and rows.abs().max() < tolerance and columns.abs().max() < tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("execution", ["stacked", "per_matrix"])
def test_it_descends_on_balanced_matrices(shape: tuple[int, ...], execution: str) -> None:
    w, target = weight(shape), weight(shape, seed=1).detach()
    optimizer = SinkhornMuon([w], lr=0.2, weight_decay=0.0, momentum=0.8, execution=execution)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=150)
    first = float((w.detach() - target).square().mean())
    for _ in range(150):
        optimizer.zero_grad()
        (w - target).square().mean().backward()
        optimizer.step()
        scheduler.step()
        assert is_balanced(w.detach(), 0.02)
    assert float((w.detach() - target).square().mean()) < 0.05 * first


@pytest.mark.parametrize("law", ["logarithmic", "published"])
def test_one_step_is_the_map_of_its_law(law: str) -> None:
    w = weight((6, 4), dtype=torch.float64)
    before = w.detach().clone()
    w.grad = torch.randn(6, 4, dtype=torch.float64)
    optimizer = SinkhornMuon([w], lr=0.1, weight_decay=0.5, law=law, fp32_matmul_prec="highest")
    optimizer.step()
    N = 0.05 * w.grad
    x = N / N.norm()
    for a, b, c in ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                    (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)):  # fmt: skip
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    start = before if law == "published" else before.log()
    torch.testing.assert_close(w.detach(), SinkhornMapper()(start * 0.95 - 0.1 * 6**0.5 * x), rtol=1e-4, atol=1e-6)


def test_only_the_published_law_forgets_a_weight_without_a_gradient() -> None:
    away = {}
    for law in ("logarithmic", "published"):
        w = weight((6, 6))
        before = w.detach().clone()
        optimizer = SinkhornMuon([w], lr=0.1, weight_decay=0.0, law=law)
        for _ in range(3):
            w.grad = torch.zeros_like(w)
            optimizer.step()
        away[law] = float((w.detach() - before).norm() / (before - 1 / 6).norm())
    assert away["logarithmic"] < 1e-3
    assert away["published"] > 0.95


def test_low_precision_weights_stay_balanced() -> None:
    w = weight((6, 6), dtype=torch.bfloat16)
    optimizer = SinkhornMuon([w], lr=0.1)
    for _ in range(10):
        w.grad = torch.randn(6, 6).bfloat16()
        optimizer.step()
    assert is_balanced(w.detach().float(), 0.02)


def test_weights_that_the_map_has_not_made_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'mix' of shape \(2, 2\) has negative entries, down to -1"):
        SinkhornMuon([("mix", nn.Parameter(-torch.eye(2)))])
    with pytest.raises(ValueError, match=r"rows that should sum to 1 .* off by 1; .*=0.1 is allowed"):
        SinkhornMuon([nn.Parameter(torch.ones(2, 2))])
    SinkhornMuon([nn.Parameter(torch.ones(2, 2))], doubly_stochastic_tolerance=1.5)
    with pytest.raises(ValueError, match="num_iters=0"):
        SinkhornMuon([weight((2, 2))], num_iters=0)
