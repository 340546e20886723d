"""The kernel for symmetric products: interpreted on the CPU, compiled without a device, and on the device.

`make test-kernels` interprets it, where triton is installed.
"""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from emerging_optimizers import Muon
from emerging_optimizers.cost import estimate
from emerging_optimizers.linalg.coefficients import coefficients
from emerging_optimizers.linalg.kernels import routes
from emerging_optimizers.linalg.kernels import syrk as module
from emerging_optimizers.linalg.kernels.syrk import interprets, no_syrk, syrk, why_no_syrk
from emerging_optimizers.linalg.newton_schulz import gram_newton_schulz, newton_schulz
from emerging_optimizers.linalg.precision import fp32_matmul_precision, reduced_precision
from emerging_optimizers.orthogonalized_optimizers import muon_utils

HAS_TRITON = find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
cpu = pytest.param(
    "cpu",
    marks=pytest.mark.skipif(
        not (HAS_TRITON and interprets()), reason="not TRITON_INTERPRET=1 and triton (make test-kernels)"
    ),
)
cuda = pytest.param("cuda", marks=[pytest.mark.gpu, needs_triton])
both = pytest.mark.parametrize("place", [cpu, cuda])
# Of the largest entry: half a unit in the last place, or all of it where the interpreter cuts digits off.
ROUNDING = {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
SIZES = [(1, 1, 1), (3, 37, 70), (2, 130, 65), (1, 129, 1), (2, 200, 300), (5, 16, 8)]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


@both
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("B", "M", "K"), SIZES)
def test_it_is_the_product_in_float64_rounded_once(B: int, M: int, K: int, dtype: torch.dtype, place: str) -> None:
    x = torch.randn(B, M, K).to(place, dtype)
    c = torch.randn(B, M, M)
    c = (c + c.mT).to(place, dtype)
    exact = x.double() @ x.double().mT
    gram = syrk(x)
    assert (gram.dtype, gram.shape) == (dtype, (B, M, M))
    assert error(gram, exact) <= ROUNDING[dtype]
    assert error(syrk(x, c, alpha=0.5, beta=-2.0), 0.5 * exact - 2 * c.double()) <= ROUNDING[dtype]


@both
@pytest.mark.parametrize("M", [70, 200])
def test_the_two_triangles_are_one(M: int, place: str) -> None:
    gram = syrk(torch.randn(2, M, 50, device=place))
    off = torch.ones(M, M, device=place).tril(-128).bool()  # outside of the tiles on the diagonal
    assert torch.equal(gram[:, off], gram.mT[:, off])


@both
@pytest.mark.parametrize("B", [0, 2])
def test_nothing_to_multiply(B: int, place: str) -> None:
    assert syrk(torch.ones(B, 3, 0, device=place)).tolist() == torch.zeros(B, 3, 3).tolist()


VIEWS: dict[str, Any] = {
    "transposed": lambda x: x.mT,
    "every_second": lambda x: x[::2, 1::2, ::3],
    "expanded": lambda x: x[:1].expand(3, -1, -1),
    "rows_backwards_in_memory": lambda x: x.permute(1, 2, 0),
}


@both
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(view: str, place: str) -> None:
    x = VIEWS[view](torch.randn(4, 36, 45, device=place))
    c = torch.randn(x.size(0), x.size(1), x.size(1), device=place)
    c = (c + c.mT).mT
    exact = x.double() @ x.double().mT
    assert error(syrk(x), exact) <= 1e-6
    assert error(syrk(x, c, beta=0.5), exact + 0.5 * c.double()) <= 1e-6


@both
def test_a_matrix_that_is_not_finite_stays_alone(place: str) -> None:
    x = torch.randn(3, 20, 20, device=place)
    expected = syrk(x)
    x[1, 3, 4] = torch.nan
    assert torch.equal(syrk(x)[[0, 2]], expected[[0, 2]])


@both
@pytest.mark.parametrize("function", [newton_schulz, gram_newton_schulz])
@pytest.mark.parametrize(("B", "M", "N"), [(2, 40, 70), (2, 70, 40), (1, 150, 150)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_newton_schulz_is_as_exact_with_it(
    function: Any, B: int, M: int, N: int, dtype: torch.dtype, place: str
) -> None:
    x, sets = torch.randn(B, M, N, device=place), coefficients("quintic", 5)
    exact = torch.linalg.svdvals(function(x.double(), sets))

    def worst(**options: bool) -> float:
        values = torch.linalg.svdvals(function(x, sets, compute_dtype=dtype, **options).double())
        return float((values - exact).abs().max())

    # The interpreter cuts bfloat16 off instead of rounding it, which doubles its error.
    assert worst(use_syrk=True) <= max((5 if place == "cpu" else 2.5) * worst(), 1e-5)


@both
@pytest.mark.parametrize("execution", ["stacked", "per_matrix", "compiled"])
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_muon_with_it_is_muon(precision: str, execution: str, place: str) -> None:
    start = [torch.randn(40, 20), torch.randn(2, 20, 30)]
    found = []
    for use_syrk in (False, True):
        ps = [torch.nn.Parameter(p.clone().to(place)) for p in start]
        options: dict[str, Any] = {"fp32_matmul_prec": precision, "use_syrk": use_syrk, "execution": execution}
        optimizer = Muon(ps, lr=0.1, **options)
        for t in range(3):
            torch.manual_seed(t)
            for p in ps:
                p.grad = torch.randn(p.shape).to(place)
            with reduced_precision("bfloat16"):
                optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in ps]))
    moved = float((found[0] - torch.cat([p.flatten() for p in start]).to(place)).norm())
    assert float((found[1] - found[0]).norm()) <= (1e-4 if precision == "highest" else 0.05) * moved


@both
def test_published_names(place: str) -> None:
    x = torch.randn(2, 20, 30, device=place) / 10
    a, b, c = coefficients("quintic", 1)[0]
    stack = muon_utils.batched_newton_schulz_step(x, a, b, c)
    torch.testing.assert_close(muon_utils.batched_newton_schulz_step_tsyrk(x, a, b, c), stack)
    torch.testing.assert_close(muon_utils.newton_schulz_step_tsyrk(x[0], a, b, c), stack[0])
    torch.testing.assert_close(muon_utils.newton_schulz(x, 5, use_syrk=True), muon_utils.newton_schulz(x, 5))


@both
def test_estimate_counts_half_of_a_product(place: str) -> None:
    w = torch.nn.Parameter(torch.ones(20, 30, device=place))

    def flops(**options: bool) -> float:
        return estimate([w], lambda ps: Muon(ps, **options), seconds=False).flops

    M, N = w.shape
    assert flops() - flops(use_syrk=True) == 5 * (M * (M - 1) * N + M * (M - 1) * M)


@both
def test_a_measured_route_takes_it_unasked(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, sets = torch.randn(1, 40, 70, device=place), coefficients("quintic", 5)
    monkeypatch.setitem(routes.SYRK, (place, torch.float32), 40)
    monkeypatch.setattr(routes, "GRAM", {})
    assert torch.equal(newton_schulz(x, sets), newton_schulz(x, sets, use_syrk=True))
    assert not routes.takes_syrk(x[:, :39])


@pytest.mark.gpu
@needs_triton
def test_tf32_where_torch_says_so() -> None:
    x = torch.randn(2, 256, 512, device="cuda")
    exact = x.double() @ x.double().mT
    with fp32_matmul_precision("high"):
        assert 1e-6 < error(syrk(x), exact) <= 2e-3
    with fp32_matmul_precision("highest"):
        assert error(syrk(x), exact) <= 1e-6


@pytest.mark.skipif(not HAS_TRITON or interprets(), reason="needs triton, and not TRITON_INTERPRET=1")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("kind", "element"), [("bf16", "bf16"), ("tf32", "fp32"), ("ieee", "fp32")])
def test_it_compiles_for_devices_that_are_not_here(kind: str, element: str, capability: int) -> None:
    """And fits: a block of an 80-series card may have 163 KiB of shared memory, but some only 99."""
    import triton
    from triton.backends.compiler import GPUTarget

    from emerging_optimizers.linalg.kernels.syrk_triton import TILES, _syrk

    tile, depth, warps, stages = TILES[kind]
    pointers, numbers = dict.fromkeys("acd", f"*{element}"), {"alpha": "fp32", "beta": "fp32"}
    fixed = {"K": 1000, "ADDS": True, "PRECISION": kind if kind == "ieee" else "tf32", "WIDENS": False}
    fixed |= {"TILE": tile, "DEPTH": depth}
    signature = {name: "constexpr" if name in fixed else "i32" for name in _syrk.arg_names} | pointers | numbers
    source = triton.compiler.ASTSource(
        _syrk, signature, {(_syrk.arg_names.index(name),): value for name, value in fixed.items()}
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert kernel.metadata.shared <= 99 * 1024


def test_what_is_in_the_way_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    w = torch.nn.Parameter(torch.ones(3, 2))
    refused = r"Muon: parameter 'w' of shape \(3, 2\): use_syrk=True is not possible: .*CUDA device, .* on cpu\. Give"
    with pytest.raises(ValueError, match=refused):
        Muon([("w", w)], use_syrk=True)
    with pytest.raises(ValueError, match=r"use_syrk=True is about the products of Newton-Schulz.*'svd' has none"):
        Muon([w], use_syrk=True, orthogonalizer="svd")
    with pytest.raises(ValueError, match=r"newton_schulz: use_syrk=True is not possible: .* on cpu"):
        muon_utils.newton_schulz(torch.ones(2, 2), 5, use_syrk=True)
    assert "float16 and float32, and the products are torch.float64" in str(no_syrk(w.device, torch.float64))
    monkeypatch.setattr(module, "_has_triton", lambda: False)
    assert "pip install triton" in str(why_no_syrk(torch.device("cuda"), torch.bfloat16))


def test_nothing_moves_where_it_is_asked_for_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    w = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = Muon([w])
    optimizer.param_groups[0]["use_syrk"] = True
    w.grad = torch.ones(3, 2)
    with pytest.raises(ValueError, match="use_syrk=True is not possible"):
        optimizer.step()
    assert torch.equal(w, torch.ones(3, 2))
    assert not optimizer.state


@both
def test_wrong_operands_are_named(place: str) -> None:
    x = torch.ones(2, 3, 4, device=place)
    with pytest.raises(ValueError, match=r"takes a stack \(B, M, K\); given is \(3, 4\)"):
        syrk(x[0])
    with pytest.raises(ValueError, match=r"C of shape \(2, 3, 4\)"):
        syrk(x, x)
