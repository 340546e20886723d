"""The operations by which matrices are shared out: those of an estimate, the same everywhere, found in milliseconds."""

import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from emerging_optimizers import estimate
from emerging_optimizers.engine import Scalars, Step
from emerging_optimizers.engine.flops import step_flops
from emerging_optimizers.linalg import precision
from emerging_optimizers.linalg.flops import FlopCounter
from emerging_optimizers.orthogonalized_optimizers import Muon, OrthogonalizedOptimizer
from emerging_optimizers.orthogonalized_optimizers.muon import MuonRule
from emerging_optimizers.registry import OPTIMIZERS, entry
from emerging_optimizers.soap import SOAP

M, N = 48, 80
MATRIX_OPTIMIZERS = [name for name, known in OPTIMIZERS.items() if not known.elementwise]
READS_WEIGHTS = ("muon_hyperball", "spectron")  # at the start, so that `estimate` refuses them


def counted(cls: Any, shape: tuple[int, int] = (M, N), **options: Any) -> float:
    optimizer = cls([nn.Parameter(torch.ones(4, 4))], **{"lr": 1e-3, **options})
    group = optimizer.param_groups[0]
    return step_flops(optimizer._checked_rule(0), shape, group)


@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_the_count_is_that_of_an_estimate(name: str) -> None:
    flops = counted(entry(name).load())
    assert flops >= M * N
    if name not in READS_WEIGHTS:
        said = estimate([nn.Parameter(torch.empty(M, N, device="meta"))], name, seconds=False).flops
        assert flops == pytest.approx(max(said, M * N))


def test_muon_by_hand() -> None:
    small, large = min(M, N), max(M, N)
    assert counted(Muon) == 5 * (4 * small**2 * large + 2 * small**3)
    assert counted(Muon, (N, M)) == counted(Muon)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_refresh_counts_for_its_share_of_the_period(overlap: bool) -> None:
    every, tenth = (counted(SOAP, precondition_frequency=k, overlap=overlap) for k in (1, 10))
    fifth = counted(SOAP, precondition_frequency=5, overlap=overlap)
    assert every > 2 * tenth
    assert fifth == pytest.approx(tenth + (every - tenth) / 9)


def test_the_machine_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("what a CPU multiplies fast changes no count")

    monkeypatch.setattr(precision, "_bfloat16_on_this_cpu", refuse)
    before = torch.get_rng_state()
    assert counted(Muon, (64, 96), fp32_matmul_prec="medium") == counted(Muon, (64, 96), fp32_matmul_prec="highest")
    assert torch.equal(torch.get_rng_state(), before)


def test_large_matrices_take_no_memory_and_no_time() -> None:
    begun = time.perf_counter()
    counted(SOAP, (8192, 8192))
    assert time.perf_counter() - begun < 5
    begun = time.perf_counter()
    counted(SOAP, (8192, 8192))
    assert time.perf_counter() - begun < 0.1  # known


@dataclass(frozen=True, kw_only=True)
class LookingRule(MuonRule):
    def update(self, grad: torch.Tensor, state: Any, t: Scalars) -> Step:
        return super().update(grad / grad.norm().item(), state, t)


class Looking(Muon):
    rule = LookingRule


def test_a_rule_that_reads_values_is_guessed() -> None:
    assert counted(Looking) == M * N * min(M, N)


def test_a_function_of_the_user_is_not_called() -> None:
    calls = []

    class Mine(OrthogonalizedOptimizer):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(
                params, lr, 0.9, 0.0, nesterov=False, weight_decay_method="decoupled", fp32_matmul_prec="highest",
                scaled_orthogonalize_fn=lambda x: calls.append(x) or x,
            )  # fmt: skip

    assert counted(Mine) == M * N * min(M, N)
    assert not calls


def test_products_and_factorizations_are_counted_without_data() -> None:
    x = torch.empty(3, 8, 4, device="meta")
    with FlopCounter() as counter:
        product = x.mT @ x
    assert counter.flops == 3 * 2 * 4 * 8 * 4
    with FlopCounter() as counter:
        reflectors, scales = torch.geqrf(x)
        torch.linalg.eigh(product)
    assert (reflectors.shape, scales.shape) == (x.shape, (3, 4))
    assert counter.flops == pytest.approx(3 * (2 * (8 * 16 - 64 / 3) + 9 * 64))


def test_a_call_that_is_known_is_counted_again_and_another_one_otherwise() -> None:
    x, y = torch.empty(3, 8, 4, device="meta"), torch.empty(3, 4, 2, device="meta")
    with FlopCounter() as counter:
        for _ in range(2):
            made = torch.bmm(x, y)
        wide = torch.bmm(x.double(), y.double())
        real = torch.bmm(torch.ones(3, 8, 4), torch.ones(3, 4, 2))
        rows, columns = x.sum(1), x.sum(2)
        written = torch.zeros_like(x).add_(1)
    assert counter.flops == 4 * 2 * 3 * 8 * 4 * 2
    assert (made.shape, made.dtype, wide.dtype) == ((3, 8, 2), torch.float32, torch.float64)
    assert (rows.shape, columns.shape, written.shape) == ((3, 4), (3, 8), x.shape)
    assert bool((real == 4).all())
