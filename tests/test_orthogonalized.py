"""What is special about each relative of Muon."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from emerging_optimizers import (
    MOP,
    AdaptiveMuon,
    Muon,
    MuonHyperball,
    Muown,
    OrthogonalizedOptimizer,
    PolarGrad,
    Scion,
    Spel,
)
from emerging_optimizers.orthogonalized_optimizers import (
    left_polargrad_orth_fn,
    one_sided_polargrad_orth_fn,
    polar_via_svd,
    right_polargrad_orth_fn,
    row_norm_fn,
)
from tests.reference import make_reference

F32 = {"fp32_matmul_prec": "highest"}


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def train(make, steps: int = 6, shapes=((6, 4), (4, 6), (5, 5))) -> list[torch.Tensor]:
    ps = [torch.nn.Parameter(gaussian(*shape, seed=i)) for i, shape in enumerate(shapes)]
    optimizer = make(ps)
    for t in range(steps):
        for i, p in enumerate(ps):
            p.grad = gaussian(*p.shape, seed=100 * t + i)
        optimizer.step()
    return [p.detach() for p in ps]


# Independent routes to the same numbers.
SAME = {
    "MuonHyperball is Muon with a hook": (
        lambda p: MuonHyperball(p, lr=0.1, hyperball_radius=3.0),
        lambda p: Muon(p, lr=0.1, weight_update_hook=("hyperball", 3.0)),
    ),
    "MOP with Muon's scale is Muon by SVD": (
        lambda p: MOP(p, lr=0.1, scale_mode="spectral"),
        lambda p: Muon(p, lr=0.1, orthogonalizer="svd"),
    ),
    "MOP is PolarGrad by SVD": (lambda p: MOP(p, lr=0.1), lambda p: PolarGrad(p, lr=0.1, orthogonalizer="svd")),
    "QDWH is the SVD": (
        lambda p: Muon(p, lr=0.1, orthogonalizer="qdwh"),
        lambda p: Muon(p, lr=0.1, orthogonalizer="svd"),
    ),
    "Gram Newton-Schulz is Newton-Schulz": (
        lambda p: Muon(p, lr=0.1, orthogonalizer="gram_newton_schulz"),
        lambda p: Muon(p, lr=0.1),
    ),
    "unconstrained Scion is Muon with the RMS-to-RMS scale": (
        lambda p: Scion(p, lr=0.1, weight_decay=0.0, spectral_radius=0.3),
        lambda p: Muon(p, lr=0.1, weight_decay=0.0, scale_mode="unit_rms_norm", extra_scale_factor=0.3),
    ),
    "NorMuon under a large floor is Muon": (
        lambda p: AdaptiveMuon(p, lr=0.1, orthogonalizer="svd", moment2_method="normuon", beta2=0.0, eps=1e9),
        lambda p: Muon(p, lr=0.1, orthogonalizer="svd"),
    ),
    "one-sided PolarGrad is PolarGrad": (
        lambda p: OrthogonalizedOptimizer(
            p, 0.1, 0.95, 0.01, nesterov=False, weight_decay_method="decoupled", fp32_matmul_prec="highest",
            scaled_orthogonalize_fn=left_polargrad_orth_fn,
        ),
        lambda p: PolarGrad(p, lr=0.1, orthogonalizer="svd"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_one_optimizer_is_another(name):
    one, other = SAME[name]
    shapes = ((4, 6), (3, 5)) if "one-sided" in name else ((6, 4), (4, 6), (5, 5))
    for a, b in zip(train(one, shapes=shapes), train(other, shapes=shapes), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


# ---- AdaptiveMuon ---------------------------------------------------------------------------------------------------


def update_rms(optimizer_options: dict, shape: tuple[int, int], steps: int) -> list[float]:
    p = torch.nn.Parameter(torch.zeros(shape))
    o = AdaptiveMuon([p], lr=1.0, weight_decay=0.0, **F32, **optimizer_options)
    sizes = []
    for t in range(steps):
        before, p.grad = p.detach().clone(), gaussian(*shape, seed=t, dtype=torch.float32)
        o.step()
        sizes.append((before - p.detach()).square().mean().sqrt().item())
    return sizes


@pytest.mark.parametrize("method", ["adamuon", "normuon"])
@pytest.mark.parametrize("shape", [(128, 64), (64, 128)])
def test_the_update_rms_is_one_from_the_first_step(method, shape):
    assert update_rms({"moment2_method": method}, shape, 5) == pytest.approx([1.0] * 5, rel=0.02)


def test_the_published_scale_of_adamuon_is_larger_by_the_root_of_the_longer_side():
    sizes = update_rms({"adamuon_scale": "published"}, (128, 64), 60)
    assert sizes[0] == pytest.approx(math.sqrt(128 / 0.05), rel=0.05)  # 1 / sqrt(1 - beta2) more in the first step
    assert sizes[-1] == pytest.approx(math.sqrt(128), rel=0.1)


def test_namo_refuses_l2_and_an_added_group_has_every_option():
    w = torch.nn.Parameter(torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"namo.*l2.*use 'decoupled'"):
        AdaptiveMuon([w], 0.1, moment2_method="namo", weight_decay_method="l2")
    o = AdaptiveMuon([w], 0.1)
    late = torch.nn.Parameter(torch.ones(3, 2))
    o.add_param_group({"params": [late], "beta2": 0.5, "moment2_method": "normuon"})
    late.grad = torch.randn(3, 2)
    o.step()
    assert o.state[late]["moment2_buffer"].shape == (3, 1)


def test_a_subclass_with_its_own_map_keeps_the_second_moment():
    class Signed(AdaptiveMuon):
        def orthogonalize(self, p, grad, **kwargs):
            return grad.sign()

    w = torch.nn.Parameter(torch.zeros(4, 2))
    o = Signed([w], lr=1.0, weight_decay=0.0, scale_mode="unit_rms_norm", adamuon_scale="published", beta2=0.75)
    w.grad = torch.ones(4, 2)
    o.step()
    torch.testing.assert_close(w.detach(), torch.full((4, 2), -2 * math.sqrt(2)))
    assert "moment2_buffer" in o.state[w]


# ---- Scion ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["row", "column", "rms", "sign"])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4,), ()])
def test_scions_norms_are_those_of_the_reference(norm, shape):
    p = torch.nn.Parameter(gaussian(*shape))
    if len(shape) < 2 and norm in ("row", "column"):
        with pytest.raises(ValueError, match="updates matrices"):
            Scion([p], norm=norm)
        return
    o, reference = Scion([p], lr=0.1, norm=norm, spectral_radius=2.0), make_reference(
        "scion", lr=0.1, norm=norm, spectral_radius=2.0
    )  # fmt: skip
    expected = p.detach().clone()
    for t in range(4):
        p.grad = gaussian(*shape, seed=t + 1)
        expected = reference.step(expected, p.grad)
        o.step()
    torch.testing.assert_close(p.detach(), expected)
    assert o.state[p]["momentum_buffer"].shape == shape


def test_a_whole_model_trains_with_scion_alone():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(12, 16), torch.nn.Linear(16, 16), torch.nn.Tanh())
    model.append(torch.nn.LayerNorm(16)).append(torch.nn.Linear(16, 12))
    o = Scion(
        [
            {"params": [model[0].weight], "norm": "row"},
            {"params": [model[1].weight]},
            {"params": [model[4].weight], "norm": "sign", "spectral_radius": 30.0},
            {"params": [p for p in model.parameters() if p.ndim < 2], "norm": "rms"},
        ],
        lr=0.05,
        **F32,
    )
    tokens = torch.arange(12)
    losses = []
    for _ in range(60):
        o.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(tokens), tokens.roll(1))
        loss.backward()
        o.step()
        losses.append(loss.item())
    assert losses[0] > 2
    assert losses[-1] < 0.3
    assert torch.linalg.matrix_norm(model[1].weight.detach(), 2) < 1.2  # Frank-Wolfe keeps it in the unit ball


# ---- the others -----------------------------------------------------------------------------------------------------


def test_hyperball_keeps_the_norm_under_weight_decay():
    p = torch.nn.Parameter(gaussian(8, 6, dtype=torch.float32))
    norm = p.detach().norm().item()
    o = MuonHyperball([p], lr=0.1)
    for t in range(100):
        p.grad = gaussian(8, 6, seed=t, dtype=torch.float32)
        o.step()
    assert p.detach().norm().item() == pytest.approx(norm, rel=1e-4)


def test_hyperball_refuses_a_zero_weight_without_a_radius():
    with pytest.raises(ValueError, match=r"'w' of shape \(3, 2\) is zero.*give hyperball_radius"):
        MuonHyperball([("w", torch.nn.Parameter(torch.zeros(3, 2)))])
    MuonHyperball([torch.nn.Parameter(torch.zeros(3, 2))], hyperball_radius=1.0)


def test_spel_keeps_the_weight_orthogonal():
    (w,) = train(lambda p: Spel(p, lr=0.3, orthogonalizer="svd"), shapes=((6, 4),))
    torch.testing.assert_close(w.T @ w, torch.eye(4, dtype=torch.float64))


def test_muown_controls_row_norms_by_g_and_starts_from_the_weight():
    p = torch.nn.Parameter(gaussian(5, 4))
    rows = p.detach().norm(dim=1, keepdim=True)
    o = Muown([p], lr=0.02, orthogonalizer="svd")
    p.grad = gaussian(5, 4, seed=1)
    o.step()
    g = o.state[p]["g"]
    torch.testing.assert_close(p.detach().norm(dim=1, keepdim=True), g)
    torch.testing.assert_close((g - rows).abs(), torch.full_like(g, 0.02), rtol=0, atol=1e-6)  # Adam's first step


def test_muown_moves_a_zero_row():
    p = torch.nn.Parameter(torch.zeros(3, 4))
    o = Muown([p], lr=0.1, **F32)
    for _ in range(5):
        p.grad = torch.ones(3, 4)
        o.step()
    assert p.isfinite().all()
    assert (p < -1e-2).all()


@pytest.mark.parametrize("center_rows", [False, True])
def test_row_norm(center_rows):
    x = gaussian(5, 3)
    expected = x - x.mean(0) if center_rows else x
    expected = 2 * expected / expected.norm(dim=1, keepdim=True)
    expected = expected - expected.mean(0) if center_rows else expected
    torch.testing.assert_close(row_norm_fn(x, center_rows=center_rows, extra_scale_factor=2.0), expected)
    assert row_norm_fn(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="takes one matrix"):
        row_norm_fn(torch.ones(3))


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (2, 4, 4)])
def test_one_sided_polar_factors(shape):
    x = gaussian(*shape)
    U, _, S = polar_via_svd(x)
    nuclear = S.sum(-1)[..., None, None]
    torch.testing.assert_close(right_polargrad_orth_fn(x), U * nuclear, rtol=0, atol=1e-5)
    torch.testing.assert_close(left_polargrad_orth_fn(x, alpha=0.0, extra_scale_factor=3.0), 3 * U, rtol=0, atol=1e-5)
    centered = one_sided_polargrad_orth_fn(x, side="right", center_rows=True)
    torch.testing.assert_close(centered.mean(dim=-2), torch.zeros_like(centered[..., 0, :]))
    with pytest.raises(ValueError, match="side='up'"):
        one_sided_polargrad_orth_fn(x, side="up")


def test_accuracy_chooses_the_steps() -> None:
    def update(**options: Any) -> Tensor:
        w = torch.nn.Parameter(torch.zeros(8, 8))
        w.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
        Muon([w], lr=1.0, momentum=0.0, weight_decay=0.0, extra_scale_factor=8**-0.5, **options).step()
        return torch.linalg.svdvals(w.detach())

    assert float((update(fp32_matmul_prec="highest", accuracy=1e-4) - 1).abs().max()) < 2e-4
    assert float((update(accuracy=0.15) - 1).abs().max()) < 0.15


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"accuracy": 1.0}, "in \\(0, 1\\)"),
        ({"accuracy": 0.01}, "fp32_matmul_prec='highest'"),
        ({"accuracy": 0.1, "orthogonalizer": "svd"}, "leave accuracy out"),
    ],
)
def test_an_accuracy_that_cannot_be_had_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Muon([torch.nn.Parameter(torch.zeros(4, 4))], **options)
