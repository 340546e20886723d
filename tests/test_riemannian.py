"""What holds on the oblique manifold and on that of matrices with given singular values."""

from typing import Any

import pytest
import torch
from torch import Tensor

from emerging_optimizers import Iso, ObliqueAdam, ObliqueSGD
from emerging_optimizers.riemannian_optimizers.isospectral import RETRACTIONS

SHAPES = ((8, 5), (5, 8), (6, 6))
RETRACTION_NAMES = list(RETRACTIONS)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(make: Any, steps: int = 10, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[Any]:
    """Parameters after some steps with random gradients, and the optimizer."""
    ps = [torch.nn.Parameter(torch.randn(shape, generator=generator(0), dtype=dtype)) for shape in SHAPES]
    optimizer = make(ps)
    for t in range(steps):
        for p in ps:
            p.grad = scale * torch.randn(p.shape, generator=generator(t), dtype=dtype)
        optimizer.step()
    return [ps, optimizer]


# ---- oblique --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [ObliqueSGD, ObliqueAdam])
@pytest.mark.parametrize("dim", [0, 1, -1, -2])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1000.0])
def test_norms_are_one_from_the_first_step_on(cls: Any, dim: int, scale: float) -> None:
    ps, _ = trained(lambda ps: cls(ps, lr=0.1, dim=dim, weight_decay=0.1), scale=scale)
    for p in ps:
        torch.testing.assert_close(p.norm(dim=dim), torch.ones(p.size(1 - dim % 2)))


def test_a_small_step_goes_along_the_sphere_by_the_tangent_part_of_the_gradient() -> None:
    W = torch.nn.functional.normalize(torch.randn(6, 4, generator=generator(0), dtype=torch.float64), dim=0)
    p = torch.nn.Parameter(W.clone())
    p.grad = torch.randn(6, 4, generator=generator(1), dtype=torch.float64)
    ObliqueSGD([p], lr=1e-6).step()
    moved = (W - p.detach()) / 1e-6
    torch.testing.assert_close((W * moved).sum(dim=0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(moved, p.grad - W * (W * p.grad).sum(dim=0), rtol=0, atol=1e-5)


def test_a_gradient_along_the_weight_moves_nothing() -> None:
    W = torch.nn.functional.normalize(torch.randn(6, 4, generator=generator(0)), dim=1)
    p = torch.nn.Parameter(W.clone())
    p.grad = 3 * W
    ObliqueSGD([p], lr=1.0, dim=1).step()
    torch.testing.assert_close(p.detach(), W)


def test_only_the_direction_of_a_start_counts() -> None:
    (ps, _), (qs, optimizer) = (trained(lambda ps: ObliqueSGD(ps, lr=0.1), steps=0) for _ in range(2))
    other = ObliqueSGD(ps, lr=0.1)
    for p, q in zip(ps, qs, strict=True):
        p.data *= torch.linspace(0.5, 9.0, p.size(1))
        p.grad = q.grad = torch.randn(p.shape, generator=generator(1))
    other.step()
    optimizer.step()
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q)


def test_the_first_adam_step_is_signs_and_the_published_one_a_tenth() -> None:
    """sqrt(v) / (1 - b2) is 1 / sqrt(1 - b2) = 10 times sqrt(v / (1 - b2)) at b2 = 0.99."""
    W = torch.nn.functional.normalize(torch.randn(6, 4, generator=generator(0), dtype=torch.float64), dim=0)
    moved: dict[Any, Tensor] = {}
    for correct_bias in (True, "published"):
        p = torch.nn.Parameter(W.clone())
        p.grad = torch.randn(6, 4, generator=generator(1), dtype=torch.float64)
        ObliqueAdam([p], lr=1e-6, correct_bias=correct_bias).step()
        moved[correct_bias] = (W - p.detach()) / 1e-6
        tangent = p.grad.sign() - W * (W * p.grad.sign()).sum(dim=0)
    torch.testing.assert_close(moved[True], tangent, rtol=0, atol=1e-4)
    torch.testing.assert_close(moved["published"], 0.1 * tangent, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        (ObliqueSGD, "momentum", 1.0),
        (ObliqueSGD, "dim", 2),
        (ObliqueSGD, "eps", 0.0),
        (ObliqueAdam, "betas", (1.0, 0.99)),
        (ObliqueAdam, "correct_bias", "adam"),
        (Iso, "momentum", -0.1),
        (Iso, "retraction", "svd"),
        (Iso, "fp32_matmul_prec", "low"),
    ],
)
def test_values_out_of_range_are_named(cls: Any, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{cls.__name__}: {name}=.* is not allowed; give "):
        cls([torch.nn.Parameter(torch.zeros(2, 2))], **{name: value})


@pytest.mark.parametrize("cls", [ObliqueSGD, ObliqueAdam, Iso])
def test_another_law_for_the_weight_is_refused(cls: Any) -> None:
    with pytest.raises(ValueError, match="law of its own"):
        cls([torch.nn.Parameter(torch.zeros(2, 2))], weight_update_hook="relative_update")


# ---- isospectral ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", RETRACTION_NAMES)
@pytest.mark.parametrize("shape", [(7, 4), (5, 5)])
def test_a_retraction_stays_on_the_manifold_and_follows_its_direction(how: Any, shape: tuple[int, int]) -> None:
    """R(X, 0) = X, columns orthonormal, and R(X, h D) = X + h D + O(h^2) for a tangent D."""
    X = torch.linalg.qr(torch.randn(3, *shape, generator=generator(0), dtype=torch.float64)).Q
    D = torch.randn(3, *shape, generator=generator(1), dtype=torch.float64)
    eye = torch.eye(shape[1], dtype=torch.float64).expand(3, -1, -1)
    skew = 0.5 * (X.mT @ D - D.mT @ X)
    tangent = D - X @ X.mT @ D + X @ skew
    retract = RETRACTIONS[how]
    torch.testing.assert_close(retract(X, torch.zeros_like(X)), X)
    for direction in (D, 100 * D):
        Y = retract(X, direction)
        torch.testing.assert_close(Y.mT @ Y, eye)
    # Cayley takes D X^T - X D^T, twice the part of D within the span of X.
    moves = tangent + X @ skew if how == "cayley" else tangent
    torch.testing.assert_close((retract(X, 1e-6 * tangent) - X) / 1e-6, moves, rtol=0, atol=1e-4)


@pytest.mark.parametrize("how", RETRACTION_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_stay_and_the_weight_moves(how: Any, dtype: torch.dtype) -> None:
    start = [torch.randn(shape, generator=generator(0), dtype=dtype) for shape in SHAPES]
    ps, optimizer = trained(lambda ps: Iso(ps, lr=0.01, retraction=how), steps=60, dtype=dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for p, W in zip(ps, start, strict=True):
        values = torch.linalg.svdvals(W.float())
        torch.testing.assert_close(torch.linalg.svdvals(p.detach().float()), values, rtol=0, atol=tolerance)
        torch.testing.assert_close(optimizer.state[p]["sigma"], values)
        assert float((p.detach() - W).norm() / W.norm()) > 0.5


def test_weight_decay_shrinks_all_singular_values_alike() -> None:
    start = [torch.linalg.svdvals(torch.randn(shape, generator=generator(0))) for shape in SHAPES]
    ps, _ = trained(lambda ps: Iso(ps, lr=0.1, weight_decay=0.5), steps=3)
    for p, values in zip(ps, start, strict=True):
        torch.testing.assert_close(torch.linalg.svdvals(p.detach()), values * 0.95**3, rtol=1e-4, atol=1e-5)


def test_an_edited_weight_counts_once_its_factors_are_dropped() -> None:
    (p, *_), optimizer = trained(lambda ps: Iso(ps, lr=0.01), steps=2)
    for drop in (False, True):
        p.data.fill_(0.0).fill_diagonal_(2.0)
        if drop:
            optimizer.state.pop(p)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        two = torch.full((5,), 2.0)
        assert torch.allclose(torch.linalg.svdvals(p.detach()), two) == drop
