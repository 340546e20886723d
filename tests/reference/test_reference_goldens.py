"""The references against published numbers, against torch, and against a second form of themselves."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.goldens import (
    CASES,
    SHAPE,
    STEPS,
    golden,
    golden_names,
    golden_reference,
    golden_start,
    gradient,
    initial_weight,
    null_space,
)
from tests.reference import Reference
from tests.reference.adamw import ReferenceAdamW
from tests.reference.laprop import ReferenceLaProp
from tests.reference.muon import COEFFICIENTS, Coefficients, ReferenceMuon, orthogonalize, schedule
from tests.reference.rekls import ReferenceREKLS
from tests.reference.soap import ReferenceSOAP

TIGHT = 2e-5  # reached by every case whose golden run did its products in float32
REFERENCE_TOLERANCE = {"muon_medium_bf16": 2e-3}  # bfloat16 there, float64 here


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def gaussian(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(optimizer: Reference, steps: int, rows: int = 7, columns: int = 5) -> Tensor:
    weight = gaussian(rows, columns, 0)
    for t in range(1, steps + 1):
        weight = optimizer.step(weight, gaussian(rows, columns, t))
    return weight


def test_every_golden_case_is_used() -> None:
    assert sorted(CASES) == sorted(golden_names())


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    expected, reference = golden(name), golden_reference(name)
    tolerance = REFERENCE_TOLERANCE.get(name, TIGHT)
    assert tolerance <= CASES[name].tolerance

    weight = golden_start(name, torch.float64)
    for t in range(1, STEPS + 1):
        before, weight = weight, reference.step(weight, gradient(t, torch.float64))
        rms = math.sqrt(float(((before - weight) ** 2).mean()))
        assert rms == pytest.approx(expected.update_rms[t - 1], rel=0, abs=tolerance)

    torch.testing.assert_close(weight, expected.final, rtol=0, atol=tolerance)
    assert reference.t == STEPS
    for key, described in expected.state.items():
        if key != "step":
            assert described == f"float32{tuple(getattr(reference, key).shape)}"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.null_angle is not None])
def test_the_null_space_decides_a_golden(name: str) -> None:
    """Turned by 45 degrees the same run ends elsewhere: the angle is part of the golden case."""
    reference = golden_reference(name)
    assert isinstance(reference, ReferenceSOAP)
    assert reference.left_null_space is not None
    torch.testing.assert_close(
        gradient(1, torch.float64).T @ reference.left_null_space,
        torch.zeros(SHAPE[1], 2, dtype=torch.float64),
        rtol=0,
        atol=1e-12,
    )
    half = math.sqrt(0.5)
    turn = torch.tensor([[half, -half], [half, half]], dtype=torch.float64)
    reference.left_null_space = reference.left_null_space @ turn
    weight = initial_weight(torch.float64)
    for t in range(1, STEPS + 1):
        weight = reference.step(weight, gradient(t, torch.float64))
    assert float((weight - golden(name).final).abs().max()) > 100 * TIGHT


@pytest.mark.parametrize("angle", range(0, 90, 5))  # a right angle further the two have changed places
def test_no_null_space_decides_a_golden_without_an_angle(angle: float) -> None:
    (name,) = [name for name, case in CASES.items() if "first_step" in case.kwargs and case.null_angle is None]
    reference = golden_reference(name)
    assert isinstance(reference, ReferenceSOAP)
    reference.left_null_space = null_space(angle)
    weight = initial_weight(torch.float64)
    for t in range(1, STEPS + 1):
        weight = reference.step(weight, gradient(t, torch.float64))
    torch.testing.assert_close(weight, golden(name).final, rtol=0, atol=TIGHT)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torchs(weight_decay: float) -> None:
    kwargs: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    parameter = torch.nn.Parameter(gaussian(7, 5, 0))
    optimizer = torch.optim.AdamW([parameter], **kwargs)
    for t in range(1, 31):
        parameter.grad = gaussian(7, 5, t)
        optimizer.step()
    torch.testing.assert_close(run(ReferenceAdamW(**kwargs), 30), parameter.data, rtol=1e-12, atol=1e-12)


def newton_schulz(matrix: Tensor, coefficients: list[Coefficients]) -> Tensor:
    """The same polynomials by matrix products: X <- a X + b (X X^T) X + c (X X^T)^2 X."""
    X: Tensor = matrix / matrix.norm()
    for a, b, c in coefficients:
        gram = X @ X.T
        X = a * X + b * gram @ X + c * gram @ gram @ X
    return X


@pytest.mark.parametrize("coefficient_type", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_singular_values_and_products_are_two_routes_to_one_matrix(
    coefficient_type: str, shape: tuple[int, int]
) -> None:
    matrix = gaussian(*shape, seed=1)
    for steps in [5] if coefficient_type == "cubic5" else [1, 4, 5, 12]:
        coefficients = schedule(coefficient_type, steps)
        torch.testing.assert_close(
            orthogonalize(matrix, coefficients), newton_schulz(matrix, coefficients), rtol=1e-9, atol=1e-9
        )


def test_custom_coefficients_are_those_given() -> None:
    simple = run(ReferenceMuon(coefficient_type="simple"), 3)
    custom = ReferenceMuon(coefficient_type="custom", custom_coefficient_sets=COEFFICIENTS["simple"])
    assert torch.equal(run(custom, 3), simple)


def test_laprop_without_momentum_is_adam_without_momentum() -> None:
    kwargs: dict[str, Any] = {"lr": 0.01, "betas": (0.0, 0.9), "weight_decay": 0.1}
    torch.testing.assert_close(run(ReferenceLaProp(**kwargs), 9), run(ReferenceAdamW(**kwargs), 9))


@pytest.mark.parametrize("first_step", ["adam", "eigenbasis"])
@pytest.mark.parametrize("use_kl_shampoo", [False, True])
def test_soap_with_no_preconditioned_side_is_adamw(first_step: str, use_kl_shampoo: bool) -> None:
    kwargs: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}
    soap = ReferenceSOAP(**kwargs, max_precond_dim=4, first_step=first_step, use_kl_shampoo=use_kl_shampoo)
    torch.testing.assert_close(run(soap, 9), run(ReferenceAdamW(**kwargs), 9), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [ReferenceSOAP, ReferenceREKLS])
def test_the_first_step_is_adams(make: type[ReferenceSOAP]) -> None:
    kwargs: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}
    adamw, soap = ReferenceAdamW(**kwargs), make(**kwargs)
    torch.testing.assert_close(run(soap, 1), run(adamw, 1), rtol=1e-12, atol=1e-12)
    assert torch.equal(soap.Q_L, torch.eye(7, dtype=torch.float64))


@pytest.mark.parametrize("make", [ReferenceSOAP, ReferenceREKLS])
def test_one_side_only(make: type[ReferenceSOAP]) -> None:
    soap = make(lr=0.01, max_precond_dim=5)
    run(soap, 4)
    assert soap.L is None
    assert torch.equal(soap.Q_L, torch.eye(7, dtype=torch.float64))
    assert soap.R is not None
    assert not torch.equal(soap.Q_R, torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize(("first_step", "refreshed"), [("adam", [2, 5, 8]), ("eigenbasis", [1, 4, 7])])
def test_steps_that_refresh_the_basis(first_step: str, refreshed: list[int]) -> None:
    soap = ReferenceSOAP(lr=0.01, first_step=first_step, precondition_frequency=3)
    weight, seen, basis = gaussian(7, 5, 0), [], torch.eye(7, dtype=torch.float64)
    for t in range(1, 10):
        weight = soap.step(weight, gaussian(7, 5, t))
        if not torch.equal(soap.Q_L, basis):
            seen.append(t)
        basis = soap.Q_L
    assert seen == refreshed


def test_the_second_moment_keeps_its_sum_at_the_first_basis() -> None:
    """The squares of a rotation's entries are doubly stochastic, so the total variance stays."""
    soap = ReferenceSOAP(lr=0.01, betas=(0.9, 1.0), correct_bias=False)
    weight = soap.step(gaussian(7, 5, 0), gaussian(7, 5, 1))
    soap.exp_avg_sq = variance = gaussian(7, 5, 9) ** 2
    soap.step(weight, gaussian(7, 5, 2))
    assert float(soap.exp_avg_sq.sum()) == pytest.approx(float(variance.sum()))
    assert not torch.allclose(soap.exp_avg_sq, variance)
