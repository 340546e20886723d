"""THE table: one row for each optimizer and for each option that changes its law.

A new optimizer joins by adding a row, and inherits everything that the suites over this table have learned.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from emerging_optimizers import registry

MATRICES = ((8, 6), (6, 8), (7, 7))
ANY = (*MATRICES, (5,), ())


@dataclass(frozen=True, kw_only=True)
class OptimizerCase:
    """One row.

    Attributes:
        name: of the case.
        optimizer: registry name.
        kwargs: arguments of the constructor beyond the parameters.
        reference: tests/reference takes the same arguments; False where the law is tested by another row.
        descends: at most this share of the loss is left at the end of `test_it_descends`.
        batched: relative tolerance between stacked and per_matrix in float32; 0: bitwise.
        state: keys of a parameter's state.
        warns: what the constructor's warning says.
        scale_free: the update does not depend on the scale of the gradients.
        averages: a part of its state is an average of gradients.
        rests: a step with lr = 0 leaves the weight as it is, bit for bit.
        shapes: of the parameters that the suites use; empty: matrices, and for an element-wise rule vectors too.
    """

    name: str
    optimizer: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    reference: bool = True
    descends: float = 0.1
    batched: float = 0.0
    state: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    warns: str = ""
    scale_free: bool = True
    averages: bool = True
    rests: bool = True

    def __post_init__(self) -> None:
        if not self.shapes:
            object.__setattr__(self, "shapes", ANY if self.elementwise else MATRICES)

    @property
    def elementwise(self) -> bool:
        """Whether vectors are allowed."""
        return registry.entry(self.optimizer).elementwise

    def make(self, parameters: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer, on tensors, pairs or groups."""
        with pytest.warns(UserWarning, match=self.warns) if self.warns else nullcontext():
            return registry.entry(self.optimizer).load()(parameters, **{**self.kwargs, **kwargs})

    def __str__(self) -> str:
        return self.name


def _rows(
    optimizer: str, base: dict[str, Any], variants: dict[str, dict[str, Any]], **same: Any
) -> list[OptimizerCase]:
    return [
        OptimizerCase(
            name="_".join(filter(None, (optimizer, label))),
            optimizer=optimizer,
            kwargs={**base, **{k: v for k, v in options.items() if k not in OptimizerCase.__annotations__}},
            **{**same, **{k: v for k, v in options.items() if k in OptimizerCase.__annotations__}},
        )
        for label, options in variants.items()
    ]


_ADAM = ("step", "exp_avg", "exp_avg_sq")
_SOAP = (*_ADAM, "L", "R", "Q_L", "Q_R")
_EIGVALS = ("eigvals_L", "eigvals_R")
_KL: dict[str, Any] = {"use_kl_shampoo": True, "state": (*_SOAP, *_EIGVALS)}
_DECAY = {
    method: {"weight_decay": 0.1, "weight_decay_method": method}
    for method in ("independent", "l2", "palm", "decoupled")
}

_NUCLEAR: dict[str, Any] = {"state": ("momentum_buffer",), "batched": 1e-5, "scale_free": False}
# The first basis is that of one gradient: of the null space of a long side it holds some vectors by accident.
_OVERLAP: dict[str, Any] = {"overlap": True, "shapes": ((7, 7), (6, 6))}
_BRAKE: dict[str, Any] = {"weight_update_hook": ("radial_brake", 0.5, 0.8), "rests": False}

CASES: list[OptimizerCase] = [
    *_rows(
        "adamw",
        {"lr": 0.05},
        {
            "": {},
            "uncorrected": {"correct_bias": False},
            "nesterov": {"nesterov": True},
            "brake": {**_BRAKE, "reference": False, "shapes": ((8, 6), (5,))},
            "floor": {"weight_update_hook": ("update_floor", 1.5), "reference": False, "shapes": ((8, 6), (5,))},
            **_DECAY,
        },
        state=_ADAM,
    ),
    *_rows(
        "laprop",
        {"lr": 0.1},
        {
            "": {},
            "short": {"betas": (0.9, 0.65)},
            "uncorrected": {"correct_bias": False},
            "frob": {"frob_normalize": True, "rests": False, "shapes": ((8, 6), (5,))},
            "l2": _DECAY["l2"],
        },
        averages=False,
        state=_ADAM,
    ),
    *_rows("lion", {"lr": 0.06}, {"": {}, "palm": _DECAY["palm"]}, state=("exp_avg",)),
    *_rows(
        "signum",
        {"lr": 0.06},
        {
            "": {},
            "nesterov": {"nesterov": True},
            "shape_scaling": {"lr": 0.4, "use_shape_scaling": True, "shapes": MATRICES},
        },
        state=("step", "exp_avg"),
    ),
    *_rows(
        "ademamix",
        {"lr": 0.03, "betas": (0.9, 0.999, 0.99)},
        {
            "": {},
            "warmed": {"num_beta_slow_warmup_steps": 5, "num_alpha_warmup_steps": 6, "alpha": 5.0},
            "uncorrected": {"correct_bias": False},
        },
        state=("step", "exp_avg_fast", "exp_avg_slow", "exp_avg_sq"),
    ),
    *_rows(
        "sim_ademamix",
        {"lr": 0.03, "betas": (0.99, 0.999)},
        {"": {}, "warmed": {"num_beta_fast_warmup_steps": 5, "min_beta_fast": 0.5}},
        state=_ADAM,
    ),
    *_rows(
        "madam",
        {"lr": 0.05},
        {"": {}, "uncorrected": {"correct_bias": False, "scale_log2": 0}},
        state=("step", "exp_avg", "exp_avg_sq_scaled"),
    ),
    # Gradients above a norm of 1 are cut to it, and others are not.
    *_rows(
        "mars",
        {"lr": 0.05},
        {"": {}, "strong": {"gamma": 0.3, "betas": (0.8, 0.95), **_DECAY["l2"]}},
        averages=False,
        state=(*_ADAM, "last_grad"),
        batched=1e-5,
        scale_free=False,
    ),
    *_rows("rmsprop", {"lr": 0.03}, {"": {}, "l2": _DECAY["l2"]}, averages=False, state=("exp_avg_sq",)),
    *_rows(
        "muon",
        {"lr": 0.05, "fp32_matmul_prec": "highest"},
        {
            "": {},
            "nesterov": {"nesterov": True},
            "bf16": {"fp32_matmul_prec": "medium", "reference": False, "batched": 0.02},
            "simple": {"coefficient_type": "simple"},
            "polar_express": {"coefficient_type": "polar_express", "num_ns_steps": 8},
            # No margin for rounding is in its polynomials; 1e-4 comes of it on some CPUs.
            "cans": {"coefficient_type": "cans", "batched": 1e-3},
            "aol": {"coefficient_type": "aol", "num_ns_steps": 4, "warns": "wrong sign", "descends": 0.2},
            "deepseekv4": {"coefficient_type": "deepseekv4", "num_ns_steps": 10},
            "cubic5": {"coefficient_type": "cubic5"},
            "custom": {
                "coefficient_type": "custom",
                "num_ns_steps": 6,
                "custom_coefficient_sets": [(3.0, -3.2, 1.2), (1.5, -0.5, 0.0)],
            },
            "shape_scaling": {"lr": 0.2, "scale_mode": "shape_scaling"},
            "unit_rms_norm": {"lr": 0.4, "scale_mode": "unit_rms_norm", "extra_scale_factor": 0.5},
            "l2": _DECAY["l2"],
            "gram": {"orthogonalizer": "gram_newton_schulz"},
            "qdwh": {"orthogonalizer": "qdwh"},
            "svd": {"orthogonalizer": "svd"},
            "relative": {"weight_update_hook": "relative_update"},
            "row_floor": {"weight_update_hook": ("row_update_floor", 1.0), "weight_decay": 0.1},
            "spectral_decay": {
                "weight_update_hook": ("spectral_weight_decay", 4.0, 0.5),
                "reference": False,
                "rests": False,
                "batched": 1e-3,  # the sign of s - 4 is eight steps of Polar Express, whose slope at 0 is 6000
            },
        },
        state=("momentum_buffer",),
        batched=1e-5,
    ),
    *_rows(
        "adaptive_muon",
        {"lr": 0.05, "momentum": 0.95, "weight_decay": 0.01, "fp32_matmul_prec": "highest"},
        {
            "": {},
            "published": {"lr": 0.02, "adamuon_scale": "published"},
            "normuon": {"moment2_method": "normuon"},
            "namo": {"lr": 0.2, "moment2_method": "namo"},
        },
        state=("momentum_buffer", "moment2_buffer"),
        batched=1e-5,
    ),
    *_rows(
        "dion2",
        {"lr": 0.1, "fp32_matmul_prec": "highest"},
        {
            "": {},
            "half": {"fraction": 0.5, "momentum": 0.9, "scale_mode": "shape_scaling", "lr": 0.3, **_DECAY["l2"]},
            "whole": {"fraction": 1.0, "orthogonalizer": "qdwh"},
        },
        averages=False,
        state=("momentum_buffer",),
        batched=1e-5,
    ),
    *_rows(
        "dion3",
        {"lr": 0.1, "fp32_matmul_prec": "highest"},
        {"": {}, "half": {"fraction": 0.5, "beta2": 0.8, "weight_decay": 0.1}},
        averages=False,
        state=("momentum_buffer", "moment2_buffer"),
        batched=1e-5,
    ),
    *_rows("mop", {"lr": 0.3}, {"": {}, "spectral": {"lr": 0.05, "scale_mode": "spectral"}}, **_NUCLEAR),
    *_rows("polargrad", {"lr": 0.3}, {"": {}, "svd": {"orthogonalizer": "svd", "nesterov": True}}, **_NUCLEAR),
    *_rows(
        "scion",
        {"lr": 0.2, "fp32_matmul_prec": "highest"},
        {
            "": {},
            "sign": {"norm": "sign", "spectral_radius": 2.0, "shapes": ((8, 6), (5,), ())},
            "row": {"norm": "row", "weight_decay": 0.5, "spectral_radius": 0.5},
        },
        state=("momentum_buffer",),
        batched=1e-5,
    ),
    *_rows(
        "spel",
        {"lr": 0.1, "fp32_matmul_prec": "highest"},
        {
            "": {},
            "qdwh": {"orthogonalizer": "qdwh"},
            "scaled": {"scale_mode": "unit_rms_to_rms_norm"},
            "tangent": {"scale_mode": "unit_rms_to_rms_norm", "tangent": True, "nesterov": True},
        },
        state=("momentum_buffer",),
        batched=1e-5,
        rests=False,
    ),
    *_rows(
        "sinkhorn",
        {"lr": 0.3},
        {"": {}, "three": {"num_steps": 3, "zero_row_threshold": 0.6, "lr_correction": 0.3, **_DECAY["l2"]}},
        state=("momentum_buffer",),
        batched=1e-5,
    ),
    *_rows(
        "muon_hyperball",
        {"lr": 0.05, "fp32_matmul_prec": "highest"},
        {"": {"hyperball_radius": 5.0}, "own_norm": {}},
        state=("momentum_buffer",),
        batched=1e-5,
        rests=False,
    ),
    *_rows(
        "muon_mix",
        {"lr": 0.05, "fp32_matmul_prec": "highest"},
        {"": {}, "nesterov": {"nesterov": True, "slow_momentum": 0.9, "momentum": 0.7, "slow_share": 0.8}},
        state=("momentum_buffer", "slow_buffer"),
        batched=1e-5,
    ),
    *_rows(
        "muown",
        {"lr": 0.05, "adam_eps": 1e-30, "fp32_matmul_prec": "highest"},
        {"": {}, "nesterov_palm": {"nesterov": True, **_DECAY["palm"]}},
        averages=False,
        state=("step", "g", "v_norm", "momentum_buffer", "m_g", "v_g"),
        batched=1e-4,
        rests=False,
    ),
    *_rows(
        "soap",
        {"lr": 0.1},
        {
            "": {},
            "kl": {**_KL},
            "kl_floor": {**_KL, "relative_floor": 0.3},
            "eigh": {"use_eigh": True},
            "nesterov": {"nesterov": True},
            "uncorrected": {"correct_bias": False, "descends": 0.2},
            "factors_uncorrected": {"correct_shampoo_beta_bias": False},
            "clipped": {"max_update_rms": 0.2, "descends": 0.5},
            "two_iterations": {"power_iter_steps": 2},
            "every_third": {"precondition_frequency": 3},
            "ramp": {"precondition_frequency": 3, "refresh_ramp": 2},
            "one_sided": {"max_precond_dim": 6},
            "no_side": {"max_precond_dim": 5},
            "kl_one_sided": {"max_precond_dim": 6, **_KL},
            "overlap": _OVERLAP,
            "kl_overlap": {**_OVERLAP, **_KL},
            "overlap_every_third": {**_OVERLAP, "precondition_frequency": 3, **_DECAY["l2"]},
            "hyperball": {"weight_update_hook": "hyperball", "rests": False},
            "kl_hyperball": {
                "weight_update_hook": ("hyperball", 5.0),
                **_KL,
                "rests": False,
            },
            "l2": _DECAY["l2"],
        },
        state=_SOAP,
        batched=1e-3,
    ),
    # The published start is ill-conditioned by design: its second update follows rounding errors, and where the first
    # factor has a null space, which of its vectors the basis holds is an accident too.
    *_rows(
        "soap",
        {"lr": 0.05, "first_step": "eigenbasis", "eps": 1e-2},
        {"published": {}, "published_kl": {**_KL}},
        state=_SOAP,
        batched=0.5,
        descends=0.5,
        shapes=((7, 7), (6, 6)),
    ),
    *_rows(
        "rekls",
        {"lr": 0.1},
        {"": {}, "every_third": {"precondition_frequency": 3}, "overlap": _OVERLAP},
        state=_KL["state"],
        batched=1e-3,
    ),
    # By another name soap_kl and rekls.
    *_rows("kl_soap", {"lr": 0.1}, {"": {}}, state=_KL["state"], batched=1e-3),
    *_rows("rekls_v3", {"lr": 0.1}, {"": {}}, state=_KL["state"], batched=1e-3),
    # Shards are in tests/compat/test_tp_rekls.py; alone it is rekls.
    *_rows("tp_rekls", {"lr": 0.1}, {"": {}}, state=_KL["state"], batched=1e-3),
    *_rows("kl_m_soap", {"lr": 0.1}, {"": {}, "l2": _DECAY["l2"]}, state=_KL["state"], batched=1e-3),
    *_rows(
        "soap_muon",
        {"lr": 0.05},
        {"": {}, "kl": {**_KL, "scale_mode": "shape_scaling", "lr": 0.2}, "l2": _DECAY["l2"]},
        state=_SOAP,
        batched=1e-2,
    ),
    # A sign of an element near zero is up to rounding.
    *_rows(
        "splus",
        {"lr": 0.5, "precondition_frequency": 1},
        {"": {}, "iterated": {"use_eigh": False, "weight_decay": 0.1, "precondition_frequency": 3}},
        state=("step", "momentum_buffer", "L", "R", "Q_L", "Q_R"),
        batched=1e-3,
    ),
    # Its stacks are in tests/engine/test_matrix_view.py, as the view "joined".
    *_rows("stacked_soap", {"lr": 0.1}, {"": {}}, state=_KL["state"], batched=1e-3),
    *_rows(
        "kl_shampoo",
        {"lr": 0.1},
        {
            "": {},
            "eigh": {"use_eigh": True, "precondition_frequency": 3},
            "overlap_ramp": {**_OVERLAP, "precondition_frequency": 4, "refresh_ramp": 1},
            "one_sided": {"max_precond_dim": 6, "shapes": ((8, 6), (6, 8))},
            "overlap": _OVERLAP,
        },
        state=("step", "exp_avg", "L", "R", "Q_L", "Q_R", *_EIGVALS),
        batched=1e-3,
    ),
    *_rows(
        "moso",
        {"lr": 0.05},
        {
            "": {},
            "clipped": {"max_update_rms": 0.2, "descends": 0.5},
            "published": {"first_step": "eigenbasis", "correct_bias": False, "eps": 1e-2, "descends": 0.5},
            "l2": _DECAY["l2"],
        },
        state=("step", "momentum_buffer", "exp_avg_sq", "M", "Q_M"),
        batched=1e-3,
    ),
    *_rows(
        "shampoo",
        {"lr": 0.3},
        # Square roots on both sides: the update grows as gradients shrink, so the rate is small.
        {
            "": {},
            "square_root": {"lr": 0.03, "p_root_inv": 2, "momentum": 0.5, **_DECAY["l2"]},
            "one_sided": {"max_precond_dim": 6, "shapes": ((8, 6), (6, 8))},
            "no_side": {"max_precond_dim": 5, "scale_free": False, "descends": 0.3},
        },
        state=("step", "exp_avg", "L", "R"),
        batched=1e-3,
    ),
    # The noise has a size of its own, so the update sees the scale of the gradients.
    *_rows(
        "psgd_pro",
        {"lr": 0.1},
        {
            "": {},
            "decaying": {"warmup_steps": 1, "precond_lr": 0.4, "beta_lip": 0.5, "seed": 2**40 + 5},
            "clipped": {"max_update_rms": 0.2, "descends": 0.5, **_DECAY["l2"]},
            "one_diagonal": {"max_precond_dim": 6, "shapes": ((8, 6), (6, 8))},
            "diagonals": {"max_precond_dim": 5},
        },
        state=("step", "exp_avg", "Q_0", "Q_1", "L_0", "L_1"),
        batched=1e-3,
        scale_free=False,
    ),
    *_rows(
        "oblique_sgd",
        {"lr": 1.0},
        {
            "": {},
            "rows": {"dim": 1, "momentum": 0.0, "weight_decay": 0.1},
            "rms": {"scale_mode": "unit_rms_norm", "weight_decay": 0.1},
        },
        state=("momentum_buffer",),
        rests=False,
        scale_free=False,
    ),
    *_rows(
        "oblique_adam",
        {"lr": 0.05},
        {"": {}, "published": {"correct_bias": "published"}, "rows": {"dim": 1, "correct_bias": False}},
        state=_ADAM,
        rests=False,
    ),
    *_rows(
        "oblique_steepest_sgd",
        {"lr": 0.1, "scale_mode": "unit_l2_norm"},
        {"": {}, "rows": {"dim": 1, "weight_decay": 0.1, "momentum": 0.0}, "rms": {"scale_mode": "unit_rms_norm"}},
        state=("momentum_buffer",),
        rests=False,
    ),
    *_rows(
        "oblique_steepest_adam",
        {"lr": 0.1, "scale_mode": "unit_l2_norm"},
        {"": {}, "rows": {"dim": 1, "correct_bias": False, "scale_mode": "unit_rms_norm"}},
        state=_ADAM,
        rests=False,
    ),
    # Which targets have the same singular values is up to chance. With weight decay every part of the state moves.
    *_rows(
        "iso",
        {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01},
        {"": {}, **{name: {"retraction": name} for name in ("polar", "cayley", "newton_schulz")}},
        averages=False,
        state=("step", "u", "sigma", "v", "momentum_u", "momentum_v"),
        batched=1e-4,
        rests=False,
        scale_free=False,
        descends=0.3,
    ),
    # Rank 8 holds every matrix of the table whole; the truncated row keeps half of the singular values.
    *_rows(
        "spectron",
        {"lr": 0.3, "rank": 8, "fp32_matmul_prec": "highest"},
        {
            "": {},
            "truncated": {"rank_ratio": 0.5, "truncation_tolerance": 1.0, "descends": 0.9},
            "l2": _DECAY["l2"],
        },
        averages=False,
        state=("step", "factor_A", "factor_B", "momentum_A", "momentum_B", "u_A", "u_B"),
        batched=1e-4,
        rests=False,
    ),
]
SEEDS = [case for case in CASES if case.name in registry.OPTIMIZERS]


def parameters(
    case: OptimizerCase,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    copies: int = 2,
    seed: int = 0,
) -> list[torch.nn.Parameter]:
    """`copies` parameters of each of the case's shapes; the numbers do not depend on dtype and device."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype))
        for shape in case.shapes
        for _ in range(copies)
    ]


def set_gradients(
    ps: list[torch.nn.Parameter], t: int, missing: Callable[[int, int], bool] = lambda i, t: False
) -> list[Tensor | None]:
    """Give every parameter the gradient of step t: W plus noise, the same numbers in every dtype.

    `missing(i, t)` says where there is none.
    """
    generator = torch.Generator().manual_seed(1000 + t)
    for i, p in enumerate(ps):
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device)
        p.grad = None if missing(i, t) else (0.5 * noise + p.detach().double()).to(p.dtype)
    return [p.grad for p in ps]


def run(
    case: OptimizerCase,
    steps: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    missing: Callable[[int, int], bool] = lambda i, t: False,
    schedule: Callable[[int], float] | None = None,
    **kwargs: Any,
) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """A few steps from the table's start; the parameters after them, and the optimizer."""
    ps = parameters(case, dtype, device)
    optimizer = case.make(ps, **kwargs)
    for t in range(1, steps + 1):
        set_gradients(ps, t, missing)
        if schedule is not None:
            for group in optimizer.param_groups:
                group["lr"] = schedule(t)
        optimizer.step()
    return ps, optimizer


def distance(a: Sequence[Tensor], b: Sequence[Tensor], start: Sequence[Tensor]) -> float:
    """Largest difference of a parameter relative to how far it has moved."""
    return max(
        float((x - y).norm() / (x - s).norm().clamp_min(1e-30))
        for x, y, s in ((t.detach().cpu().double() for t in xys) for xys in zip(a, b, start, strict=True))
    )
