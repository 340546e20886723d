"""What release 0.5.0 of the published library (10 November 2026) added, and what subclasses of it rely on.

Paths and signatures stand in `test_published_api`.
"""

import inspect
import math
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from emerging_optimizers import create_optimizer, package_info, registry, shampoo
from emerging_optimizers.mixin import WeightDecayMixin
from emerging_optimizers.orthogonalized_optimizers import Muon, OrthogonalizedOptimizer, Spel
from emerging_optimizers.orthogonalized_optimizers.sinkhorn_utils import sinkhorn_balance
from emerging_optimizers.orthogonalized_optimizers.spel import get_spel_scale_factor
from emerging_optimizers.riemannian_optimizers.isospectral import Iso
from emerging_optimizers.riemannian_optimizers.normalized_optimizer import ObliqueAdam, ObliqueScaleT, ObliqueSGD
from emerging_optimizers.riemannian_optimizers.retractions import stiefel
from emerging_optimizers.scalar_optimizers import (
    LaProp,
    Lion,
    Signum,
    SimplifiedAdEMAMix,
    SingleMomentumOptimizer,
    TwoMomentsOptimizer,
)
from emerging_optimizers.shampoo.matrix_root_inverse_utils import mat_4th_root_inv_via_scaled_cans
from emerging_optimizers.shampoo.shampoo import (
    KlShampoo,
    KlShampooPreconditioner,
    Shampoo,
    ShampooBase,
    ShampooPreconditioner,
    get_shampoo_scale_factor,
)


def gradient(t: int, shape: tuple[int, ...] = (6, 4)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(t))


def stepped(optimizer: torch.optim.Optimizer, p: Tensor, steps: int = 4) -> Tensor:
    for t in range(steps):
        p.grad = gradient(t, tuple(p.shape))
        optimizer.step()
    return p.detach()


# ---- bases and methods of subclasses --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", registry.OPTIMIZERS)
def test_every_optimizer_is_a_weight_decay_mixin(name):
    assert issubclass(registry.entry(name).load(), WeightDecayMixin)


def test_a_step_of_ones_own_may_decay_by_the_mixin():
    class Mine(Muon):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    self._apply_weight_decay_inplace(p, p.grad, group["lr"], group["weight_decay"])

    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.zeros(2, 2)
    Mine([p], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(p.detach(), torch.full((2, 2), 0.95))


@pytest.mark.parametrize("cls", [LaProp, Lion, Signum, SimplifiedAdEMAMix])
def test_hooks_of_a_subclass_of_an_element_wise_optimizer_are_called(cls):
    seen = []

    class Mine(cls):
        def pre_step_inplace(self, p, group):
            seen.append(("pre", group["lr"]))
            return p.detach().norm()

        def post_step_inplace(self, p, group, ctx):
            seen.append("post")
            p.mul_(ctx / p.norm())

    assert issubclass(cls, TwoMomentsOptimizer if "exp_avg_sq" in cls.state_keys else SingleMomentumOptimizer)
    p = nn.Parameter(gradient(9))
    before = p.detach().clone()
    stepped(Mine([p], lr=0.1), p, steps=2)
    assert seen == [("pre", 0.1), "post"] * 2
    assert not torch.equal(p, before)
    torch.testing.assert_close(p.detach().norm(), before.norm())


def test_a_base_without_a_function_says_what_it_needs():
    with pytest.raises(TypeError, match="SingleMomentumOptimizer has no rule of its own; give update_fn"):
        SingleMomentumOptimizer([nn.Parameter(torch.zeros(2))], {"lr": 0.1})


@pytest.mark.parametrize(
    ("base", "method"), [(Muon, "orthogonalize"), (LaProp, "pre_step_inplace"), (Shampoo, "_scalar_update")]
)
def test_an_optimizer_for_a_model_refuses_a_class_whose_methods_it_would_not_call(base, method, monkeypatch):
    monkeypatch.setattr(registry, "OPTIMIZERS", dict(registry.OPTIMIZERS))
    cls = type("Mine", (base,), {method: lambda self, *args, **kwargs: None, "__doc__": "Mine."})
    registry.register_optimizer("mine", start=0.1)(cls)
    with pytest.raises(ValueError, match=rf"Mine\.{method} .* is not called in an optimizer of several algorithms"):
        create_optimizer("mine", nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)))


def test_the_version_has_its_numbers():
    assert (*map(int, package_info.__shortversion__.split(".")), package_info.PRE_RELEASE) == package_info.VERSION
    assert package_info.__version__ == package_info.__shortversion__ + package_info.PRE_RELEASE


# ---- manifolds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [ObliqueSGD, ObliqueAdam])
@pytest.mark.parametrize("mode", get_args(ObliqueScaleT))
@pytest.mark.parametrize("dim", [0, 1])
def test_oblique_weights_have_the_norm_of_their_scale_mode(cls, mode, dim):
    p = nn.Parameter(gradient(9))
    norms = stepped(cls([p], lr=0.1, dim=dim, scale_mode=mode), p).norm(dim=dim)
    radius = math.sqrt(p.size(dim)) if mode == "unit_rms_norm" else 1.0
    torch.testing.assert_close(norms, torch.full_like(norms, radius))


def test_scale_mode_is_in_the_checkpoint():
    optimizer = ObliqueSGD([nn.Parameter(torch.eye(3))], scale_mode="unit_rms_norm")
    assert optimizer.state_dict()["param_groups"][0]["scale_mode"] == "unit_rms_norm"


@pytest.mark.parametrize("name", ["oblique_steepest_sgd", "oblique_steepest_adam"])
def test_a_steepest_step_turns_every_row_by_one_angle(name):
    p = nn.Parameter(nn.functional.normalize(gradient(9), dim=1) * 2)
    before = p.detach().clone()
    p.grad = gradient(0) * torch.logspace(-4, 4, 6)[:, None]
    registry.entry(name).load()([p], lr=0.05, dim=1).step()
    cosines = nn.functional.cosine_similarity(before, p.detach(), dim=1)
    torch.testing.assert_close(cosines, torch.full((6,), math.cos(math.atan(0.05))))


@pytest.mark.parametrize("how", get_args(stiefel.RetractionT))
def test_a_retraction_leads_along_its_direction_to_orthonormal_columns(how):
    retract = getattr(stiefel, f"{how}_retraction")
    point = torch.linalg.qr(gradient(9)).Q
    momentum = gradient(0)
    momentum = momentum - point @ (point.T @ momentum + momentum.T @ point) / 2
    for step_size in (1e-2, 1.0):
        new = retract(point, momentum, step_size)
        torch.testing.assert_close(new.T @ new, torch.eye(4), rtol=0, atol=1e-5)
        if step_size < 1 and how != "cayley":  # to first order; Cayley's turns within the columns are twice as long
            assert (new - point + step_size * momentum).norm() < 0.02 * (new - point).norm()
    assert list(inspect.signature(retract).parameters)[:3] == ["point", "momentum", "step_size"]


@pytest.mark.parametrize("how", get_args(stiefel.RetractionT))
def test_a_retraction_names_what_it_cannot_take(how):
    retract = getattr(stiefel, f"{how}_retraction")
    x = torch.eye(6, 4)
    for point, momentum in ((x[:, 0], x[:, 0]), (x, x[:, :1]), (x, x.T)):
        with pytest.raises(ValueError, match=rf"{how}_retraction: point is .* of one shape, or two stacks of them"):
            retract(point, momentum, 0.1)
    for point, momentum in ((x.bfloat16(), x.bfloat16()), (x.double(), x), (x.int(), x.int())):
        with pytest.raises(TypeError, match=rf"{how}_retraction: point is .*give both in float32, or both in float64"):
            retract(point, momentum, 0.1)
    if how == "qr":
        with pytest.raises(ValueError, match="more columns than rows; give the transposes of both"):
            retract(x.T, x.T, 0.1)


@pytest.mark.parametrize("how", get_args(stiefel.RetractionT))
def test_a_retraction_takes_stacks_and_a_matrix_that_is_not_finite_stays_alone(how):
    retract = getattr(stiefel, f"{how}_retraction")
    points, momenta = torch.linalg.qr(gradient(9, (2, 3, 6, 4))).Q, gradient(0, (2, 3, 6, 4))
    momenta[1, 0] = torch.nan
    new = retract(points, momenta, 0.1)
    assert new.shape == points.shape
    assert new[1, 0].isnan().all()
    torch.testing.assert_close(new[0, 2], retract(points[0, 2], momenta[0, 2], 0.1), rtol=1e-4, atol=1e-5)
    assert retract(points[1, 0], momenta[1, 0], 0.1).isnan().all()


def test_the_newton_schulz_retraction_has_its_published_options():
    options = inspect.signature(stiefel.newton_schulz_retraction).parameters
    assert [options[n].default for n in ("coefficient_type", "num_ns_steps")] == ["polar_express", 8]


def test_iso_by_newton_schulz_is_iso_by_the_polar_factor():
    ends = []
    for retraction in ("polar", "newton_schulz"):
        p = nn.Parameter(gradient(9))
        ends.append(stepped(Iso([p], lr=0.01, retraction=retraction), p))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
@pytest.mark.parametrize("tangent", [False, True])
def test_spel_keeps_a_weight_on_the_scaled_manifold(shape, tangent):
    p = nn.Parameter(gradient(9, shape))
    stepped(Spel([p], lr=0.1, scale_mode="unit_rms_to_rms_norm", tangent=tangent, orthogonalizer="svd"), p)
    scale = get_spel_scale_factor(*shape, "unit_rms_to_rms_norm")
    assert scale == (math.sqrt(1.5) if shape == (6, 4) else 1.0)
    torch.testing.assert_close(torch.linalg.svdvals(p.detach()), torch.full((4,), scale))


def test_the_tangent_part_leaves_out_what_the_retraction_takes_back():
    W, moved = torch.linalg.qr(gradient(9)).Q, []
    for along in (0.0, 5.0):
        p = nn.Parameter(W.clone())
        p.grad = gradient(0) - W @ W.T @ gradient(0) + along * W @ torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        p.grad += W @ torch.tensor([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 2], [0, 0, -2, 0]])
        Spel([p], lr=0.1, weight_decay=0.0, tangent=True, orthogonalizer="svd").step()
        moved.append(p.detach())
    torch.testing.assert_close(*moved, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="scale_mode='spectral' is not one of"):
        get_spel_scale_factor(4, 4, "spectral")


# ---- Shampoo --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["spectral", "shape_scaling", "unit_rms_norm", None])
def test_shampoo_is_multiplied_by_muons_factor(mode):
    moved = []
    for scale_mode in (None, mode):
        p = nn.Parameter(torch.zeros(6, 4))
        moved.append(stepped(Shampoo([p], lr=0.1, weight_decay=0.0, scale_mode=scale_mode), p))
    torch.testing.assert_close(moved[0] * get_shampoo_scale_factor(6, 4, mode), moved[1])


@pytest.mark.parametrize("p_root_inv", [4.0, 2.5])
def test_the_root_may_be_any_positive_number(p_root_inv):
    """Published as a float."""
    p = nn.Parameter(torch.zeros(2, 2))
    p.grad = torch.diag(torch.tensor([16.0, 1.0]))
    Shampoo([p], lr=0.1, momentum=0.0, weight_decay=0.0, p_root_inv=p_root_inv).step()
    expected = torch.diag(p.grad) ** (1 - 4 / p_root_inv) * -0.1
    torch.testing.assert_close(p.detach().diagonal(), expected, rtol=1e-3, atol=0)


def test_a_single_gradient_gives_an_update_of_rms_one_by_default_of_the_base():
    class Base(ShampooBase):
        def _scalar_update(self, grad, exp_avg, *, momentum):
            return exp_avg.lerp_(grad, 1 - momentum)

    p = nn.Parameter(torch.zeros(6, 4))
    moved = stepped(Base([p], lr=1.0, momentum=0.0, weight_decay=0.0), p, steps=1)
    assert moved.square().mean().sqrt().item() == pytest.approx(1.0, abs=1e-3)  # the roots are damped
    assert get_shampoo_scale_factor(6, 4) == math.sqrt(6)


@pytest.mark.parametrize(
    ("cls", "preconditioner"), [(Shampoo, ShampooPreconditioner), (KlShampoo, KlShampooPreconditioner)]
)
def test_the_preconditioner_of_one_matrix_is_the_rule_of_a_stack(cls, preconditioner):
    class Mine(preconditioner):
        pass

    class OneByOne(cls):
        PreconditionerCls = Mine

    options = {"lr": 0.1, "scale_mode": "spectral", "eps": 1e-2}  # above what rounding makes of a null space
    weights, keys = [], []
    for kind in (cls, OneByOne):
        p = nn.Parameter(gradient(9, (2, 6, 4)))
        optimizer = kind([p], **options)
        weights.append(stepped(optimizer, p))
        keys.append(list(optimizer.state[p]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
    assert sorted(keys[0]) == sorted(keys[1])


def test_kl_shampoo_equals_its_equations():
    """In float64, from eigenvalues of 1."""
    p = nn.Parameter(gradient(9).double())
    W, M = p.detach().clone(), torch.zeros(6, 4, dtype=torch.float64)
    L, R = torch.zeros(6, 6, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    inverse_L, inverse_R = torch.eye(6, dtype=torch.float64), torch.eye(4, dtype=torch.float64)

    def power(K: Tensor, of) -> Tensor:
        values, vectors = torch.linalg.eigh(K)
        return vectors @ torch.diag(of(values.clamp(min=0))) @ vectors.T

    optimizer = KlShampoo([p], lr=0.1, eps=1e-3, p_root_inv=2, scale_mode="unit_rms_norm")
    for t in range(1, 6):
        G = gradient(t).double()
        p.grad = G.clone()
        optimizer.step()
        b = 1 - 0.05 / (1 - 0.95**t)
        L, R = b * L + (1 - b) * G @ inverse_R @ G.T / 4, b * R + (1 - b) * G.T @ inverse_L @ G / 6
        inverse_L, inverse_R = (power(K, lambda v: 1 / v.clamp(min=1e-3)) for K in (L, R))
        M = 0.9 * M + 0.1 * G
        roots = [power(K, lambda v: v**0.5 / (v + 1e-3)) for K in (L, R)]
        W = (1 - 0.1 * 0.01) * W - 0.1 * math.sqrt(6 / 4) * roots[0] @ M @ roots[1]
    torch.testing.assert_close(p.detach(), W, rtol=1e-9, atol=1e-9)


def test_kl_shampoo_starts_with_eigenvalues_of_one():
    p = nn.Parameter(torch.zeros(6, 4))
    optimizer = KlShampoo([p], lr=0.1)
    optimizer._init_group(optimizer.param_groups[0], skip_non_grad_params=False)
    assert torch.equal(optimizer.state[p]["eigvals_L"], torch.ones(6))
    stepped(optimizer, p, steps=1)
    torch.testing.assert_close(optimizer.state[p]["L"], gradient(0) @ gradient(0).T / 4)


@pytest.mark.parametrize("limit", [5, 3])
def test_kl_shampoo_does_without_factors_of_long_sides_and_resumes(limit):
    p, q = nn.Parameter(gradient(9)), nn.Parameter(gradient(9))
    first = KlShampoo([p], lr=0.1, max_precond_dim=limit)
    stepped(first, p, steps=2)
    assert ("Q_R" in first.state[p]) == (limit == 5)
    assert "Q_L" not in first.state[p]
    q.data.copy_(p.data)
    second = KlShampoo([q], lr=0.2, max_precond_dim=limit)
    second.load_state_dict(first.state_dict())
    assert torch.equal(stepped(first, p), stepped(second, q))


def test_the_base_alone_has_no_step():
    with pytest.raises(NotImplementedError, match="has no _scalar_update; override it, or use Shampoo"):
        ShampooBase([nn.Parameter(torch.eye(2))], lr=0.1)
    with pytest.raises(AttributeError, match="no attribute 'KlSoap'"):
        shampoo.KlSoap  # noqa: B018  # looking is what raises


@pytest.mark.parametrize(("spread", "tolerance"), [(1e2, 5e-5), (1e5, 5e-4)])
def test_the_fourth_root_by_products_is_that_by_eigh(spread, tolerance):
    Q = torch.linalg.qr(gradient(0, (3, 16, 16))).Q
    values = torch.logspace(0, -math.log10(spread), 16)
    root = (Q * values**-0.25) @ Q.mT
    found = mat_4th_root_inv_via_scaled_cans((Q * values) @ Q.mT)
    assert (found - root).norm() < tolerance * root.norm()
    torch.testing.assert_close(
        found[1], mat_4th_root_inv_via_scaled_cans(((Q * values) @ Q.mT)[1]), rtol=1e-3, atol=1e-3
    )


# ---- Sinkhorn -------------------------------------------------------------------------------------------------------


def test_sinkhorn_balance_has_the_published_arguments_and_balances():
    options = {n: p.default for n, p in inspect.signature(sinkhorn_balance).parameters.items()}
    assert options == {
        "update": inspect.Parameter.empty,
        "eps": 1e-20,
        "num_normalization_steps": 11,
        "zero_row_threshold": 1e-3,
    }
    x = gradient(0, (64, 8)) * torch.logspace(-1, 1, 64)[:, None]
    x[3] = 0
    y = sinkhorn_balance(x)
    rms = y.square().mean(dim=1).sqrt()
    torch.testing.assert_close(rms[torch.arange(64) != 3], torch.ones(63))
    assert not y[3].any()
    torch.testing.assert_close(y.square().mean(dim=0).sqrt(), torch.ones(8), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("x", "options", "match"),
    [
        (torch.ones(3), {}, r"update is torch.float32 of shape \(3,\)"),
        (torch.ones(3, 2, dtype=torch.int32), {}, r"update is torch.int32 of shape \(3, 2\)"),
        (torch.ones(3, 2), {"num_normalization_steps": 4}, "give an odd integer"),
        (torch.ones(3, 2), {"num_normalization_steps": 3.0}, "num_normalization_steps=3.0"),
        (torch.ones(3, 2), {"eps": None}, "eps=None"),
        (torch.ones(3, 2), {"eps": 0.0}, "eps=0.0"),
        (torch.ones(3, 2), {"zero_row_threshold": -1.0}, "zero_row_threshold=-1.0"),
    ],
)
def test_sinkhorn_balance_names_what_it_cannot_take(x, options, match):
    with pytest.raises(ValueError, match=match):
        sinkhorn_balance(x, **options)


def test_sinkhorn_is_an_orthogonalized_optimizer_with_the_published_function():
    p, q = nn.Parameter(gradient(9)), nn.Parameter(gradient(9))
    stepped(registry.entry("sinkhorn").load()([p], lr=0.1, weight_decay=0.1), p)
    stepped(
        OrthogonalizedOptimizer(
            [q],
            lr=0.1,
            momentum=0.95,
            weight_decay=0.1,
            nesterov=True,
            weight_decay_method="decoupled",
            fp32_matmul_prec="highest",
            scaled_orthogonalize_fn=lambda x: 0.18 * sinkhorn_balance(x),
        ),
        q,
    )
    torch.testing.assert_close(p.detach(), q.detach())
