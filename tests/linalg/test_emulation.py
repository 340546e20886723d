from contextlib import ExitStack, suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emerging_optimizers.linalg.emulation import emulate_bf16, emulate_tf32, round_to_bf16, round_to_tf32
from emerging_optimizers.linalg.precision import fp32_matmul_precision
from emerging_optimizers.soap.soap import SOAP

NORMAL = st.floats(min_value=2.0**-126, max_value=2.0**127, width=32)

# Everything that comes down to a matrix product: of a (B, M, K), b (B, K, N) and c (B, M, N).
PRODUCTS = {
    "mm": lambda a, b, c: torch.mm(a[0], b[0]),
    "bmm": lambda a, b, c: torch.bmm(a, b),
    "addmm": lambda a, b, c: torch.addmm(c[0], a[0], b[0], beta=0.5, alpha=2),
    "addmm_": lambda a, b, c: c[0].clone().addmm_(a[0], b[0]),
    "baddbmm": lambda a, b, c: torch.baddbmm(c, a, b, beta=0.5, alpha=2),
    "baddbmm_": lambda a, b, c: c.clone().baddbmm_(a, b),
    "addbmm": lambda a, b, c: torch.addbmm(c[0], a, b),
    "@ 2-D": lambda a, b, c: a[0] @ b[0],
    "@ 3-D": lambda a, b, c: a @ b,
    "@ broadcast": lambda a, b, c: a @ b[0],
    "@ transposed": lambda a, b, c: b.mT @ a.mT,
    "einsum": lambda a, b, c: torch.einsum("bmk,bkn->mn", a, b),
    "tensordot": lambda a, b, c: torch.tensordot(a, b, dims=([0, 2], [0, 1])),
    "linear": lambda a, b, c: torch.nn.functional.linear(a, b[0].mT.contiguous(), c[0, 0]),
    "out": lambda a, b, c: torch.mm(a[0], b[0], out=torch.empty_like(c[0])),
}
MODES = {
    "tf32": (emulate_tf32, round_to_tf32, ("high", "medium")),
    "bf16": (emulate_bf16, round_to_bf16, ("medium",)),
}


@pytest.fixture
def abc(device):
    g = torch.Generator().manual_seed(0)
    shapes = (3, 5, 7), (3, 7, 4), (3, 5, 4)
    return [torch.randn(shape, generator=g).to(device) for shape in shapes]


def by_hand(product, rounding, abc):
    a, b, c = abc
    with fp32_matmul_precision("highest"):
        return product(rounding(a), rounding(b), c)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("product", PRODUCTS)
def test_operands_are_rounded_where_the_precision_allows_it(product, mode, precision, abc):
    emulate, rounding, at = MODES[mode]
    with emulate(), fp32_matmul_precision(precision):
        result = PRODUCTS[product](*abc)
    plain = by_hand(PRODUCTS[product], lambda x: x, abc)
    if precision in at:
        assert torch.equal(result, by_hand(PRODUCTS[product], rounding, abc))
        assert not torch.equal(result, plain)
    elif precision == "highest":
        assert torch.equal(result, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_products_of_other_dtypes_are_not_touched(dtype, abc):
    a, b, _ = (x.to(dtype) for x in abc)
    with fp32_matmul_precision("medium"):
        before = a @ b
        with emulate_tf32(), emulate_bf16():
            assert torch.equal(a @ b, before)


def test_the_backward_pass_is_rounded_too(abc):
    a, b, c = abc
    a.requires_grad_()
    with emulate_tf32(), fp32_matmul_precision("high"):
        (a @ b).backward(c)
    with fp32_matmul_precision("highest"):
        assert torch.equal(a.grad, round_to_tf32(c) @ round_to_tf32(b).mT)


@pytest.mark.parametrize("inner", MODES)
@pytest.mark.parametrize("outer", MODES)
def test_nested_the_inner_one_rounds_where_it_can(inner, outer, abc):
    a, b, _ = abc
    for precision in ("high", "medium"):
        with MODES[outer][0](), MODES[inner][0](), fp32_matmul_precision(precision):
            result = a @ b
        rounding = next((MODES[m][1] for m in (inner, outer) if precision in MODES[m][2]), None)
        if rounding:
            with fp32_matmul_precision("highest"):
                assert torch.equal(result, rounding(a) @ rounding(b))


def test_it_ends_with_its_block_and_with_an_exception(abc):
    a, b, _ = abc
    with fp32_matmul_precision("high"):
        with suppress(ZeroDivisionError), emulate_tf32():
            raise ZeroDivisionError
        before = torch.get_float32_matmul_precision()
        plain = a @ b
        with emulate_tf32():
            assert not torch.equal(a @ b, plain)
            with pytest.raises(RuntimeError):
                a @ a
            assert torch.get_float32_matmul_precision() == before
        assert torch.equal(a @ b, plain)


def test_a_precision_chosen_for_one_backend_counts(abc):
    a, b, _ = abc
    backend = torch.backends.cuda.matmul
    name, saved = torch.get_float32_matmul_precision(), backend.fp32_precision
    try:
        backend.fp32_precision = "tf32"
        with emulate_tf32():
            result = a @ b
    finally:
        torch.set_float32_matmul_precision(name)
        backend.fp32_precision = saved
    with fp32_matmul_precision("highest"):
        assert torch.equal(result, round_to_tf32(a) @ round_to_tf32(b))


@given(st.lists(NORMAL, min_size=1, max_size=20), st.booleans())
def test_a_tf32_number_has_ten_bits_and_is_near(values, negative):
    x = torch.tensor(values) * (-1 if negative else 1)
    rounded = round_to_tf32(x)
    assert not (rounded.view(torch.int32) & 0x1FFF).any()
    assert torch.equal(round_to_tf32(rounded), rounded)
    assert ((rounded.double() - x.double()).abs() <= x.double().abs() * 2.0**-11).all()


@given(st.lists(NORMAL, min_size=1, max_size=20))
def test_a_bf16_number_has_seven_bits_and_is_near(values):
    x = torch.tensor(values)
    rounded = round_to_bf16(x)
    assert not (rounded.view(torch.int32) & 0xFFFF).any()
    assert ((rounded.double() - x.double()).abs() <= x.double() * 2.0**-8).all()


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (1 + 2**-11, 1 + 2**-10),  # a tie, away from zero
        (-1 - 2**-11, -1 - 2**-10),
        (1 + 3 * 2**-11, 1 + 2**-9),
        (1 + 2**-11 - 2**-23, 1.0),
        (0.0, 0.0),
        (float("inf"), float("inf")),
        (float("-inf"), float("-inf")),
        (torch.finfo(torch.float32).max, float("inf")),
    ],
)
def test_tf32_of_single_numbers(value, rounded):
    assert round_to_tf32(torch.tensor(value)).item() == rounded


def test_nan_stays_nan_whatever_its_bits():
    nan = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert round_to_tf32(nan).isnan().all()


@pytest.mark.parametrize("execution", ["stacked", "per_matrix"])
def test_soaps_precisions_decide_which_of_its_products_are_rounded(execution):
    def run(*contexts, **precisions):
        g = torch.Generator().manual_seed(0)
        w = torch.nn.Parameter(torch.zeros(12, 8))
        optimizer = SOAP([w], lr=1.0, execution=execution, **precisions)
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            for _ in range(4):
                w.grad = torch.randn(12, 8, generator=g)
                optimizer.step()
        return w.detach(), optimizer.state[w]["L"]

    all_highest = {"fp32_matmul_prec": "highest", "qr_fp32_matmul_prec": "highest"}
    plain_w, plain_L = run(**all_highest)
    w, L = run(emulate_tf32, **all_highest)
    assert torch.equal(w, plain_w)
    assert torch.equal(L, plain_L)
    w, L = run(emulate_tf32, fp32_matmul_prec="highest", qr_fp32_matmul_prec="high")
    assert torch.equal(L, plain_L)
    assert not torch.equal(w, plain_w)
    w, L = run(emulate_tf32, fp32_matmul_prec="high", qr_fp32_matmul_prec="highest")
    assert not torch.equal(L, plain_L)
    assert torch.allclose(L, plain_L, rtol=1e-2, atol=1e-2)
    coarse = run(emulate_bf16, fp32_matmul_prec="medium", qr_fp32_matmul_prec="highest")[1]
    assert (coarse - plain_L).norm() > 2 * (L - plain_L).norm()
