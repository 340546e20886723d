import pytest
import torch
from torch import Tensor

from emerging_optimizers import MOSO, SOAP
from emerging_optimizers.linalg.eigh import eigh_descending
from emerging_optimizers.linalg.emulation import emulate_tf32
from emerging_optimizers.linalg.kernels import routes
from emerging_optimizers.linalg.kronecker import conjugate_diagonal
from emerging_optimizers.linalg.orthogonal_iteration import iterate, orthogonal_iteration
from emerging_optimizers.linalg.precision import fp32_matmul_precision
from tests.cases import CASES, distance, parameters, run


def rotation(n: int, seed: int = 0) -> Tensor:
    g = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(g).Q


def with_spectrum(spectrum: Tensor, seed: int = 0) -> Tensor:
    Q = rotation(spectrum.numel(), seed)
    return (Q * spectrum @ Q.mT)[None]


@pytest.mark.parametrize("n", [2, 5, 12])
def test_on_a_decaying_spectrum_it_converges_to_the_basis_of_eigh(n):
    k = with_spectrum(2.0 ** -torch.arange(n, dtype=torch.float64))
    got = orthogonal_iteration(k, rotation(n, seed=1)[None], steps=60)
    overlap = (got.mT @ eigh_descending(k)[1]).abs()
    torch.testing.assert_close(overlap, torch.eye(n, dtype=torch.float64)[None], rtol=0, atol=1e-9)


def test_several_steps_are_one_step_several_times():
    k, q = with_spectrum(torch.linspace(3, 1, 6, dtype=torch.float64)), torch.eye(6, dtype=torch.float64)[None]
    q = orthogonal_iteration(k, q, steps=40)  # in order, so that one sort is enough
    by_hand = q
    for _ in range(3):
        by_hand = orthogonal_iteration(k, by_hand)
    assert torch.equal(orthogonal_iteration(k, q, steps=3), by_hand)


def test_columns_are_taken_up_by_falling_rayleigh_quotient():
    k = torch.diag(torch.tensor([1.0, 4.0, 2.0]))[None]
    assert torch.equal(orthogonal_iteration(k, torch.eye(3)[None]).abs()[0], torch.eye(3)[:, [1, 2, 0]])


@pytest.mark.parametrize("n", [64, 128, 256])
def test_the_basis_is_orthogonal_in_float32_over_a_spectrum_of_eight_decades(n):
    k = with_spectrum(torch.logspace(0, -8, n, dtype=torch.float64)).float()
    q = rotation(n).float()[None]  # tracks K: these are its eigenvectors
    out = orthogonal_iteration(k, q)
    assert (out.mT @ out - torch.eye(n)).abs().max() < 2e-5


def test_a_stack_equals_its_matrices_one_by_one():
    k = torch.cat([with_spectrum(torch.linspace(0.1, 1, 8, dtype=torch.float64), seed) for seed in range(3)])
    q = torch.eye(8, dtype=torch.float64).repeat(3, 1, 1)
    one_by_one = torch.cat([orthogonal_iteration(k[i : i + 1], q[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(orthogonal_iteration(k, q), one_by_one, rtol=0, atol=1e-13)


def test_a_row_that_is_not_finite_leaves_the_other_rows_exact():
    k = torch.cat([with_spectrum(torch.linspace(0.1, 1, 5, dtype=torch.float64), seed) for seed in range(3)])
    q = torch.eye(5, dtype=torch.float64).repeat(3, 1, 1)
    expected = orthogonal_iteration(k, q)
    k[1, 0, 0] = torch.nan
    assert torch.equal(orthogonal_iteration(k, q)[[0, 2]], expected[[0, 2]])


# ---- by Cholesky factorizations -------------------------------------------------------------------------------------


def spectra(n: int) -> dict[str, Tensor]:
    place = torch.linspace(0, 1, n, dtype=torch.float64)
    low = (torch.arange(n) < min(8, n // 2)).double()
    noise = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return {
        **{f"condition_1e{power}": 10 ** (-power * place) for power in (0, 2, 4, 6, 8, 10, 12)},
        "low_rank": low,
        "low_rank_and_noise": low + 1e-7 * noise,
        "low_rank_and_negative_noise": low + 1e-4 * (noise - 0.5),
        "spike": torch.where(place == 0, 1e10, 1.0),
        "tiny": 1e-30 * 10 ** (-6 * place),
        "huge": 1e30 * 10 ** (-6 * place),
        "zero": 0 * place,
    }


DEFICIENT = ("low_rank", "low_rank_and_noise", "low_rank_and_negative_noise", "spike")  # in float32


def sorted_basis(k: Tensor, q: Tensor) -> Tensor:
    order = (q.mT @ k @ q).diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True)
    return q.gather(-1, order.unsqueeze(-2).expand_as(q))


def misfit(k: Tensor, q: Tensor) -> float:
    """How far Q is from an eigenbasis of K."""
    seen = q.double().mT @ k.double() @ q.double()
    return float((seen - torch.diag_embed(seen.diagonal(dim1=-2, dim2=-1))).norm() / seen.norm().clamp_min(1e-300))


@pytest.mark.parametrize("start", ["tracks", "random"])
@pytest.mark.parametrize("kind", spectra(16))
@pytest.mark.parametrize("n", [2, 16, 64, 300])
def test_cholesky_is_orthogonal_and_as_close_as_householder(n: int, kind: str, start: str) -> None:
    k = with_spectrum(spectra(n)[kind]).float()
    k = (k + k.mT) / 2
    q = rotation(n, seed=0 if start == "tracks" else 1).float()[None]
    out, householder = (orthogonal_iteration(k, q, 1, name) for name in ("cholesky", "householder"))
    assert (out.mT.double() @ out.double() - torch.eye(n)).abs().max() < 5e-6
    # Where K has no rank the damping keeps 1e-6 of the old direction; the next step squares that.
    assert misfit(k, out) <= 1.001 * misfit(k, householder) + (2e-4 if kind in DEFICIENT else 1e-6)
    twice = [orthogonal_iteration(k, q, 2, name) for name in ("cholesky", "householder")]
    assert misfit(k, twice[0]) <= 1.1 * misfit(k, twice[1]) + 1e-6


def test_cholesky_is_householder_but_for_signs_that_follow_the_old_basis():
    k = with_spectrum(torch.logspace(0, -3, 40, dtype=torch.float64))
    q = rotation(40, seed=1)[None]
    out, householder = (orthogonal_iteration(k, q, 1, name) for name in ("cholesky", "householder"))
    signs = torch.sum(out * householder, dim=-2, keepdim=True).sign()
    torch.testing.assert_close(out, householder * signs, rtol=0, atol=1e-9)
    diagonal = (out.mT @ (k @ sorted_basis(k, q))).diagonal(dim1=-2, dim2=-1)
    assert (diagonal > 0).all()


def test_cholesky_of_a_zero_matrix_keeps_the_basis():
    q = rotation(12).float()[None]
    torch.testing.assert_close(orthogonal_iteration(torch.zeros(1, 12, 12), q, 1, "cholesky"), q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_cholesky_keeps_the_basis_of_a_row_that_is_not_finite_and_leaves_the_others_exact(bad):
    k = torch.cat([with_spectrum(torch.linspace(0.1, 1, 5, dtype=torch.float64), seed) for seed in range(3)])
    q = rotation(5).repeat(3, 1, 1)
    expected = orthogonal_iteration(k, q, 1, "cholesky")
    k[1, 0, 0] = bad
    out = orthogonal_iteration(k, q, 1, "cholesky")
    assert torch.equal(out[[0, 2]], expected[[0, 2]])
    torch.testing.assert_close(out[1].mT @ out[1], torch.eye(5, dtype=torch.float64))


@pytest.fixture
def cholesky_fails_for_low_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes 80,000 tries otherwise."""
    for name in ("_SHIFTED_PASSES", "_DAMPING_EPS"):
        monkeypatch.setattr(f"emerging_optimizers.linalg.orthogonal_iteration.{name}", 0)


@pytest.mark.usefixtures("cholesky_fails_for_low_rank")
def test_where_cholesky_fails_householder_takes_over():
    flat, steep = torch.linspace(0.1, 1, 24, dtype=torch.float64), torch.zeros(24, dtype=torch.float64)
    steep[:3] = 1
    k = torch.cat([with_spectrum(flat, 0), with_spectrum(steep, 1), with_spectrum(flat, 2)]).float()
    q = rotation(24, seed=3).float().repeat(3, 1, 1)
    out, householder, kept = (
        orthogonal_iteration(k, q, 1, name, may_wait=may_wait)
        for name, may_wait in (("cholesky", True), ("householder", True), ("cholesky", False))
    )
    assert torch.equal(out[[0, 2]], kept[[0, 2]])
    assert torch.equal(kept[1], sorted_basis(k, q)[1])
    assert torch.equal(out[1].abs(), householder[1].abs())
    diagonal = (out.mT @ (k @ sorted_basis(k, q))).diagonal(dim1=-2, dim2=-1)
    assert (diagonal > -1e-6).all()


@pytest.mark.usefixtures("cholesky_fails_for_low_rank")
@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [(SOAP, {}), (SOAP, {"overlap": True}), (SOAP, {"capturable": True}), (MOSO, {}), (MOSO, {"capturable": True})],
)
def test_the_host_waits_for_householder_only_where_it_may(optimizer_class, options, monkeypatch):
    monkeypatch.setitem(routes.ORTHONORMALIZERS, "cpu", "cholesky")
    qr, waits = torch.geqrf, []

    def counted(x: Tensor) -> tuple[Tensor, Tensor]:
        waits.append(len(x))
        return qr(x)

    monkeypatch.setattr(torch, "geqrf", counted)
    w = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = optimizer_class([w], lr=0.1, **options)
    for _ in range(4):
        w.grad = torch.randn(8, 1, generator=torch.Generator().manual_seed(0)) @ torch.ones(1, 8)
        optimizer.step()
    assert bool(waits) is not bool(options)


def test_cholesky_does_not_read_the_caller_s_precision():
    k, q = with_spectrum(torch.logspace(0, -8, 64, dtype=torch.float64)).float(), rotation(64).float()[None]
    with emulate_tf32(), fp32_matmul_precision("high"):
        out = orthogonal_iteration(k, q, 1, "cholesky")
    assert (out.mT @ out - torch.eye(64)).abs().max() < 5e-6


def test_soap_trains_as_well_by_cholesky(monkeypatch):
    case = next(case for case in CASES if case.name == "soap_kl")
    plain, _ = run(case, 12, dtype=torch.float64)
    monkeypatch.setitem(routes.ORTHONORMALIZERS, "cpu", "cholesky")
    found, _ = run(case, 12, dtype=torch.float64)
    assert 0 < distance(found, plain, parameters(case, torch.float64)) < 1e-6


# ---- eigenvalues that one step leaves ------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["tracks", "random"])
@pytest.mark.parametrize("kind", spectra(16))
@pytest.mark.parametrize("n", [2, 16, 64, 300])
def test_eigenvalues_follow_from_r_as_exactly_as_from_a_product(n: int, kind: str, start: str) -> None:
    k = with_spectrum(spectra(n)[kind]).float()
    k = (k + k.mT) / 2
    q = rotation(n, seed=0 if start == "tracks" else 1).float()[None]
    with emulate_tf32(), fp32_matmul_precision("high"):
        found = iterate(k, q, crosses=True)
    assert torch.equal(found.basis, orthogonal_iteration(k, q))
    values = found.eigenvalues(q.mT @ found.basis)
    true = conjugate_diagonal(k.double(), found.basis.double())
    largest = float(true.abs().max())
    error = (values.double() - true).abs()
    assert error.max() <= 2e-6 * largest
    small = true < 1e-2 * largest
    assert (error[small] <= 1e-7 * largest).all()  # nor is what is zero negative by more


@pytest.mark.parametrize(("steps", "route"), [(2, "householder"), (1, "cholesky"), (2, "cholesky")])
def test_of_another_step_nothing_is_known(steps, route):
    k, q = with_spectrum(torch.linspace(3, 1, 6, dtype=torch.float64)), rotation(6, seed=1)[None]
    found = iterate(k, q, steps, route, crosses=True)
    assert found.eigenvalues(q.mT @ found.basis) is None


@pytest.mark.gpu
@pytest.mark.parametrize("n", [64, 768])
def test_cholesky_on_the_device(n):
    k = torch.cat([with_spectrum(s).float() for s in spectra(n).values()]).cuda()
    q = rotation(n, seed=1).float().repeat(len(k), 1, 1).cuda()
    out = orthogonal_iteration(k, q, 1, "cholesky")
    assert (out.mT.double() @ out.double() - torch.eye(n, device="cuda")).abs().max() < 1e-5
