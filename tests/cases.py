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
_DECAY = {
    method: {"weight_decay": 0.1, "weight_decay_method": method}
    for method in ("independent", "l2", "palm", "decoupled")
}

CASES: list[OptimizerCase] = [
    *_rows("adamw", {"lr": 0.05}, {"": {}, "uncorrected": {"correct_bias": False}, **_DECAY}, state=_ADAM),
    *_rows(
        "laprop",
        {"lr": 0.1},
        {
            "": {},
            "short": {"betas": (0.9, 0.65)},
            "uncorrected": {"correct_bias": False},
            "frob": {"frob_normalize": True, "descends": 0.95, "shapes": ((8, 6), (5,))},
            "l2": _DECAY["l2"],
        },
        state=_ADAM,
    ),
    *_rows("lion", {"lr": 0.06}, {"": {}, "palm": _DECAY["palm"]}, state=("exp_avg",)),
    *_rows(
        "muon",
        {"lr": 0.05, "fp32_matmul_prec": "highest"},
        {
            "": {},
            "nesterov": {"nesterov": True},
            "bf16": {"fp32_matmul_prec": "medium", "reference": False, "batched": 0.02},
            "simple": {"coefficient_type": "simple"},
            "polar_express": {"coefficient_type": "polar_express", "num_ns_steps": 8},
            "cans": {"coefficient_type": "cans"},
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
        },
        state=("momentum_buffer",),
        batched=1e-5,
    ),
    *_rows(
        "soap",
        {"lr": 0.1},
        {
            "": {},
            "kl": {"use_kl_shampoo": True},
            "kl_floor": {"use_kl_shampoo": True, "relative_floor": 0.3},
            "eigh": {"use_eigh": True},
            "nesterov": {"nesterov": True},
            "uncorrected": {"correct_bias": False, "descends": 0.2},
            "factors_uncorrected": {"correct_shampoo_beta_bias": False},
            "clipped": {"max_update_rms": 0.2, "descends": 0.5},
            "two_iterations": {"power_iter_steps": 2},
            "every_third": {"precondition_frequency": 3},
            "one_sided": {"max_precond_dim": 6},
            "no_side": {"max_precond_dim": 5},
            "kl_one_sided": {"max_precond_dim": 6, "use_kl_shampoo": True},
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
        {"published": {}, "published_kl": {"use_kl_shampoo": True}},
        state=_SOAP,
        batched=0.5,
        descends=0.5,
        shapes=((7, 7), (6, 6)),
    ),
    *_rows("rekls", {"lr": 0.1}, {"": {}, "every_third": {"precondition_frequency": 3}}, state=_SOAP, batched=1e-3),
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
