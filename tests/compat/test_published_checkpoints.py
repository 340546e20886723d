"""Checkpoints as the published library writes them, June and August 2026, load here and the run goes on.

The layouts are what its classes leave in `state_dict()`: counts are numbers, groups hold few options.
"""

import io
from typing import Any

import pytest
import torch

from emerging_optimizers.linalg.kronecker import conjugate_diagonal
from emerging_optimizers.registry import get_optimizer_cls

M, N = 6, 4
MN, MM, NN, COLUMN = (M, N), (M, M), (N, N), (M, 1)
MOMENTUM = {"momentum_buffer": MN}
ADAM = {"step": 3, "exp_avg": MN, "exp_avg_sq": MN}
SOAP = {**ADAM, "L": MM, "R": NN, "Q_L": MM, "Q_R": NN}
EIGENVALUES = {"eigvals_L": (M,), "eigvals_R": (N,)}
SOAP_GROUP = {"betas": (0.8, 0.9), "shampoo_beta": 0.9, "eps": 1e-7, "weight_decay": 0.1}

# name, constructor's options, state (a shape, a list of shapes or a number), group beside lr, what is not kept
CHECKPOINTS: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], set[str]]] = [
    ("muon", {"scale_mode": "shape_scaling"}, MOMENTUM, {"momentum": 0.8, "weight_decay": 0.1}, set()),
    ("mop", {}, MOMENTUM, {"momentum": 0.8, "weight_decay": 0.1}, set()),
    ("polargrad", {}, MOMENTUM, {"momentum": 0.8, "weight_decay": 0.1}, set()),
    ("scion", {}, MOMENTUM, {"momentum": 0.8, "weight_decay": 1}, set()),
    ("spel", {}, MOMENTUM, {"momentum": 0.8, "weight_decay": 0.1}, set()),
    (
        "muon_hyperball", {}, {**MOMENTUM, "hyperball_R": 2.5}, {"momentum": 0.8, "weight_decay": 0.1}, {"hyperball_R"}
    ),
    *(
        (
            "adaptive_muon",
            {"moment2_method": method},
            {**MOMENTUM, "moment2_buffer": shape},
            {"momentum": 0.8, "weight_decay": 0.0, "beta2": 0.9, "eps": 1e-7},
            set[str](),
        )
        for method, shape in (("adamuon", MN), ("normuon", COLUMN), ("namo", (1,)))
    ),
    (
        "muown",
        {},
        {"step": 3, "g": COLUMN, "v_norm": COLUMN, "momentum_buffer": MN, "m_g": COLUMN, "v_g": COLUMN},
        {"momentum": 0.8, "weight_decay": 0.1},
        set(),
    ),
    ("soap", {}, SOAP, SOAP_GROUP, set()),
    *(
        (name, {}, {**SOAP, **EIGENVALUES}, SOAP_GROUP, dropped)
        for name, dropped in (("soap", set(EIGENVALUES)), ("rekls", set[str]()), ("stacked_soap", set[str]()))
    ),
    # Its bases are made of the factors again.
    ("tp_rekls", {"tp_group": None}, {**ADAM, "L": MM, "R": NN}, {**SOAP_GROUP, "partition_dim": 0}, set()),
    *(
        (
            name,
            {"eps": 1e-6},
            {**SOAP, **EIGENVALUES},
            {key: value for key, value in SOAP_GROUP.items() if key != "eps"},
            set[str](),
        )
        for name in ("kl_soap", "rekls_v3", "kl_m_soap")
    ),
    (
        "moso",
        {},
        {"step": 3, "momentum_buffer": MN, "exp_avg_sq": MN, "M": NN, "Q_M": NN},
        {"momentum": 0.8, "rms_beta": 0.9, "shampoo_beta": 0.9, "eps": 1e-7, "weight_decay": 0.1},
        set(),
    ),
    (
        "psgd_pro",
        {},
        {"step": 3, "exp_avg": MN, "Q": [MM, NN], "L": [(), ()]},
        {"beta_lip": 0.8, "weight_decay": 0.1, "momentum": 0.8, "precond_lr": 0.2, "min_precond_lr": 0.02},
        {"Q", "L"},
    ),
    ("lion", {}, {"exp_avg": MN}, {"betas": (0.8, 0.9), "weight_decay": 0.1}, set()),
    ("lion", {}, {"exp_avg": MN, "step": 3}, {"betas": (0.8, 0.9), "weight_decay": 0.1}, {"step"}),
    ("signum", {}, {"exp_avg": MN, "step": 3}, {"momentum": 0.8, "weight_decay": 0.1, "nesterov": True}, set()),
    ("laprop", {}, ADAM, {"betas": (0.8, 0.9), "eps": 1e-7, "weight_decay": 0.1, "correct_bias": False}, set()),
    ("sim_ademamix", {}, ADAM, {"betas": (0.8, 0.9), "eps": 1e-7, "weight_decay": 0.1, "alpha": 3.0}, set()),
    ("oblique_sgd", {}, MOMENTUM, {"momentum": 0.8, "weight_decay": 0.1, "dim": 1, "eps": 1e-7}, set()),
    *(
        (name, {"scale_mode": "unit_rms_norm"}, ADAM, {"betas": (0.8, 0.9), "weight_decay": 0.1, "dim": 1}, set[str]())
        for name in ("oblique_adam", "oblique_steepest_adam")
    ),
    ("oblique_steepest_sgd", {}, MOMENTUM, {"momentum": 0.8, "weight_decay": 0.1, "dim": 1, "eps": 1e-7}, set()),
    (
        "shampoo",
        {"scale_mode": "spectral"},
        {"step": 3, "exp_avg": MN, "L": MM, "R": NN},
        {"momentum": 0.8, "shampoo_beta": 0.9, "eps": 1e-7, "weight_decay": 0.1},
        set(),
    ),
    ("oblique_adam", {}, ADAM, {"betas": (0.8, 0.9), "weight_decay": 0.1, "dim": 1, "eps": 1e-7}, set()),
    (
        "iso",
        {},
        {"step": 3, "u": MN, "sigma": (N,), "v": NN, "momentum_u": MN, "momentum_v": NN},
        {"momentum": 0.8, "retraction": "polar"},
        set(),
    ),
    (
        "spectron",
        {"rank": 2},
        {
            "step": 3, "factor_A": (M, 2), "factor_B": (N, 2), "momentum_A": (M, 2), "momentum_B": (N, 2),
            "u_A": (M,), "u_B": (N,),
        },
        {"momentum_beta": 0.8, "weight_decay": 0.1},
        set(),
    ),
]  # fmt: skip


def published(state: dict[str, Any], group: dict[str, Any], of: torch.Tensor) -> dict[str, Any]:
    """A state_dict with positive numbers; bases and factors are what they have to be."""
    g = torch.Generator().manual_seed(1)

    def make(key: str, shape: Any) -> Any:
        if isinstance(shape, list):
            return [make(key, one) for one in shape]
        if not isinstance(shape, tuple):
            return shape
        x = torch.rand(shape, generator=g) + 0.1
        if key in ("L", "R", "M", "Q") and len(shape) == 2:
            return x @ x.mT + torch.eye(len(x))
        if key in ("Q_L", "Q_R", "Q_M", "u", "v"):
            return torch.linalg.qr(x).Q
        return x

    saved = {key: make(key, shape) for key, shape in state.items()}
    if "factor_A" in saved:
        of.copy_(saved["factor_A"] @ saved["factor_B"].mT)
    if "u" in saved:
        of.copy_(saved["u"] * saved["sigma"] @ saved["v"].mT)
    return {"state": {0: saved}, "param_groups": [{"lr": 0.01, **group, "params": [0]}]}


@pytest.mark.parametrize(("name", "options", "state", "group", "dropped"), CHECKPOINTS)
def test_it_loads_and_the_run_goes_on(name, options, state, group, dropped):
    p = torch.nn.Parameter(torch.randn(M, N, generator=torch.Generator().manual_seed(0)))
    file = io.BytesIO()
    torch.save(published(state, group, p.data), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    optimizer = get_optimizer_cls(name)([p], lr=1.0, **options)
    optimizer.load_state_dict(saved)

    kept = {key: value for key, value in options.items() if key != "tp_group"}
    assert optimizer.param_groups[0].items() >= {"lr": 0.01, **group, **kept}.items()
    loaded, before = optimizer.state[p], saved["state"][0]
    assert before.keys() - loaded.keys() == dropped
    for key, value in before.items():
        if key not in dropped:
            assert torch.equal(loaded[key], torch.as_tensor(value).to(loaded[key].dtype)), key
        elif isinstance(value, list):
            assert all(torch.equal(loaded[f"{key}_{i}"], x) for i, x in enumerate(value))
    weight = p.detach().clone()
    p.grad = torch.randn(M, N, generator=torch.Generator().manual_seed(2))
    optimizer.step()
    assert p.isfinite().all()
    assert not torch.equal(p, weight)
    assert "step" not in loaded or loaded["step"] == 4


def test_eigenvalues_of_june_are_those_of_the_factors_in_their_bases():
    """August keeps them, June does not."""
    ends = []
    for kept in (False, True):
        p = torch.nn.Parameter(torch.ones(M, N))
        optimizer = get_optimizer_cls("soap")([p], lr=0.1, use_kl_shampoo=True)
        saved = published(SOAP, SOAP_GROUP, p.data)
        one = saved["state"][0]
        if kept:
            one |= {f"eigvals_{side}": conjugate_diagonal(one[side], one[f"Q_{side}"]) for side in ("L", "R")}
        optimizer.load_state_dict(saved)
        p.grad = torch.eye(M, N)
        optimizer.step()
        ends.append(p.detach().clone())
    assert torch.equal(*ends)


def test_a_checkpoint_of_another_optimizer_is_still_refused_and_changes_nothing():
    p = torch.nn.Parameter(torch.ones(M, N))
    optimizer = get_optimizer_cls("muon")([p], lr=1.0)
    with pytest.raises(ValueError, match="missing momentum_buffer; unknown L"):
        optimizer.load_state_dict(published({**SOAP, **EIGENVALUES}, SOAP_GROUP, p.data))
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert not optimizer.state
