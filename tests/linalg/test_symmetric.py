"""Symmetric products by blocks are those of whole matrices, to rounding, and symmetric bit for bit off the diagonal."""

import pytest
import torch

from emerging_optimizers.linalg.flops import FlopCounter
from emerging_optimizers.linalg.kernels import routes, symmetric


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {("cpu", dtype): routes.BlockRoute(depth=4, rows=6, least=3) for dtype in (torch.float32, torch.bfloat16)}
    monkeypatch.setattr(routes, "BLOCKS", table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "M", "K"), [(1, 6, 9), (2, 13, 5), (3, 27, 40)])
def test_gram(dtype: torch.dtype, B: int, M: int, K: int) -> None:
    x_BMK = torch.randn(B, M, K).to(dtype)
    assert routes.least_block(x_BMK) == 3
    out_BMM = symmetric.gram(x_BMK)
    exact_BMM = x_BMK.double() @ x_BMK.double().mT
    torch.testing.assert_close(out_BMM.double(), exact_BMM, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert torch.equal(out_BMM[:, M // 2 :, : M // 2], out_BMM[:, : M // 2, M // 2 :].mT)


def test_transposed_matrices() -> None:
    x_BMK = torch.randn(2, 8, 12).mT
    torch.testing.assert_close(symmetric.gram(x_BMK), x_BMK @ x_BMK.mT)


@pytest.mark.parametrize("M", [6, 13, 32])
def test_products_of_polynomials_of_one_matrix(M: int) -> None:
    a = symmetric.gram(torch.randn(2, M, M) / M)
    square = a @ a
    torch.testing.assert_close(
        symmetric.symmetric_product(a, square, a, beta=0.5, alpha=-2.0), 0.5 * a - 2 * a @ square, rtol=1e-4, atol=1e-6
    )


def test_gradients_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 8, 8, dtype=torch.float32, requires_grad=True)
    assert routes.least_block(x) is None
    symmetric.gram(x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach().sum(dim=1, keepdim=True).expand(1, 8, 8))


def test_what_is_not_in_the_table_is_multiplied_whole() -> None:
    assert routes.least_block(torch.empty(1, 64, 64, dtype=torch.float64)) is None
    assert routes.least_block(torch.empty(1, 5, 64)) is None
    assert routes.least_block(torch.empty(1, 64, 3)) is None
    assert routes.least_block(torch.empty(1, 64, 64, device="meta")) is None


@pytest.mark.parametrize(("B", "M", "K"), [(1, 6, 9), (2, 13, 5), (3, 27, 40)])
def test_an_operator_whose_count_is_that_of_its_products(B: int, M: int, K: int) -> None:
    with FlopCounter() as counter:
        symmetric.gram(torch.empty(B, M, K))
    with FlopCounter() as whole:
        for x_MK in torch.empty(B, M, K):
            symmetric._by_blocks(x_MK, x_MK, None, 1.0, 1.0, torch.empty(M, M), 3)
    assert counter.flops == whole.flops < 2 * B * M * M * K
