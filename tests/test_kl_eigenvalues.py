"""The eigenvalues in the state of a KL rule are those of its own factors in its own bases, however they came there."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emerging_optimizers import REKLS, SOAP
from emerging_optimizers.linalg.kernels import routes
from emerging_optimizers.linalg.kronecker import conjugate_diagonal
from emerging_optimizers.soap.kl_shampoo import KLShampoo
from emerging_optimizers.soap.soap_muon import SOAPMuon

MODES: dict[str, dict[str, Any]] = {
    "qr": {},
    "eigh": {"use_eigh": True},
    "eigh_without_floor": {"use_eigh": True, "relative_floor": 0.0},
    "two_iterations": {"power_iter_steps": 2},
    "every_third": {"precondition_frequency": 3},
    "eigh_every_third": {"use_eigh": True, "precondition_frequency": 3},
    "overlap": {"overlap": True},
    "overlap_every_third": {"overlap": True, "precondition_frequency": 3},
    "one_sided": {"max_precond_dim": 6},
    "cholesky": {},
}


def kl_soap(ps: Any, **options: Any) -> SOAP:
    return SOAP(ps, lr=0.1, use_kl_shampoo=True, **options)


def rekls(ps: Any, **options: Any) -> REKLS:
    return REKLS(ps, lr=0.1, **options)


def published_start(ps: Any, **options: Any) -> SOAP:
    return kl_soap(ps, first_step="eigenbasis", **options)


def kl_soap_muon(ps: Any, **options: Any) -> SOAPMuon:
    return SOAPMuon(ps, lr=0.1, use_kl_shampoo=True, **options)


def kl_shampoo(ps: Any, **options: Any) -> KLShampoo:
    return KLShampoo(ps, lr=0.1, **options)


def gradient(t: int, dtype: torch.dtype, shape: tuple[int, ...] = (3, 8, 6)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(t), dtype=dtype)


def amiss(state: dict[str, Tensor]) -> float:
    """The largest error, relative to the largest eigenvalue of each factor, over both sides."""
    sides = [side for side in ("L", "R") if side in state]
    assert {f"eigvals_{side}" for side in sides} == {key for key in state if key.startswith("eigvals")}
    worst = 0.0
    for side in sides:
        true = conjugate_diagonal(state[side].double(), state[f"Q_{side}"].double())
        error = (state[f"eigvals_{side}"].double() - true).abs().amax(dim=-1)
        worst = max(worst, float((error / true.amax(dim=-1).clamp_min(1e-30)).max()))
    return worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make", [kl_soap, published_start, kl_soap_muon, kl_shampoo])
@pytest.mark.parametrize("mode", MODES)
def test_they_are_those_of_the_state_s_own_factors_and_bases(mode, make, dtype, monkeypatch):
    if make is published_start and "overlap" in mode:
        return  # refused
    if mode == "cholesky":
        monkeypatch.setitem(routes.ORTHONORMALIZERS, "cpu", "cholesky")
    p = nn.Parameter(gradient(0, dtype))
    optimizer = make([p], **MODES[mode])
    for t in range(1, 13):
        # One matrix is without a gradient at first and, in the middle, for long enough to be skipped by a refresh.
        p.grad = gradient(t, dtype)
        if t < 3 or 6 < t < 9:
            p.grad[1] = 0
        optimizer.step()
        assert amiss(optimizer.state[p]) < (2e-6 if dtype == torch.float32 else 1e-14), t


@pytest.mark.parametrize("make", [kl_soap, rekls, kl_shampoo])
def test_they_are_right_after_a_spike(make):
    p = nn.Parameter(gradient(0, torch.float32, (96, 64)))
    optimizer = make([p])
    for t in range(1, 30):
        p.grad = gradient(t, torch.float32, (96, 64)) * (1e5 if t == 6 else 1)
        optimizer.step()
        assert amiss(optimizer.state[p]) < 2e-6
        assert all(x.min() > -1e-6 * x.max() for key, x in optimizer.state[p].items() if key.startswith("eigvals"))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("use_eigh", [False, True])
def test_a_basis_that_is_kept_because_no_moment_has_seen_a_gradient_has_its_own(use_eigh, momentum):
    """KL-Shampoo without momentum forgets in one step that it has seen gradients."""
    p = nn.Parameter(gradient(0, torch.float64))
    optimizer = kl_shampoo([p], use_eigh=use_eigh, momentum=momentum)
    for t in range(1, 8):
        p.grad = gradient(t, torch.float64) * (t != 5)
        optimizer.step()
        assert amiss(optimizer.state[p]) < 1e-14, t


def test_soap_without_kl_keeps_none():
    p = nn.Parameter(gradient(0, torch.float32))
    optimizer = SOAP([p], lr=0.1)
    p.grad = gradient(1, torch.float32)
    optimizer.step()
    assert not {"eigvals_L", "eigvals_R"} & optimizer.state[p].keys()


@pytest.mark.parametrize("view", ["stack", "joined", "interleaved"])
@pytest.mark.parametrize("make", [kl_soap, rekls, kl_shampoo])
def test_a_checkpoint_without_them_resumes_within_rounding(make, view):
    """June's release kept none, and neither did our own first ones."""
    p = nn.Parameter(gradient(0, torch.float64, (8, 6) if view == "interleaved" else (2, 8, 6)))
    options = {"stack": {}, "joined": {"matrix_view": "joined"}, "interleaved": {"matrix_view": ("interleaved", 2)}}
    optimizer = make([p], **options[view])

    def steps(x: nn.Parameter, of: torch.optim.Optimizer, times: range) -> None:
        for t in times:
            x.grad = gradient(t, torch.float64, tuple(p.shape))
            of.step()

    steps(p, optimizer, range(1, 6))
    saved = copy.deepcopy(optimizer.state_dict())
    assert any(key.startswith("eigvals") for key in saved["state"][0])
    saved["state"][0] = {key: x for key, x in saved["state"][0].items() if not key.startswith("eigvals")}
    q = nn.Parameter(p.detach().clone())
    resumed = make([q], **options[view])
    resumed.load_state_dict(saved)
    assert resumed.state[q].keys() == optimizer.state[p].keys()
    steps(p, optimizer, range(6, 9))
    steps(q, resumed, range(6, 9))
    torch.testing.assert_close(q, p, rtol=0, atol=1e-12)


def test_a_kl_checkpoint_goes_on_without_kl():
    p = nn.Parameter(gradient(0, torch.float32))
    optimizer = kl_soap([p])
    p.grad = gradient(1, torch.float32)
    optimizer.step()
    plain = SOAP([p], lr=0.1)
    plain.load_state_dict({**optimizer.state_dict(), "param_groups": plain.state_dict()["param_groups"]})
    assert "Q_L" in plain.state[p]
    assert not {"eigvals_L", "eigvals_R"} & plain.state[p].keys()


@pytest.mark.parametrize("mode", ["qr", "eigh", "overlap", "every_third"])
def test_products_that_take_a_cube_of_the_side_are_fewer(mode, monkeypatch):
    """A refresh has no product of its own for them; REUSE steps have one for each side, as before."""
    calls: list[int] = []

    def spy(factor: Tensor, basis: Tensor) -> Tensor:
        calls.append(factor.size(-1))
        return conjugate_diagonal(factor, basis)

    monkeypatch.setattr("emerging_optimizers.linalg.eigenbasis.conjugate_diagonal", spy)
    p = nn.Parameter(gradient(0, torch.float32, (8, 6)))
    optimizer = kl_soap([p], **MODES[mode])
    counts = []
    for t in range(1, 8):
        before = len(calls)
        p.grad = gradient(t, torch.float32, (8, 6))
        optimizer.step()
        counts.append(len(calls) - before)
    assert counts[1:] == ([0, 2, 2, 0, 2, 2] if mode == "every_third" else [0] * 6)
