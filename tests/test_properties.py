"""Laws that hold for any shape: order and neighbours in a stack do not matter, scales and rotations pass through."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emerging_optimizers import SOAP, AdamW, Muon, registry
from tests.cases import SEEDS, OptimizerCase

shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))
MATRIX = [case for case in SEEDS if not case.elementwise]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def steps(case: OptimizerCase, grads_TBMN: Tensor) -> Tensor:
    """The weights (B, M, N) of B parameters that start at zero, after T steps."""
    ps = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads_TBMN[0]]
    optimizer = case.make(ps, weight_decay=0.0)
    for grads_BMN in grads_TBMN:
        for p, grad in zip(ps, grads_BMN, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    return torch.stack([p.detach() for p in ps])


@pytest.mark.parametrize("case", SEEDS, ids=str)
@settings(max_examples=10, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**16))
def test_the_order_of_a_stack_does_not_matter(case: OptimizerCase, shape: tuple[int, int], seed: int) -> None:
    """Of a matrix at another place in memory LAPACK finds other null vectors, so two gradients leave at most one.

    SPlus takes signs along them, so its matrices are square.
    """
    m = min(shape)
    shape = (m, m) if case.name == "splus" else (min(shape[0], 2 * m + 1), min(shape[1], 2 * m + 1))
    grads = torch.randn(3, 4, *shape, generator=generator(seed), dtype=torch.float64)
    order = torch.randperm(4, generator=generator(seed))
    torch.testing.assert_close(steps(case, grads[:, order]), steps(case, grads)[order], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", SEEDS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_stays_in_its_row(case: OptimizerCase, bad: float) -> None:
    grads = torch.randn(3, 4, 6, 5, generator=generator(0), dtype=torch.float64)
    broken = grads.clone()
    broken[1, 2, 0, 0] = bad
    others = [0, 1, 3]
    torch.testing.assert_close(steps(case, broken)[others], steps(case, grads)[others], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", [case for case in SEEDS if case.scale_free], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_update_does_not_see_the_scale_of_the_gradients(case: OptimizerCase, scale: float) -> None:
    """Up to eps, which is an absolute number; KL factors take the scale of the gradient's RMS."""
    grads = torch.randn(6, 2, 6, 6, generator=generator(1), dtype=torch.float64)
    absolute = {"exp_avg_sq", "L"} & {*case.state} and "eps" in registry.entry(case.optimizer).load().ranges
    case = replace(case, kwargs={**case.kwargs, **({"eps": 1e-30} if absolute else {})})
    torch.testing.assert_close(steps(case, grads * scale), steps(case, grads), rtol=1e-6, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**16))
def test_muon_turns_with_its_gradients(shape: tuple[int, int], seed: int) -> None:
    case = next(case for case in SEEDS if case.optimizer == "muon")
    grads = torch.randn(3, 1, *shape, generator=generator(seed), dtype=torch.float64)
    U, V = (torch.linalg.qr(torch.randn(k, k, generator=generator(seed + 1), dtype=torch.float64)).Q for k in shape)
    torch.testing.assert_close(steps(case, U @ grads @ V.mT), U @ steps(case, grads) @ V.mT, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("use_kl_shampoo", [False, True])
def test_soap_turns_with_its_gradients_once_its_basis_stands(use_kl_shampoo: bool) -> None:
    """From warm factors and bases; at a cold start Adam's axes are the matrix's own."""
    G = torch.randn(12, 7, 5, generator=generator(2), dtype=torch.float64)
    U, V = (torch.linalg.qr(torch.randn(k, k, generator=generator(3), dtype=torch.float64)).Q for k in (7, 5))

    def warm(grads: Tensor, left: Tensor, right: Tensor) -> Tensor:
        p = torch.nn.Parameter(torch.zeros(7, 5, dtype=torch.float64))
        optimizer = SOAP([p], lr=1.0, weight_decay=0.0, use_eigh=True, use_kl_shampoo=use_kl_shampoo)
        for t, grad in enumerate(grads):
            if t == 8:
                state, root = optimizer.state[p], torch.arange(1.0, 8.0, dtype=torch.float64)
                state["L"].copy_(left @ root.diag() @ left.mT)
                state["R"].copy_(right @ root[:5].diag() @ right.mT)
                state["Q_L"].copy_(left.flip(-1))
                state["Q_R"].copy_(right.flip(-1))
                if use_kl_shampoo:
                    state["eigvals_L"].copy_(root.flip(0))
                    state["eigvals_R"].copy_(root[:5].flip(0))
                state["exp_avg"].zero_()
                state["exp_avg_sq"].fill_(0.5)
                before = p.detach().clone()
            p.grad = grad.clone()
            optimizer.step()
        return p.detach() - before

    identity = (torch.eye(7, dtype=torch.float64), torch.eye(5, dtype=torch.float64))
    plain, turned = warm(G, *identity), warm(U @ G @ V.mT, U, V)
    torch.testing.assert_close(turned, U @ plain @ V.mT, rtol=1e-6, atol=1e-9)


def test_clipped_chunks_equal_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting stacks into calls of the rule changes nothing."""
    grads = torch.randn(3, 9, 6, 5, generator=generator(4))
    for case in (c for c in SEEDS if c.name in ("adamw", "muon")):
        whole = steps(case, grads)
        monkeypatch.setattr("emerging_optimizers.engine.chunks.CPU_CHUNK_BYTES", 2 * 6 * 5 * 4)
        monkeypatch.setattr("emerging_optimizers.engine.chunks.ELEMENT_CHUNK", 7)
        torch.testing.assert_close(steps(case, grads), whole, rtol=1e-5, atol=1e-7)
        monkeypatch.undo()


def test_update_rms_of_muon_is_its_learning_rate() -> None:
    for shape in ((64, 16), (16, 64), (48, 48)):
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape, generator=generator(5))
        Muon([p], lr=0.1, fp32_matmul_prec="highest").step()
        assert p.detach().square().mean().sqrt().item() == pytest.approx(0.1, rel=0.05)


def test_low_precision_weight_decay_is_rounded_once() -> None:
    """lr * weight_decay = 1e-3 is lost in bfloat16 when the decay is rounded by itself."""
    p = torch.nn.Parameter(torch.full((4, 4), 1.0, dtype=torch.bfloat16))
    optimizer = AdamW([p], lr=3e-3, weight_decay=0.5)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p[0, 0].item() == torch.tensor(1 - 3e-3 * 0.5 - 3e-3).bfloat16().item()
