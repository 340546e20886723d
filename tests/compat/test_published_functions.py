"""Every public function of the published library: import path and arguments.

Facts about the releases of June and August 2026; where they differ under one path, those of June. What is left out is
in docs/migrate.md.
"""

import inspect
from importlib import import_module
from inspect import Parameter
from operator import attrgetter

import pytest
import torch

from emerging_optimizers import SOAP

FUNCTIONS = {
    "contrib.row_norm:row_norm_fn": "grad, *, center_rows=False, eps=1e-08, extra_scale_factor=1.0",
    "legacy_soap.matrix_root_inverse_utils:inv_root_via_eigh": "x, eps=1e-12",
    "legacy_soap.matrix_root_inverse_utils:mat_root_inv_via_scaled_cans": "x, eps=1e-12",
    "legacy_soap.soap:project_in": "x, eigenbasis_list",
    "legacy_soap.soap:project_out": "x, eigenbasis_list",
    "legacy_soap.soap:update_eigenbasis_and_exp_avgs": (
        "kronecker_factor_list, eigenbasis_list, exp_avg_sq, exp_avg, use_eigh=False, power_iter_steps=1"
    ),
    "legacy_soap.soap:update_kronecker_factors": "kronecker_factor_list, grad, shampoo_beta",
    "legacy_soap.soap:update_kronecker_factors_kl_shampoo": (
        "kronecker_factor_list, grad, shampoo_beta, eigenbasis_list, eigvals_list, eps, eigval_exp=-1.0"
    ),
    "legacy_soap.soap_utils:get_eigenbasis_eigh": "kronecker_factor_list",
    "legacy_soap.soap_utils:get_eigenbasis_qr": "kronecker_factor_list, eigenbasis_list, power_iter_steps=1",
    "legacy_soap.soap_utils:get_eigenbasis_svd": "kronecker_factor_list",
    "orthogonalized_optimizers.mop:polar_via_svd": "A, return_p=False",
    "orthogonalized_optimizers.muon:get_muon_scale_factor": 'size_out, size_in, mode="spectral"',
    "orthogonalized_optimizers.muon_utils:batched_newton_schulz_step": "X, a, b, c, tp_group=None",
    "orthogonalized_optimizers.muon_utils:batched_newton_schulz_step_tsyrk": "X, a, b, c, tp_group=None",
    "orthogonalized_optimizers.muon_utils:distributed_normalize_p2": "x, eps, group",
    "orthogonalized_optimizers.muon_utils:get_coefficient_iterator": 'steps, coefficient_sets, mode="cycle"',
    "orthogonalized_optimizers.muon_utils:newton_schulz": (
        'x, steps, coefficient_type="quintic", custom_coefficient_sets=None, eps=1e-07, transpose=None, '
        "tp_group=None, use_syrk=False"
    ),
    "orthogonalized_optimizers.muon_utils:newton_schulz_step": "X, a, b, c, tp_group=None",
    "orthogonalized_optimizers.muon_utils:newton_schulz_step_tsyrk": "X, a, b, c, tp_group=None",
    "orthogonalized_optimizers.muon_utils:newton_schulz_tp": (
        'x, steps, coefficient_type, tp_group, partition_dim=None, tp_mode="duplicated"'
    ),
    "orthogonalized_optimizers.polargrad:left_polargrad_orth_fn": (
        "grad, *, alpha=1.0, center_rows=False, eps=1e-15, extra_scale_factor=1.0"
    ),
    "orthogonalized_optimizers.polargrad:one_sided_polargrad_orth_fn": (
        "grad, *, side, alpha=1.0, center_rows=False, eps=1e-15, extra_scale_factor=1.0"
    ),
    "orthogonalized_optimizers.polargrad:right_polargrad_orth_fn": (
        "grad, *, alpha=1.0, center_rows=False, eps=1e-15, extra_scale_factor=1.0"
    ),
    "orthogonalized_optimizers.spectral_clipping_utils:spectral_clip": "X, sigma_min=-1.0, sigma_max=1.0",
    "orthogonalized_optimizers.spectral_clipping_utils:spectral_clipped_weight_decay": "X, beta=1.0, c=0.5",
    "orthogonalized_optimizers.spectral_clipping_utils:spectral_hardcap": "X, beta=1.0",
    "psgd.procrustes_step:procrustes_step": "Q, max_step_size=0.125, eps=1e-08, order=2",
    "psgd.psgd_kron_contractions:apply_kronecker_factors": "Q_list, X",
    "psgd.psgd_kron_contractions:apply_preconditioner": "Q_list, X",
    "psgd.psgd_kron_contractions:partial_contraction": "G1, G2, axis",
    "psgd.psgd_utils:norm_lower_bound_skew": "A, k=32, half_iters=2, eps=1e-08",
    "psgd.psgd_utils:norm_lower_bound_spd": "A, k=32, half_iters=2, eps=1e-08",
    "psgd.psgd_utils:uniformize_q_in_place": "Q_list",
    "registry:get_configured_optimizer_cls": "name, **kwargs",
    "registry:get_optimizer_cls": "name",
    "registry:get_optimizer_name_list": "",
    "registry:register_optimizer": "name",
    "registry:validate_optimizer_args": "opt_cls, kwargs",
    "scalar_optimizers.update_functions.adam:calculate_adam_update": (
        "grad, exp_avg, exp_avg_sq, *, betas, eps, correct_bias, nesterov, step"
    ),
    "scalar_optimizers.update_functions.ademamix:calculate_ademamix_update": (
        "grad, exp_avg_fast, exp_avg_slow, exp_avg_sq, *, betas, eps, correct_bias, step, "
        "num_beta_slow_warmup_steps, num_alpha_warmup_steps, alpha=2"
    ),
    "scalar_optimizers.update_functions.ademamix:calculate_sim_ademamix_update": (
        "grad, exp_avg, exp_avg_sq, *, betas, eps, correct_bias, step, num_beta_fast_warmup_steps, min_beta_fast, "
        "alpha=2"
    ),
    "scalar_optimizers.update_functions.laprop:calculate_laprop_update": (
        "grad, exp_avg, exp_avg_sq, *, betas, eps, correct_bias, step"
    ),
    "scalar_optimizers.update_functions.lion:calculate_lion_update": "grad, exp_avg, *, betas",
    "scalar_optimizers.update_functions.madam:calculate_madam_update": (
        "grad, exp_avg, exp_avg_sq_scaled, *, betas, correct_bias, step, scale_log2"
    ),
    "scalar_optimizers.update_functions.rmsprop:calculate_rmsprop_update": "grad, exp_avg_sq, *, alpha, eps, step=None",
    "scalar_optimizers.update_functions.signum:calculate_signum_update": (
        "grad, exp_avg, *, momentum, correct_bias, nesterov, step, use_shape_scaling=False"
    ),
    "soap.soap:init_kronecker_factors": "grad_shape, device=None",
    "soap.soap:precondition": "x, eigenbasis_list=None, dims=None",
    "soap.soap:update_eigenbasis_and_exp_avgs": (
        "kronecker_factor_list, eigenbasis_list, exp_avg_sq, exp_avg, use_eigh=False, power_iter_steps=1"
    ),
    "soap.soap:update_kronecker_factors": "kronecker_factor_list, grad, shampoo_beta",
    "soap.soap:update_kronecker_factors_kl_shampoo": (
        "kronecker_factor_list, grad, shampoo_beta, eigenbasis_list, eps, eigval_exp=-1.0"
    ),
    "soap.soap_utils:get_eigenbasis_eigh": "kronecker_factor_list",
    "soap.soap_utils:get_eigenbasis_qr": "kronecker_factor_list, eigenbasis_list, power_iter_steps=1",
    "soap.soap_utils:sort_eigenbasis_by_approx_eigvals": "kronecker_factor_list, eigenbasis_list, exp_avg_sq",
    "utils.modules:Conv1dFlatWeights.forward": "self, x",
    "utils.eig:conjugate": "a, p, diag=False",
    "utils.eig:eigh_with_fallback": "x, force_double=False",
    "utils.eig:orthogonal_iteration": "kronecker_factor, eigenbasis, power_iter_steps",
    "utils:fp32_matmul_precision": 'precision="highest"',
    "utils:get_pg_rank": "group=None",
    "utils:get_pg_size": "group=None",
}


def load(path: str):
    module, name = path.split(":")
    return attrgetter(name)(import_module(f"emerging_optimizers.{module}"))


def arguments(function) -> str:
    bare = [p.replace(annotation=Parameter.empty) for p in inspect.signature(function).parameters.values()]
    return str(inspect.Signature(bare))[1:-1].replace("'", '"')


@pytest.mark.parametrize("path", FUNCTIONS)
def test_a_published_function_has_its_path_and_its_arguments(path):
    """What is more here comes after them, with a default."""
    ours, published = arguments(load(path)), FUNCTIONS[path]
    assert ours.startswith(published)
    assert all("=" in more for more in ours.removeprefix(published).split(", ") if more)


@pytest.mark.parametrize("name", ["conjugate", "eigh_with_fallback", "orthogonal_iteration", "power_iteration"])
def test_utils_has_the_names_of_utils_eig(name):
    assert load(f"utils:{name}") is load(f"utils.eig:{name}")


# ---- SOAP's parts ---------------------------------------------------------------------------------------------------


def state(m: int = 5, n: int = 4):
    generator = torch.Generator().manual_seed(0)
    G, moment = torch.randn(2, m, n, generator=generator, dtype=torch.float64)
    factors, bases = [], []
    for size in (m, n):
        x = torch.randn(size, size, generator=generator, dtype=torch.float64)
        factors.append(x @ x.T)
        bases.append(torch.linalg.qr(x).Q)
    return G, moment, factors, bases


@pytest.mark.parametrize("home", ["soap.soap", "legacy_soap.soap"])
def test_factors_are_moving_averages(home):
    G, _, (L, R), _ = state()
    factors = [L.clone(), R.clone()]
    load(f"{home}:update_kronecker_factors")(factors, G, 0.9)
    torch.testing.assert_close(factors, [0.9 * L + 0.1 * G @ G.T, 0.9 * R + 0.1 * G.T @ G])


@pytest.mark.parametrize("power", [-1.0, -0.5])
def test_kl_factors_are_whitened_by_each_other(power):
    G, _, (L, R), (Q_L, Q_R) = state()
    values = [torch.diag(Q.T @ K @ Q) for K, Q in ((L, Q_L), (R, Q_R))]
    roots = [Q @ torch.diag(v.clamp(min=2.0) ** power) @ Q.T for v, Q in zip(values, (Q_L, Q_R), strict=True)]
    expected = [0.9 * L + 0.1 * G @ roots[1] @ G.T / 4, 0.9 * R + 0.1 * G.T @ roots[0] @ G / 5]
    for home, known in (("soap.soap", []), ("legacy_soap.soap", [values])):
        factors = [L.clone(), R.clone()]
        update = load(f"{home}:update_kronecker_factors_kl_shampoo")
        update(factors, G, 0.9, [Q_L, Q_R], *known, 2.0, power)
        torch.testing.assert_close(factors, expected)
    with pytest.raises(TypeError, match=r"grad has shape \(5,\)"):
        load("soap.soap:update_kronecker_factors_kl_shampoo")([L, R], G[:, 0], 0.9, [Q_L, Q_R], 1e-8)


@pytest.mark.parametrize("use_eigh", [False, True])
def test_new_bases_diagonalise_and_carry_the_first_moment(use_eigh):
    _, moment, factors, bases = state()
    old = bases[0] @ moment @ bases[1].T
    steps = 200
    first, exp_avg, exp_avg_sq = load("soap.soap:update_eigenbasis_and_exp_avgs")(
        factors, bases, moment.square(), moment, use_eigh, steps
    )
    values, second, later, same = load("legacy_soap.soap:update_eigenbasis_and_exp_avgs")(
        factors, bases, moment.square(), moment, use_eigh, steps
    )
    for found in (first, second):
        for K, Q in zip(factors, found, strict=True):
            diagonal = Q.T @ K @ Q
            torch.testing.assert_close(diagonal, torch.diag(diagonal.diag()), rtol=0, atol=1e-3)
            assert (diagonal.diag().diff() < 1e-6).all()
    for m, Qs in ((exp_avg, first), (later, second)):
        torch.testing.assert_close(Qs[0] @ m @ Qs[1].T, old)
        torch.testing.assert_close(load("legacy_soap.soap:project_out")(m, Qs), old)
        torch.testing.assert_close(load("legacy_soap.soap:project_in")(old, Qs), m)
        torch.testing.assert_close(load("soap.soap:precondition")(old, Qs), m)
    torch.testing.assert_close(values[0], torch.linalg.eigvalsh(factors[0]).flip(0), rtol=1e-4, atol=1e-4)
    assert torch.equal(same, moment.square())
    assert torch.equal(exp_avg_sq.flatten().sort().values, moment.square().flatten().sort().values)


def test_the_published_parts_make_the_published_step():
    """The parts in the order of the June release against `SOAP(first_step="eigenbasis")`."""
    parts = {name: load(f"soap.soap:{name}") for name in (
        "init_kronecker_factors", "precondition", "update_eigenbasis_and_exp_avgs", "update_kronecker_factors"
    )}  # fmt: skip
    adam = load("scalar_optimizers:calculate_adam_update")
    grads = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = torch.nn.Parameter(torch.zeros(6, 6, dtype=torch.float64))
    optimizer = SOAP([p], lr=0.1, eps=1e-2, weight_decay=0.0, first_step="eigenbasis")
    weight = torch.zeros(6, 6, dtype=torch.float64)
    factors = [K.double() for K in parts["init_kronecker_factors"](weight.shape)]
    bases = [torch.eye(6, dtype=torch.float64)] * 2
    m, v = torch.zeros(2, 6, 6, dtype=torch.float64)
    for t, grad in enumerate(grads, 1):
        p.grad = grad
        optimizer.step()
        parts["update_kronecker_factors"](factors, grad, 1 - (1 - 0.95) / (1 - 0.95**t))
        bases, m, v = parts["update_eigenbasis_and_exp_avgs"](factors, bases, v, m, use_eigh=t == 1)
        rotated = parts["precondition"](grad, bases)
        update = adam(rotated, m, v, betas=(0.9, 0.95), eps=1e-2, correct_bias=True, nesterov=False, step=t)
        weight -= 0.1 * parts["precondition"](update, bases, dims=[[0], [1]])
        torch.testing.assert_close(p.detach(), weight, rtol=1e-6, atol=1e-8)


def test_the_other_helpers():
    _, _, factors, bases = state()
    U = load("legacy_soap.soap_utils:get_eigenbasis_svd")(factors)[0]
    torch.testing.assert_close(U @ torch.diag(torch.linalg.eigvalsh(factors[0]).flip(0)) @ U.T, factors[0])
    with pytest.raises(TypeError, match="not that of a matrix"):
        load("soap.soap:init_kronecker_factors")((3,))
    assert load("soap.soap:precondition")(bases[0]) is bases[0]


@pytest.mark.parametrize(
    ("method", "keep"), [("decoupled", 1 - 0.1 * 0.5), ("independent", 0.5), ("palm", 1 - 0.01 * 0.5), ("l2", 1.0)]
)
def test_the_mixin_decays_as_the_engine_does(method, keep):
    class Mine(load("mixin:WeightDecayMixin")):
        weight_decay_method = method

    p, grad = torch.full((2,), 2.0), torch.ones(2)
    Mine()._apply_weight_decay_inplace(p, grad, 0.1, 0.5)
    torch.testing.assert_close(p, torch.full((2,), 2 * keep))
    torch.testing.assert_close(grad, torch.full((2,), 2.0 if method == "l2" else 1.0))
    Mine.weight_decay_method = "l3"
    with pytest.raises(ValueError, match="weight_decay_method='l3'"):
        Mine()._apply_weight_decay_inplace(p, grad, 0.1, 0.5)


X, I = torch.ones(4, 3), torch.eye(3)
ADAM_OPTIONS = {"betas": (0.9, 0.99), "eps": 1e-8, "correct_bias": True, "nesterov": False}


@pytest.mark.parametrize(
    ("path", "args", "options", "match"),
    [
        ("utils.eig:conjugate", (I, torch.eye(4)), {}, r"\(3, 3\) and p of shape \(4, 4\) do not go together"),
        ("utils.eig:eigh_with_fallback", (I.int(),), {}, r"x is torch.int32; give floating-point"),
        ("utils.eig:orthogonal_iteration", (I, I, 1.5), {}, r"power_iter_steps=1.5 .* give an integer >= 1"),
        ("utils:SinkhornMapper", (1.5,), {}, r"num_iters=1.5 .* give an integer >= 0"),
        ("contrib.row_norm:row_norm_fn", (X.int(),), {}, r"given is torch.int32"),
        (
            "orthogonalized_optimizers.polargrad:left_polargrad_orth_fn",
            (X[0],),
            {},
            r"grad has shape \(3,\); give a matrix",
        ),
        ("orthogonalized_optimizers.muon_utils:get_coefficient_iterator", (-1, [(1.0, 2.0, 3.0)]), {}, r"steps=-1"),
        (
            "orthogonalized_optimizers.muon_utils:newton_schulz",
            (X, 5, "custom", [(1, 2)]),
            {},
            r"given is \[\(1, 2\)\]",
        ),
        ("orthogonalized_optimizers.spectral_clipping_utils:spectral_clip", (X[0],), {}, r"X has shape \(3,\); give"),
        ("orthogonalized_optimizers.spectral_clipping_utils:spectral_hardcap", (X, -1.0), {}, r"beta=-1.0 is not"),
        (
            "orthogonalized_optimizers.spectral_clipping_utils:spectral_clipped_weight_decay",
            (X, 1.0, 2.0),
            {},
            r"c=2.0 is not allowed; give a number in \[0, 1\]",
        ),
        ("psgd.psgd_utils:norm_lower_bound_spd", (I, 0), {}, r"k=0 is not allowed; give an integer >= 1"),
        ("psgd.psgd_kron_contractions:partial_contraction", (X, X, 2), {}, r"axis=2 do not go together"),
        ("psgd.psgd_kron_contractions:partial_contraction", (X, X.T, 0), {}, r"\(4, 3\) and \(3, 4\) and axis=0"),
        ("scalar_optimizers:calculate_adam_update", (X, X, X), {**ADAM_OPTIONS, "step": 0}, r"step=0 .* counts from 1"),
    ],
)
def test_what_a_published_function_cannot_take_is_named(path, args, options, match):
    with pytest.raises(ValueError, match=match):
        load(path)(*args, **options)


def test_an_axis_may_count_from_the_end():
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    contract = load("psgd.psgd_kron_contractions:partial_contraction")
    assert torch.equal(contract(x, x, -1), contract(x, x, 2))
