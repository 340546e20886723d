"""PSGD: its schedule moves, its noise repeats itself, its factors whiten, and the published helpers."""

import copy
import math

import pytest
import torch
from torch import Tensor

from emerging_optimizers import PSGDPro
from emerging_optimizers.linalg.noise import counted_normal
from emerging_optimizers.linalg.power_iteration import norm_lower_bound
from emerging_optimizers.psgd.procrustes_step import procrustes_step
from emerging_optimizers.psgd.psgd_kron_contractions import (
    apply_kronecker_factors,
    apply_preconditioner,
    partial_contraction,
)
from emerging_optimizers.psgd.psgd_utils import norm_lower_bound_skew, norm_lower_bound_spd, uniformize_q_in_place
from tests.distributed.processes import run as run_processes
from tests.reference.psgd import normal


def gradients(steps: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randn(steps, *shape, generator=torch.Generator().manual_seed(seed))


def train(p: torch.nn.Parameter, grads: Tensor, optimizer: PSGDPro) -> Tensor:
    for grad in grads:
        p.grad = grad.to(p.dtype)
        optimizer.step()
    return p.detach().clone()


def fresh(shape: tuple[int, ...] = (6, 4), dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(shape, dtype=dtype))


# ---- the schedule, which the published step count left at its start -------------------------------------------------


def test_the_step_size_of_the_factors_falls_with_the_step() -> None:
    """At step t it is precond_lr / sqrt(1 + (t - 1) / warmup_steps); a published release never counted steps."""
    grads = gradients(5, 6, 4)
    sizes = []
    for warmup_steps in (1, 10**9):
        p = fresh(dtype=torch.float64)
        optimizer = PSGDPro([p], lr=0.0, warmup_steps=warmup_steps, precond_lr=0.04, min_precond_lr=1e-9, seed=0)
        train(p, grads[:4], optimizer)
        assert float(optimizer.state[p]["step"]) == 4
        # From equal factors and bounds, one step: where the first order rules, it is as long as its step size.
        state = optimizer.state[p]
        state["Q_0"].copy_(torch.eye(6))
        state["Q_1"].copy_(torch.eye(4))
        state["L_0"].fill_(1e3)
        state["L_1"].fill_(1e3)
        train(p, grads[4:], optimizer)
        sizes.append(float((state["Q_0"] / state["Q_1"].abs().max() - torch.eye(6)).norm()))
    assert sizes[0] / sizes[1] == pytest.approx(1 / math.sqrt(1 + 4), rel=1e-2)


def test_the_step_size_has_a_lower_bound() -> None:
    grads = gradients(4, 6, 4)
    p, q = fresh(), fresh()
    a = train(p, grads, PSGDPro([p], warmup_steps=1, min_precond_lr=0.1, precond_lr=0.1, seed=0))
    b = train(q, grads, PSGDPro([q], warmup_steps=10**9, precond_lr=0.1, seed=0))
    torch.testing.assert_close(a, b)


# ---- noise ----------------------------------------------------------------------------------------------------------


def test_noise_follows_the_seed_and_moves_no_generator() -> None:
    grads = gradients(3, 6, 4)

    def run(manual: int, **options: int) -> Tensor:
        torch.manual_seed(manual)
        p = fresh()
        before = torch.get_rng_state()
        weight = train(p, grads, PSGDPro([p], lr=0.1, **options))
        assert torch.equal(torch.get_rng_state(), before)
        return weight

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))
    assert torch.equal(run(3, seed=5), run(4, seed=5))
    assert torch.equal(run(5), run(0, seed=5))


def seed_on_each_process() -> list[int]:
    """What seed=None and seed=7 come to, where torch's own seed is each process's."""
    torch.manual_seed(10 + torch.distributed.get_rank())
    return [PSGDPro([fresh()], seed=seed).param_groups[0]["seed"] for seed in (None, 7)]


def test_the_processes_of_a_run_have_the_same_noise() -> None:
    assert run_processes(2, seed_on_each_process) == [[0, 7]] * 2
    torch.manual_seed(10)
    assert PSGDPro([fresh()]).param_groups[0]["seed"] == 10


def test_a_checkpoint_goes_on_with_the_noise_of_its_run() -> None:
    grads = gradients(6, 6, 4)
    torch.manual_seed(1)
    p = fresh()
    through = train(p, grads, PSGDPro([p], lr=0.1))
    torch.manual_seed(1)
    p = fresh()
    optimizer = PSGDPro([p], lr=0.1)
    train(p, grads[:3], optimizer)
    torch.manual_seed(2)
    other = torch.nn.Parameter(p.detach().clone())
    resumed = PSGDPro([other], lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(train(other, grads[3:], resumed), through)


@pytest.mark.parametrize("shape", [(3, 5), (4, 1), (1, 6)])
@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_counted_numbers_are_those_of_the_definition(shape: tuple[int, int], seed: int) -> None:
    steps = torch.tensor([1.0, 12345.0], dtype=torch.float64).view(2, 1, 1)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        z = counted_normal(torch.empty(2, *shape, dtype=dtype), steps, seed, stream=3)
        for one, step in zip(z, (1, 12345), strict=True):
            torch.testing.assert_close(one.double(), normal(*shape, seed, 3, step), rtol=tolerance, atol=tolerance)


def test_counted_numbers_are_normal_and_independent() -> None:
    steps = torch.tensor([1.0, 2.0]).view(2, 1, 1)
    a, b = counted_normal(torch.empty(2, 100, 101), steps, 0, 0)
    c = counted_normal(torch.empty(1, 100, 101), steps[:1], 0, 1)[0]
    d = counted_normal(torch.empty(1, 100, 101), steps[:1], 1, 0)[0]
    noise = 1 / math.sqrt(a.numel())
    for z in (a, b, c, d):
        assert abs(z.mean()) < 4 * noise
        assert abs(z.square().mean() - 1) < 4 * math.sqrt(2) * noise
        assert abs(z.pow(4).mean() - 3) < 4 * math.sqrt(96) * noise
        assert abs((z[1:] * z[:-1]).mean()) < 4 * noise
        assert abs((z[:, 1:] * z[:, :-1]).mean()) < 4 * noise
        assert torch.linalg.matrix_norm(z, 2) < 21  # two roots of 100 are 20
    for one, other in ((a, b), (a, c), (a, d), (c, d)):
        assert abs((one * other).mean()) < 4 * noise


# ---- what it does ---------------------------------------------------------------------------------------------------


def test_the_update_is_whitened() -> None:
    """Gradients of very different sizes by row: the momentum keeps them, the update does not."""
    p = fresh((12, 8))
    optimizer = PSGDPro([p], lr=0.0, momentum=0.0, weight_decay=0.0, damping_noise_scale=1e-3, precond_lr=0.3, seed=0)
    sizes = torch.logspace(-1, 1, 12).unsqueeze(-1)
    train(p, sizes * gradients(300, 12, 8), optimizer)
    rows = []
    for grad in sizes * gradients(30, 12, 8, seed=2):
        before = p.detach().clone()
        optimizer.param_groups[0]["lr"] = 1.0
        train(p, grad[None], optimizer)
        rows.append((p.detach() - before).square().mean(dim=1))
    rms = torch.stack(rows).mean(dim=0).sqrt()
    assert float(rms.max() / rms.min()) < 2
    assert 0.5 < float(rms.square().mean().sqrt()) < 1.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_follow_the_float32_run(dtype: torch.dtype) -> None:
    grads = gradients(10, 6, 4).to(dtype)
    low, full = fresh(dtype=dtype), fresh()
    a = train(low, grads, PSGDPro([low], lr=0.01, seed=0))
    b = train(full, grads.float(), PSGDPro([full], lr=0.01, seed=0))
    assert float((a.float() - b).norm() / b.norm()) < 20 * torch.finfo(dtype).eps


def test_a_published_checkpoint_loads() -> None:
    p = fresh((3, 2))
    p.grad = torch.zeros(3, 2)
    optimizer = PSGDPro([p], lr=0.1)
    saved = {
        "state": {
            0: {
                "step": 7,
                "exp_avg": torch.ones(3, 2),
                "Q": [2 * torch.eye(3), 3 * torch.eye(2)],
                "L": [torch.tensor(5.0), torch.tensor(6.0)],
            }
        },
        "param_groups": [{"lr": 0.2, "beta_lip": 0.8, "weight_decay": 0.0, "momentum": 0.9, "precond_lr": 0.1,
                          "min_precond_lr": 0.01, "params": [0]}],
    }  # fmt: skip
    optimizer.load_state_dict(saved)
    state = optimizer.state[p]
    assert (float(state["step"]), float(state["L_0"]), float(state["L_1"])) == (7, 5, 6)
    assert torch.equal(state["Q_0"], 2 * torch.eye(3))
    assert torch.equal(state["Q_1"], 3 * torch.eye(2))
    optimizer.step()
    assert optimizer.param_groups[0]["beta_lip"] == 0.8


def test_values_out_of_range_are_refused() -> None:
    for wrong in ({"warmup_steps": 0}, {"precond_lr": 0.0}, {"seed": -1}, {"beta_lip": 1.0}, {"seed": 0.5}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            PSGDPro([fresh()], **wrong)


# ---- norms and rotations --------------------------------------------------------------------------------------------


def matrix(kind: str, n: int = 40, rank: int = 40) -> Tensor:
    x = torch.randn(n, rank, generator=torch.Generator().manual_seed(n + rank))
    return x @ x.T if kind == "spd" else torch.tril(x @ x.T, -1) - torch.tril(x @ x.T, -1).T


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e12])
@pytest.mark.parametrize("rank", [1, 3, 40])
@pytest.mark.parametrize(("kind", "bound"), [("spd", norm_lower_bound_spd), ("skew", norm_lower_bound_skew)])
def test_the_norm_bound_is_one_and_close(kind: str, rank: int, scale: float, bound: object) -> None:
    A = scale * matrix(kind, rank=rank)
    share = float(bound(A) / torch.linalg.matrix_norm(A.double(), 2))
    assert 0.9 < share <= 1 + 1e-5


def test_the_norm_bound_of_a_stack_is_that_of_its_matrices() -> None:
    A = torch.stack([matrix("spd", rank=r) for r in (1, 5, 40)])
    v = torch.randn(3, 8, 40)
    alone = torch.cat([norm_lower_bound(a[None], w[None]) for a, w in zip(A, v, strict=True)])
    torch.testing.assert_close(norm_lower_bound(A, v), alone)
    assert float(norm_lower_bound(torch.zeros(1, 3, 3), torch.ones(1, 2, 3))) == 0


@pytest.mark.parametrize("order", [2, 3])
def test_procrustes_steps_make_a_rotated_positive_matrix_symmetric_again(order: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 8, generator=generator)
    positive = x @ x.T / 8 + torch.eye(8)
    skew = 0.3 * torch.randn(8, 8, generator=generator)
    Q = torch.linalg.matrix_exp(skew - skew.T) @ positive
    gram = Q.T @ Q
    rounding = 8 * torch.finfo(Q.dtype).eps * float(Q.norm())  # of one step's products of rows of eight
    for _ in range(60):
        before = float((Q - Q.T).norm())
        Q = procrustes_step(Q, order=order)
        assert float((Q - Q.T).norm()) <= before + rounding
    assert float((Q - Q.T).norm()) <= rounding
    # A rotation keeps P = Q^T Q; an expanded one by a = 1/8 nearly does: order 2 adds a^4 / 4 of it, in the 20 steps
    # that are not yet small.
    torch.testing.assert_close(Q.T @ Q, gram, rtol=0, atol=20 * 0.125**4 / 4 * float(gram.max()))


@pytest.mark.parametrize("order", [2, 3])
def test_a_symmetric_matrix_is_left_alone(order: int) -> None:
    Q = matrix("spd", 5)
    torch.testing.assert_close(procrustes_step(Q, order=order), Q)


# ---- the other published helpers ------------------------------------------------------------------------------------


def test_kronecker_factors_apply_along_every_axis() -> None:
    X, A, B, C = torch.randn(2, 3, 4), torch.randn(2, 2), torch.randn(3), torch.randn(4, 4)
    expected = torch.einsum("ai,j,ck,ijk->ajc", A, B, C, X)
    torch.testing.assert_close(apply_kronecker_factors([A, B, C], X), expected)
    expected = torch.einsum("ai,j,ck,ijk->ajc", A.T @ A, B * B, C.T @ C, X)
    torch.testing.assert_close(apply_preconditioner([A, B, C], X), expected)
    torch.testing.assert_close(partial_contraction(X, 2 * X, 1), 2 * torch.einsum("ijk,ilk->jl", X, X))


def test_balancing_keeps_the_product() -> None:
    factors = [torch.randn(3, 3), 100 * torch.randn(4, 4), torch.randn(5)]
    X = torch.randn(3, 4, 5)
    before = apply_kronecker_factors(factors, X)
    uniformize_q_in_place(factors)
    torch.testing.assert_close(apply_kronecker_factors(factors, X), before, rtol=1e-4, atol=1e-4)
    peaks = torch.stack([Q.abs().max() for Q in factors])
    torch.testing.assert_close(peaks, peaks[:1].expand(3))


def test_helpers_refuse_what_they_cannot_use() -> None:
    with pytest.raises(TypeError, match="Q_list is empty"):
        uniformize_q_in_place([])
    for function in (apply_kronecker_factors, apply_preconditioner):
        with pytest.raises(ValueError, match="2 factors and X 3 dimensions"):
            function([torch.eye(2)] * 2, torch.ones(2, 2, 2))
    with pytest.raises(ValueError, match="order=4"):
        procrustes_step(torch.eye(2), order=4)
    with pytest.raises(ValueError, match="square matrix"):
        norm_lower_bound_spd(torch.ones(2, 3))
