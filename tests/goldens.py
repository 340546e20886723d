"""Golden numbers: five steps of published implementations on one 8x6 parameter.

Weights and gradients come from closed forms, so every implementation sees the same numbers; ``CASES`` says
with which hyper-parameters each golden case was made.

One number is not in any recipe. The first gradient has rank 6, so the first left factor G G^T has a null
space of two dimensions, and which two of its vectors an eigensolver returns is an accident of float32
rounding, another one on another machine. Where the next basis is made from the last one (orthogonal
iteration), that accident decides the rest of the run: the final weights of ``soap_eps1e-2`` move by up to
2.6e-2 with it. Where every basis is a decomposition of its own (``soap_eigh_eps1e-2``) it decides only which
column of the second moment a null vector takes up, and for 80 of 90 degrees that is the same one; with the
other the weights move by 8e-3. ``rekls_eps1e-2`` is the same whatever it is.
``GoldenCase.null_angle`` is the accident of the golden run, found by a search over the one free angle;
``null_space`` gives the two vectors, and ``golden_reference`` a reference that starts with them. An
implementation under test takes its first step, then the reference's weight and state after that step, and
goes on by itself.
"""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tests.reference import Reference, make_reference
from tests.reference.soap import ReferenceSOAP

SHAPE = (8, 6)
STEPS = 5
_FILE = Path(__file__).parent / "data" / "five_steps_8x6.json"


@dataclass(frozen=True)
class Golden:
    """What a published implementation arrived at."""

    final: Tensor  # 8x6, the parameter after five steps
    update_rms: list[float]  # of W_before - W_after, one for each step
    state: dict[str, str]  # state key -> "dtype(shape)", or the value itself for a number


@dataclass(frozen=True)
class GoldenCase:
    """How a golden case is made: optimizer, hyper-parameters, and how close an implementation must come."""

    optimizer: str
    kwargs: Mapping[str, Any]
    tolerance: float  # largest absolute difference of the final weights
    null_angle: float | None = None  # degrees; see the top of this file


@functools.cache
def _cases() -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = json.loads(_FILE.read_text(encoding="utf-8"))["cases"]
    return {name.removesuffix("|8x6"): case for name, case in cases.items()}


def golden_names() -> list[str]:
    """Every case in the file."""
    return list(_cases())


def golden(name: str, dtype: torch.dtype = torch.float64) -> Golden:
    """The golden numbers of one case; ``float32`` gives the published numbers bit for bit."""
    case = _cases()[name]
    final = torch.tensor(case["final"], dtype=dtype).reshape(SHAPE)
    return Golden(final, list(case["update_rms"]), dict(case["state"]))


def initial_weight(dtype: torch.dtype = torch.float32) -> Tensor:
    """W[i, j] = cos(0.7 i + 1.3 j), rounded to float32 first."""
    i, j = _indices()
    return torch.cos(0.7 * i + 1.3 * j).float().to(dtype)


def golden_start(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight that a golden case starts from; on the oblique manifold its columns have norm 1."""
    W = initial_weight()
    return (torch.nn.functional.normalize(W, dim=0) if name.startswith("oblique") else W).to(dtype)


def gradient(t: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """G_t[i, j] = sin(0.9 i t + 1.7 j + 0.3 t^2 + 0.11 i j) at step t = 1 .. 5, rounded to float32 first."""
    i, j = _indices()
    return torch.sin(0.9 * i * t + 1.7 * j + 0.3 * t**2 + 0.11 * i * j).float().to(dtype)


def null_space(angle: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Two orthonormal columns (8x2) that G_1^T maps to zero, turned by ``angle`` degrees.

    At angle 0 the first is the unit vector e_0 projected on the null space. Signs do not matter: no update of
    the optimizer depends on them.
    """
    G = gradient(1, torch.float64)
    U = torch.linalg.svd(G, full_matrices=False).U
    project = torch.eye(SHAPE[0], dtype=torch.float64) - U @ U.T
    first = project[:, 0] / project[:, 0].norm()
    second = project[:, 1] - (project[:, 1] @ first) * first
    second = second / second.norm()
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return torch.stack([cos * first + sin * second, cos * second - sin * first], dim=1).to(dtype)


def _case(optimizer: str, tolerance: float, null_angle: float | None = None, **kwargs: Any) -> GoldenCase:
    return GoldenCase(optimizer, MappingProxyType({"lr": 0.01, **kwargs}), tolerance, null_angle)


def _muon(tolerance: float = 2e-5, **kwargs: Any) -> GoldenCase:
    return _case("muon", tolerance, **{"fp32_matmul_prec": "highest", **kwargs})


def _adaptive(**kwargs: Any) -> GoldenCase:
    return _case("adaptive_muon", 2e-5, momentum=0.95, weight_decay=0.1, fp32_matmul_prec="highest", **kwargs)


def _soap(null_angle: float | None = None, optimizer: str = "soap", **kwargs: Any) -> GoldenCase:
    # Rounding, on 25 imitated machines: 4e-5. With the l2 term the first step depends on the null vectors by 2e-4.
    return _case(optimizer, 3e-4, null_angle, eps=1e-2, first_step="eigenbasis", **kwargs)


def golden_reference(name: str) -> Reference:
    """The reference of a golden case with its hyper-parameters and, where it has one, its null space."""
    case = CASES[name]
    reference = make_reference(case.optimizer, **case.kwargs)
    if case.null_angle is not None:
        assert isinstance(reference, ReferenceSOAP)
        reference.left_null_space = null_space(case.null_angle)
    return reference


# Whatever is not named has the library's default value.
CASES: dict[str, GoldenCase] = {
    "muon": _muon(),
    "muon_nesterov_l2": _muon(nesterov=True, weight_decay=0.1, weight_decay_method="l2"),
    "muon_independent": _muon(weight_decay=0.1, weight_decay_method="independent"),
    "muon_palm": _muon(weight_decay=0.1, weight_decay_method="palm"),
    "muon_medium_bf16": _muon(tolerance=2e-2, fp32_matmul_prec="medium"),
    "muon_shape": _muon(scale_mode="shape_scaling"),
    "muon_unit_rms": _muon(scale_mode="unit_rms_norm", extra_scale_factor=0.2),
    "muon_simple": _muon(coefficient_type="simple"),
    "muon_polar_express": _muon(coefficient_type="polar_express", num_ns_steps=8),
    "muon_cans": _muon(coefficient_type="cans"),
    "muon_aol": _muon(coefficient_type="aol", num_ns_steps=4),
    "muon_deepseekv4": _muon(coefficient_type="deepseekv4", num_ns_steps=10),
    "muon_cubic5": _muon(coefficient_type="cubic5"),
    "muon_radial_brake": _muon(weight_update_hook="radial_brake"),
    "muon_relative": _muon(weight_update_hook="relative_update"),
    "muon_hyperball_hook_r5": _muon(weight_update_hook=("hyperball", 5.0)),
    "adaptive_adamuon": _adaptive(adamuon_scale="published"),
    "adaptive_normuon": _adaptive(moment2_method="normuon"),
    "adaptive_namo": _adaptive(moment2_method="namo"),
    "mop": _case("mop", 2e-5),
    "mop_spectral": _case("mop", 2e-5, scale_mode="spectral"),
    "polargrad": _case("polargrad", 2e-5),
    "scion": _case("scion", 2e-5, fp32_matmul_prec="highest"),
    "spel": _case("spel", 2e-5, fp32_matmul_prec="highest"),
    "muown": _case("muown", 2e-5, fp32_matmul_prec="highest"),
    "soap_eps1e-2": _soap(null_angle=35.764),
    "soap_eigh_eps1e-2": _soap(null_angle=10.0, use_eigh=True),
    "soap_kl_eps1e-2": _soap(null_angle=89.124, use_kl_shampoo=True),
    "rekls_eps1e-2": _soap(optimizer="rekls"),
    "soap_nesterov_nobias_eps1e-2": _soap(null_angle=13.633, nesterov=True, correct_bias=False),
    "soap_clip_l2_eps1e-2": _soap(null_angle=35.764, max_update_rms=0.2, weight_decay=0.1, weight_decay_method="l2"),
    "laprop": _case("laprop", 2e-5, betas=(0.9, 0.65)),
    "laprop_frob": _case("laprop", 2e-5, frob_normalize=True),
    "lion": _case("lion", 2e-5),
    "signum": _case("signum", 2e-5, weight_decay=0.1),
    "signum_nesterov_shape": _case("signum", 2e-5, nesterov=True, use_shape_scaling=True),
    "sim_ademamix": _case("sim_ademamix", 2e-5),
    "oblique_sgd": _case("oblique_sgd", 2e-5),
    "oblique_adam": _case("oblique_adam", 2e-5, correct_bias="published"),
    "iso_qr": _case("iso", 2e-5),
}


def _indices() -> tuple[Tensor, Tensor]:
    i = torch.arange(SHAPE[0], dtype=torch.float64)[:, None]
    j = torch.arange(SHAPE[1], dtype=torch.float64)[None, :]
    return i, j
