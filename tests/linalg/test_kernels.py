"""A faster route computes what the plain one does: singular values against a float64 evaluation of the polynomial."""

import pytest
import torch
from torch import Tensor

from emerging_optimizers.linalg.coefficients import coefficients
from emerging_optimizers.linalg.kernels import routes, spare
from emerging_optimizers.linalg.newton_schulz import newton_schulz, newton_schulz_step

SPECTRA = ("gaussian", "condition_1e3", "rank_8_and_noise")
# Sizes from which the tables take their routes, for `make test-all`: without bfloat16 units one iteration of them in
# bfloat16 takes seconds. In every run the same routes are taken from smaller sizes on.
FROM_THE_TABLE = pytest.param(512, 1280, marks=pytest.mark.slow)


@pytest.fixture
def early_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gram steps as the tables have them, and products by blocks, from 64 rows on."""
    monkeypatch.setattr(routes, "GRAM", {key: route._replace(shorter=64) for key, route in routes.GRAM.items()})
    blocks = {key: routes.BlockRoute(depth=64, rows=64, least=16) for key in routes.BLOCKS}
    monkeypatch.setattr(routes, "BLOCKS", blocks)


def spectrum(kind: str, M: int, N: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, M, N, generator=generator)
    if kind == "condition_1e3":
        U, _, Vh = torch.linalg.svd(x, full_matrices=False)
        return U * torch.logspace(0, -3, M) @ Vh
    if kind == "rank_8_and_noise":
        left, right = torch.randn(1, M, 8, generator=generator), torch.randn(1, 8, N, generator=generator)
        return left @ right + 0.01 * x
    return x


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize(("name", "steps"), [("quintic", 5), ("simple", 5), ("polar_express", 8)])
@pytest.mark.parametrize(("M", "N"), [FROM_THE_TABLE, (64, 256), (80, 200)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.usefixtures("early_routes")
def test_steps_on_the_gram_matrix_are_as_exact_as_the_plain_ones(
    kind: str, name: str, steps: int, M: int, N: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, sets = spectrum(kind, M, N), coefficients(name, steps)
    assert max(routes.gram_blocks(x, dtype, steps)) > 1
    exact = torch.linalg.svdvals(newton_schulz(x.double(), sets))

    def error() -> float:
        out = newton_schulz(x, sets, compute_dtype=dtype)
        return float((torch.linalg.svdvals(out.double()) - exact).abs().max())

    routed = error()
    monkeypatch.setattr(routes, "GRAM", {})
    # Float32 is as exact as rounding lets it: the three steps of a block have a slope of 41 at zero, and 41 eps is
    # 5e-6; over 300 matrices the worst is 1e-5. Two more steps in a block make 1e-4 to 5e-4 of it.
    assert routed <= max(2.5 * error(), 3e-5)


def test_what_is_not_in_the_table_takes_the_plain_path() -> None:
    plain = (1, 1, 1, 1, 1)
    assert routes.gram_blocks(torch.empty(1, 64, 512), torch.float64, 5) == plain
    assert routes.gram_blocks(torch.empty(1, 64, 128), torch.float32, 5) == plain
    assert routes.gram_blocks(torch.empty(1, 64, 512, device="meta"), torch.float32, 5) == plain
    assert routes.gram_blocks(torch.empty(1, 512, 2048), torch.bfloat16, 6) == (2, 1, 1, 1, 1)


def test_calls_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, sets = torch.randn(7, 6, 4), coefficients("quintic", 5)
    whole = newton_schulz(x, sets)
    monkeypatch.setattr(routes, "CPU_CALL_BYTES", {torch.float32: 2 * 6 * 4 * 4})
    for threads, sizes in ((2, [4, 3]), (1, [2, 2, 2, 1])):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert [len(part) for part in routes.calls(x, x.dtype)] == sizes
    torch.testing.assert_close(newton_schulz(x, sets), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["quintic", "simple"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("M", "N"), [(96, 96), (40, 64), (64, 40), (80, 200), FROM_THE_TABLE])
@pytest.mark.usefixtures("early_routes")
def test_memory_that_is_taken_up_again_changes_nothing(
    M: int, N: int, dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, sets = torch.randn(2, M, N), coefficients(name, 5)
    before = x.clone()
    fresh = newton_schulz(x, sets, compute_dtype=dtype)
    monkeypatch.setattr(spare, "_LEAST_BYTES", 0)
    again = newton_schulz(x, sets, compute_dtype=dtype)
    step = newton_schulz_step(x, *sets[0])
    assert torch.equal(again, fresh)
    assert torch.equal(x, before)
    assert step.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_memory_that_a_gradient_needs_is_not_taken_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    x, sets = torch.randn(1, 8, 8, dtype=torch.float64, requires_grad=True), coefficients("simple", 3)
    monkeypatch.setattr(spare, "_LEAST_BYTES", 0)
    assert torch.autograd.gradcheck(lambda x: newton_schulz(x, sets), (x,))


def test_a_square_iteration_lives_in_three_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int | None] = []

    class Seen(spare.Spare):
        def take(self, shape: tuple[int, ...]) -> Tensor | None:
            out = super().take(shape)
            taken.append(None if out is None else out.untyped_storage().data_ptr())
            return out

    monkeypatch.setattr(spare, "_LEAST_BYTES", 0)
    monkeypatch.setattr("emerging_optimizers.linalg.newton_schulz.Spare", Seen)
    newton_schulz(torch.randn(1, 16, 16), coefficients("quintic", 5))
    assert taken[:2] == [None, None]
    assert None not in taken[2:]
    assert len(set(taken[2:])) == 3
