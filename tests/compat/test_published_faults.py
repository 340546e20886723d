"""Faults of the published library that no other test here holds gone.

The rest, with the test that does: the second update of SOAP (`test_reductions`), low-precision parameters and their
resumption (`test_conformance`), ObliqueAdam's first step (`test_riemannian`), AdaptiveMuon's scale and its added
groups, the norm on the hyperball (`test_orthogonalized`), PSGDPro's step size (`test_psgd`), coefficient sets at other
lengths, matrices of any scale and zero ones (`linalg/test_newton_schulz`), normalize_in_double of zeros
(`test_newton_schulz_tp`), triton at import (`test_package`), gradients that are not finite (`engine/test_guard`),
vectors, ranges, closures and options by group (`test_conformance`), a hook beside MuonHyperball's (`test_hooks`), a
module that registers twice (`test_registry`), assertions as errors (`test_scalar_functions`, `test_utils_modules`).
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emerging_optimizers import MOP, REKLS, SOAP, Muon, TpRekls
from emerging_optimizers.linalg.emulation import emulate_tf32
from emerging_optimizers.linalg.kronecker import conjugate_diagonal
from emerging_optimizers.registry import OPTIMIZERS, get_configured_optimizer_cls
from emerging_optimizers.scalar_optimizers import calculate_ademamix_update


def gradient(t: int, shape: tuple[int, ...] = (32, 16)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(t))


def rms_of_updates(optimizer: torch.optim.Optimizer, p: Tensor, steps: int, spike: dict[int, float]) -> list[float]:
    found = []
    for t in range(steps):
        before = p.detach().clone()
        p.grad = gradient(t, tuple(p.shape)) * spike.get(t, 1.0)
        optimizer.step()
        found.append((p.detach() - before).square().mean().sqrt().item())
    return found


@pytest.mark.parametrize(
    "make", [SOAP, lambda ps, **o: SOAP(ps, use_kl_shampoo=True, **o), REKLS], ids=["soap", "kl", "rekls"]
)
def test_the_second_moment_follows_the_basis_that_turns_after_a_spike(make):
    """Published: it stays, and an update after the spike is 37 (REKLS) or 157 (KL) times the largest before."""
    p = nn.Parameter(torch.zeros(32, 16))
    rms = rms_of_updates(make([p], lr=1.0, weight_decay=0.0), p, 120, {30: 1e5})
    assert max(rms[30:]) < 2 * max(rms[5:30])


@pytest.mark.parametrize("make", [lambda ps, **o: SOAP(ps, use_kl_shampoo=True, **o), REKLS], ids=["kl", "rekls"])
def test_the_first_gradient_does_not_rule_a_kl_factor(make):
    """Published: L is the first Gram matrix over eps, and 360 steps later still what is left of it."""
    p = nn.Parameter(torch.zeros(32, 16))
    optimizer = make([p], lr=1.0, weight_decay=0.0)
    rms_of_updates(optimizer, p, 60, {})
    L, first = optimizer.state[p]["L"], gradient(0) @ gradient(0).mT
    assert (L * first).sum() / (L.norm() * first.norm()) < 0.8
    assert L.diagonal().mean() < 10


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: SOAP(ps, lr=0.1, use_kl_shampoo=True, fp32_matmul_prec="medium", qr_fp32_matmul_prec="medium"),
        lambda ps: REKLS(ps, lr=0.1, fp32_matmul_prec="high"),
        lambda ps: TpRekls(ps, lr=0.1, tp_group=None),
    ],
    ids=["kl", "rekls", "tp_rekls"],
)
def test_eigenvalues_are_formed_in_full_float32_at_any_precision(make):
    """Under emulated TF32 they are still those of the state's own factors and bases."""
    p = nn.Parameter(torch.zeros(32, 16))
    optimizer = make([p])
    with emulate_tf32():
        rms_of_updates(optimizer, p, 5, {})
    state = optimizer.state[p]
    for side in ("L", "R"):
        true = conjugate_diagonal(state[side].double(), state[f"Q_{side}"].double())
        assert (state[f"eigvals_{side}"] - true).abs().max() < 2e-6 * true.max()


def test_rekls_lets_its_precisions_be_chosen():
    group = REKLS([nn.Parameter(torch.zeros(2, 2))], 0.1, fp32_matmul_prec="medium", qr_fp32_matmul_prec="highest")
    assert (group.fp32_matmul_prec, group.qr_fp32_matmul_prec) == ("medium", "highest")


def test_a_fast_momentum_of_zero_is_the_gradient():
    """Published, June: beta 0 left the buffer as it was."""
    grad, fast = gradient(0), torch.ones(32, 16)
    calculate_ademamix_update(
        grad, fast, torch.zeros(32, 16), torch.zeros(32, 16), betas=(0.0, 0.999, 0.9999), eps=1e-8, correct_bias=True,
        step=1, num_beta_slow_warmup_steps=None, num_alpha_warmup_steps=None,
    )  # fmt: skip
    torch.testing.assert_close(fast, grad)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_registered_class_can_be_configured(name):
    """Published: MuonHyperball and SinkhornMuon took no argument by name but their own two."""
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
    if name in ("scion",):
        del options["weight_decay"]
    make = get_configured_optimizer_cls(name, **options)
    p = nn.Parameter(torch.eye(4))
    assert make([p]).param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("cls", [Muon, SOAP, MOP])
def test_a_grad_scaler_skips_a_step_and_goes_on(cls):
    p = nn.Parameter(gradient(0))
    optimizer = cls([p], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=10**6)
    before = p.detach().clone()
    scaler.scale((p * 1e30).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(p, before)
    optimizer.zero_grad()
    scaler.scale((p * gradient(1)).sum()).backward()
    scaler.step(optimizer)
    assert p.isfinite().all()
    assert not torch.equal(p, before)


def test_a_table_of_ten_thousand_rows_has_no_factor_of_its_rows():
    p = nn.Parameter(torch.zeros(10_001, 3))
    optimizer = SOAP([p], lr=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[p].keys() == {"step", "exp_avg", "exp_avg_sq", "R", "Q_R"}
