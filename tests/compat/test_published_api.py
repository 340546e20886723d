"""Import paths, signatures and state keys of NVIDIA's Emerging-Optimizers, June 2026 to 0.5.0, hold here too."""

import inspect
from importlib import import_module
from inspect import Parameter

import pytest
import torch

REQUIRED = Parameter.empty
BETAS, NO_DECAY = (0.9, 0.95), 0.0

# path: (positional arguments, keyword-only arguments), each with its default
SIGNATURES = {
    "orthogonalized_optimizers.orthogonalized_optimizer:OrthogonalizedOptimizer": (
        {"params": REQUIRED, "lr": REQUIRED, "momentum": REQUIRED, "weight_decay": REQUIRED},
        {
            "nesterov": REQUIRED,
            "weight_decay_method": REQUIRED,
            "fp32_matmul_prec": REQUIRED,
            "scaled_orthogonalize_fn": None,
        },
    ),
    "orthogonalized_optimizers.muon:Muon": (
        {"params": REQUIRED, "lr": 3e-4, "momentum": 0.95, "weight_decay": 0.01},
        {
            "nesterov": False,
            "weight_decay_method": "decoupled",
            "fp32_matmul_prec": "medium",
            "coefficient_type": "quintic",
            "num_ns_steps": 5,
            "scale_mode": "spectral",
            "extra_scale_factor": 1.0,
            "use_syrk": False,
        },
    ),
    # momentum and weight_decay have no defaults there
    "orthogonalized_optimizers.adaptive_muon:AdaptiveMuon": (
        {"params": REQUIRED, "lr": REQUIRED, "momentum": 0.95, "weight_decay": 0.01},
        {
            "nesterov": False,
            "weight_decay_method": "decoupled",
            "fp32_matmul_prec": "medium",
            "coefficient_type": "quintic",
            "num_ns_steps": 5,
            "scale_mode": "spectral",
            "extra_scale_factor": 1.0,
            "moment2_method": "adamuon",
            "beta2": 0.95,
            "eps": 1e-8,
        },
    ),
    "orthogonalized_optimizers.mop:MOP": (
        {"params": REQUIRED, "lr": 3e-4, "momentum": 0.95, "weight_decay": 0.01},
        {
            "nesterov": False,
            "weight_decay_method": "decoupled",
            "fp32_matmul_prec": "highest",
            "scale_mode": "nuclear_norm",
            "extra_scale_factor": 1.0,
        },
    ),
    "orthogonalized_optimizers.polargrad:PolarGrad": (
        {"params": REQUIRED, "lr": 3e-4, "momentum": 0.95, "weight_decay": 0.01},
        {
            "nesterov": False,
            "weight_decay_method": "decoupled",
            "fp32_matmul_prec": "highest",
            "coefficient_type": "quintic",
            "num_ns_steps": 5,
            "extra_scale_factor": 1.0,
        },
    ),
    "orthogonalized_optimizers.scion:Scion": (
        {"params": REQUIRED, "lr": 3e-4, "momentum": 0.95},
        {"fp32_matmul_prec": "medium", "coefficient_type": "quintic", "num_ns_steps": 5, "spectral_radius": 1.0},
    ),
    "orthogonalized_optimizers.spel:Spel": (
        {"params": REQUIRED, "lr": 3e-4, "momentum": 0.95, "weight_decay": 0.1},
        {
            "nesterov": False,
            "weight_decay_method": "decoupled",
            "fp32_matmul_prec": "medium",
            "coefficient_type": "quintic",
            "num_ns_steps": 5,
            "scale_mode": "unit_spectral_norm",
        },
    ),
    "orthogonalized_optimizers.muon_hyperball:MuonHyperball": (
        {"params": REQUIRED, "lr": 3e-4, "momentum": 0.95, "weight_decay": 0.01},
        {"hyperball_eps": 1e-8, "hyperball_radius": None},
    ),
    "orthogonalized_optimizers.sinkhorn_muon:SinkhornMuon": (
        {"params": REQUIRED, "lr": 3e-4, "momentum": 0.95, "weight_decay": 0.01},
        {"num_iters": 20, "eps": 1e-8, "doubly_stochastic_tolerance": 0.1},
    ),
    "contrib.muown:Muown": (
        {"params": REQUIRED, "lr": 3e-4, "momentum": 0.95, "weight_decay": 0.0},
        {
            "betas": (0.9, 0.95),
            "adam_eps": 1e-8,
            "fp32_matmul_prec": "medium",
            "coefficient_type": "quintic",
            "num_ns_steps": 5,
            "scale_mode": "spectral",
            "extra_scale_factor": 1.0,
            "use_syrk": False,
        },
    ),
    "orthogonalized_optimizers.spectron:Spectron": (
        {"params": REQUIRED, "lr": 3e-4, "rank": 64, "momentum_beta": 0.9, "weight_decay": 0.01},
        {
            "weight_decay_method": "decoupled",
            "fp32_matmul_prec": "medium",
            "num_ns_steps": 5,
            "num_power_iter": 1,
            "coefficient_type": "quintic",
        },
    ),
    "soap.soap:SOAP": (
        {"params": REQUIRED, "lr": REQUIRED, "betas": BETAS, "shampoo_beta": 0.95, "eps": 1e-8, "weight_decay": 0.01},
        {
            "weight_decay_method": "decoupled",
            "nesterov": False,
            "correct_bias": True,
            "fp32_matmul_prec": "highest",
            "use_eigh": False,
            "qr_fp32_matmul_prec": "high",
            "power_iter_steps": 1,
            "max_update_rms": 0.0,
            "use_kl_shampoo": False,
            "correct_shampoo_beta_bias": None,
            "stream_list": None,
        },
    ),
    "soap.rekls:REKLS": (
        {"params": REQUIRED, "lr": REQUIRED, "betas": BETAS, "shampoo_beta": 0.95, "eps": 1e-8, "weight_decay": 0.01},
        {"weight_decay_method": "decoupled"},
    ),
    "legacy_soap.tp_rekls:TpRekls": (
        {"params": REQUIRED, "lr": REQUIRED, "betas": BETAS, "shampoo_beta": 0.95, "eps": 1e-8, "weight_decay": 0.01},
        {"weight_decay_method": "decoupled", "tp_group": None, "fp32_matmul_prec": "high"},
    ),
    "legacy_soap.stacked_soap:StackedSoap": (
        {"params": REQUIRED, "lr": REQUIRED, "betas": BETAS, "shampoo_beta": 0.95, "eps": 1e-8, "weight_decay": 0.01},
        {},
    ),
    **{
        f"shampoo.soap_v3:{name}": (
            {
                "params": REQUIRED,
                "lr": REQUIRED,
                "betas": BETAS,
                "shampoo_beta": 0.95,
                "eps": 1e-8,
                "weight_decay": 0.01,
            },
            {"stream_list": None},
        )
        for name in ("KlSoapV3", "ReklsV3", "KlMSoap")
    },
    "legacy_soap.moso:MOSO": (
        {
            "params": REQUIRED,
            "lr": 3e-4,
            "momentum": 0.95,
            "rms_beta": 0.95,
            "shampoo_beta": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.01,
        },
        {"max_update_rms": 0.0},
    ),
    "shampoo.shampoo:Shampoo": (
        {
            "params": REQUIRED,
            "lr": REQUIRED,
            "momentum": 0.9,
            "shampoo_beta": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.01,
        },
        {"p_root_inv": 4},
    ),
    "scalar_optimizers.laprop:LaProp": (
        {"params": REQUIRED, "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
        {"correct_bias": True, "frob_normalize": False, "weight_decay_method": "decoupled"},
    ),
    "scalar_optimizers:Signum": (
        {"params": REQUIRED, "lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0},
        {
            "correct_bias": True,
            "nesterov": False,
            "use_shape_scaling": False,
            "weight_decay_method": "decoupled",
        },
    ),
    "scalar_optimizers:SimplifiedAdEMAMix": (
        {"params": REQUIRED, "lr": 1e-3, "betas": (0.9999, 0.999), "eps": 1e-8, "weight_decay": 0.0},
        {
            "correct_bias": True,
            "num_beta_fast_warmup_steps": None,
            "min_beta_fast": 0.9,
            "alpha": 2.0,
            "weight_decay_method": "decoupled",
        },
    ),
    "psgd.psgd:PSGDPro": (
        {"params": REQUIRED, "lr": 3e-3, "weight_decay": 0.01, "momentum": 0.9},
        {
            "weight_decay_method": "decoupled",
            "beta_lip": 0.9,
            "precond_lr": 0.1,
            "precond_init_scale": 1.0,
            "damping_noise_scale": 0.1,
            "min_precond_lr": 0.01,
            "warmup_steps": 10000,
            "max_update_rms": 0.0,
        },
    ),
    "riemannian_optimizers.normalized_optimizer:ObliqueSGD": (
        {"params": REQUIRED, "lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0},
        {"weight_decay_method": "decoupled", "dim": 0, "eps": 1e-8, "scale_mode": "unit_l2_norm"},
    ),
    "riemannian_optimizers.normalized_optimizer:ObliqueAdam": (
        {"params": REQUIRED, "lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.0},
        {
            "weight_decay_method": "decoupled",
            "dim": 0,
            "eps": 1e-8,
            "correct_bias": True,
            "scale_mode": "unit_l2_norm",
        },
    ),
    "riemannian_optimizers.normalized_optimizer:ObliqueSteepestSGD": (
        {"params": REQUIRED, "lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0},
        {"weight_decay_method": "decoupled", "dim": 0, "eps": 1e-8, "scale_mode": "unit_rms_norm"},
    ),
    "riemannian_optimizers.normalized_optimizer:ObliqueSteepestAdam": (
        {"params": REQUIRED, "lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.0},
        {
            "weight_decay_method": "decoupled",
            "dim": 0,
            "eps": 1e-8,
            "correct_bias": True,
            "scale_mode": "unit_rms_norm",
        },
    ),
    **{
        f"shampoo.shampoo:{name}": (
            {
                "params": REQUIRED,
                "lr": REQUIRED,
                "momentum": 0.9,
                "shampoo_beta": 0.95,
                "eps": 1e-8,
                "weight_decay": 0.01,
            },
            {"p_root_inv": 4, "scale_mode": "spectral"},
        )
        for name in ("ShampooBase", "KlShampoo")
    },
    "riemannian_optimizers.isospectral:Iso": (
        {"params": REQUIRED, "lr": 1e-3, "momentum": 0.9, "retraction": "qr"},
        {"fp32_matmul_prec": "highest"},
    ),
    "scalar_optimizers.lion:Lion": (
        {"params": REQUIRED, "lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.01},
        {"weight_decay_method": "decoupled"},
    ),
}


def load(path: str):
    module, name = path.split(":")
    return getattr(import_module(f"emerging_optimizers.{module}"), name)


@pytest.mark.parametrize(
    "path",
    [
        *SIGNATURES,
        "orthogonalized_optimizers:Muon",
        "orthogonalized_optimizers:OrthogonalizedOptimizer",
        *(
            f"orthogonalized_optimizers:{name}"
            for name in (
                "AdaptiveMuon",
                "MOP",
                "MuonHyperball",
                "PolarGrad",
                "Scion",
                "Spectron",
                "Spel",
                "left_polargrad_orth_fn",
                "one_sided_polargrad_orth_fn",
                "right_polargrad_orth_fn",
                "spectral_clip",
                "spectral_hardcap",
            )
        ),
        "orthogonalized_optimizers.mop:polar_via_svd",
        "orthogonalized_optimizers.spectral_clipping_utils:spectral_clipped_weight_decay",
        "contrib.row_norm:row_norm_fn",
        "legacy_soap.tp_rekls:all_gather_grad_and_kronecker_factors_tp",
        "package_info:__version__",
        *(f"package_info:{name}" for name in ("MAJOR", "MINOR", "PATCH", "PRE_RELEASE", "VERSION")),
        *(f"orthogonalized_optimizers:{name}" for name in ("HookStateT", "NoOpWeightUpdateHook", "WeightUpdateHook")),
        "weight_update_hooks.base:HookStateT",
        "orthogonalized_optimizers.sinkhorn_utils:sinkhorn_balance",
        "orthogonalized_optimizers.spel:SpelScaleT",
        "orthogonalized_optimizers.spel:get_spel_scale_factor",
        "riemannian_optimizers.normalized_optimizer:ObliqueScaleT",
        *(
            f"riemannian_optimizers.retractions.stiefel:{name}"
            for name in (
                "RetractionT",
                "cayley_retraction",
                "newton_schulz_retraction",
                "polar_retraction",
                "qr_retraction",
            )
        ),
        *(
            f"shampoo.shampoo:{name}"
            for name in ("KlShampooPreconditioner", "ShampooPreconditioner", "get_shampoo_scale_factor")
        ),
        "shampoo.matrix_root_inverse_utils:mat_4th_root_inv_via_scaled_cans",
        "shampoo.matrix_root_inverse_utils:mat_root_inv_via_scaled_cans",
        *(f"shampoo:{name}" for name in ("KlMSoap", "KlShampoo", "KlSoapV3", "ReklsV3")),
        *(f"shampoo:{name}" for name in ("ShampooBase", "ShampooPreconditioner", "get_shampoo_scale_factor")),
        "riemannian_optimizers:ObliqueScaleT",
        "shampoo.soap_v3:KlSoapPreconditioner",
        "shampoo.soap_v3:ReklsPreconditioner",
        "shampoo.soap_v3:SoapBase",
        *(
            f"shampoo.{module}:{name}"
            for module in ("shampoo_base", "precond_base")
            for name in ("ShampooPreconditionerProtocol", "SoapPreconditionerProtocol", "TensorPair")
        ),
        "scalar_optimizers:SingleMomentumOptimizer",
        "scalar_optimizers.base:SingleMomentumOptimizer",
        "scalar_optimizers.base:TwoMomentsOptimizer",
        "weight_update_hooks:NoOpWeightUpdateHook",
        "weight_update_hooks.base:NoOpWeightUpdateHook",
        "weight_update_hooks:HyperballHook",
        "weight_update_hooks:RadialBrakeHook",
        "weight_update_hooks:RelativeUpdateHook",
        "weight_update_hooks:WeightUpdateHook",
        "orthogonalized_optimizers:get_muon_scale_factor",
        "orthogonalized_optimizers.muon:get_muon_scale_factor",
        "orthogonalized_optimizers.muon_utils:NSCoeffT",
        "orthogonalized_optimizers.muon_utils:get_coefficient_iterator",
        "orthogonalized_optimizers.muon_utils:newton_schulz",
        "legacy_soap.matrix_root_inverse_utils:inv_root_via_eigh",
        "legacy_soap.matrix_root_inverse_utils:mat_root_inv_via_scaled_cans",
        "legacy_soap:MOSO",
        "legacy_soap:REKLS",
        "legacy_soap:SOAP",
        "legacy_soap:StackedSoap",
        "shampoo:Shampoo",
        "soap:REKLS",
        "soap:SOAP",
        "riemannian_optimizers:ObliqueAdam",
        "riemannian_optimizers:ObliqueSGD",
        "scalar_optimizers:LaProp",
        "scalar_optimizers:Lion",
        "legacy_soap.rekls:REKLS",
        "legacy_soap.soap:SOAP",
        "mixin:WeightDecayMixin",
        "mixin:WeightDecayT",
        "orthogonalized_optimizers:SinkhornMuon",
        "psgd:PSGDPro",
        "weight_update_hooks.base:WeightUpdateHook",
        "weight_update_hooks.hyperball:HyperballHook",
        "weight_update_hooks.radial_brake:RadialBrakeHook",
        "weight_update_hooks.relative_update:RelativeUpdateHook",
        "utils.modules:Conv1dFlatWeights",
        "utils:FP32MatmulPrecT",
        "utils:SinkhornMapper",
        "utils:fp32_matmul_precision",
        "utils.eig:conjugate",
        "utils.eig:eigh_with_fallback",
        "utils.eig:orthogonal_iteration",
        "utils.eig:power_iteration",
    ],
)
def test_a_published_import_path_resolves(path):
    assert load(path) is not None


@pytest.mark.parametrize("path", SIGNATURES)
def test_published_arguments_have_their_names_order_kinds_and_defaults(path):
    ours = inspect.signature(load(path)).parameters
    positional = {n: p.default for n, p in ours.items() if p.kind is Parameter.POSITIONAL_OR_KEYWORD}
    keyword_only = {n: p.default for n, p in ours.items() if p.kind is Parameter.KEYWORD_ONLY}
    published_positional, published_keyword_only = SIGNATURES[path]
    assert list(positional.items()) == list(published_positional.items())
    assert [(n, d) for n, d in keyword_only.items() if n in published_keyword_only] == list(
        published_keyword_only.items()
    )
    assert REQUIRED not in [d for n, d in keyword_only.items() if n not in published_keyword_only]


SPECTRON_STATE = {"step", "factor_A", "factor_B", "momentum_A", "momentum_B", "u_A", "u_B"}
SOAP_STATE = {"step", "exp_avg", "exp_avg_sq", "L", "R", "Q_L", "Q_R"}
KL_STATE = SOAP_STATE | {"eigvals_L", "eigvals_R"}  # as August 2026 has them


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        ("orthogonalized_optimizers.muon:Muon", {"momentum_buffer"}),
        ("orthogonalized_optimizers:Spectron", SPECTRON_STATE),
        ("legacy_soap:MOSO", {"step", "momentum_buffer", "exp_avg_sq", "M", "Q_M"}),
        ("shampoo:Shampoo", {"step", "exp_avg", "L", "R"}),
        ("soap.soap:SOAP", SOAP_STATE),
        ("soap.rekls:REKLS", KL_STATE),
        ("legacy_soap:StackedSoap", KL_STATE),
        ("scalar_optimizers.laprop:LaProp", {"step", "exp_avg", "exp_avg_sq"}),
        ("scalar_optimizers.lion:Lion", {"exp_avg"}),
        ("scalar_optimizers:Signum", {"step", "exp_avg"}),
        ("scalar_optimizers:SimplifiedAdEMAMix", {"step", "exp_avg", "exp_avg_sq"}),
        ("riemannian_optimizers:ObliqueSGD", {"momentum_buffer"}),
        ("riemannian_optimizers:ObliqueAdam", {"step", "exp_avg", "exp_avg_sq"}),
    ],
)
def test_state_has_the_published_keys_after_one_step(path, keys):
    p = torch.nn.Parameter(torch.ones(4, 3))
    p.grad = torch.eye(4, 3)
    optimizer = load(path)([p], lr=0.1)
    optimizer.step()
    state = optimizer.state[p]
    assert state.keys() == keys
    shapes = {"step": (), "L": (4, 4), "Q_L": (4, 4), "R": (3, 3), "Q_R": (3, 3), "M": (3, 3), "Q_M": (3, 3)}
    shapes |= {"factor_B": (3, 3), "momentum_B": (3, 3), "u_A": (4,), "u_B": (3,), "eigvals_L": (4,), "eigvals_R": (3,)}
    assert {key: tuple(torch.as_tensor(value).shape) for key, value in state.items()} == {
        key: shapes.get(key, (4, 3)) for key in keys
    }
    assert optimizer.state_dict()["state"][0].keys() == keys


@pytest.mark.parametrize(("shape", "joined"), [((3, 6, 4), (6, 12)), ((3, 4, 6), (12, 6)), ((5, 4), (5, 4))])
def test_stacked_soap_is_kl_soap_of_the_matrices_side_by_side(shape, joined):
    """The published layout: the batch goes into the shorter side, and the state has the shape of the result."""
    g = torch.Generator().manual_seed(0)

    def join(x):
        return (x.permute(1, 0, 2) if joined[0] == shape[-2] and x.ndim == 3 else x).reshape(joined)

    stack = torch.nn.Parameter(torch.randn(shape, generator=g))
    flat = torch.nn.Parameter(join(stack.detach()).clone())
    optimizers = [
        load("legacy_soap.stacked_soap:StackedSoap")([stack], 0.1, BETAS, 0.95, 1e-8, 0.01),
        load("soap.soap:SOAP")([flat], lr=0.1, use_kl_shampoo=True),
    ]
    for _ in range(4):
        stack.grad = torch.randn(shape, generator=g)
        flat.grad = join(stack.grad).clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(join(stack.detach()), flat)
    state, expected = (optimizer.state[p] for optimizer, p in zip(optimizers, (stack, flat), strict=True))
    assert {key: x.shape for key, x in state.items()} == {key: x.shape for key, x in expected.items()}


# ---- the calls of the two published notebooks -----------------------------------------------------------------------

COMPARISON = {
    "LaProp": ("scalar_optimizers.laprop:LaProp", {"lr": 1.0, "betas": (0.9, 0.65), "eps": 1e-8, "weight_decay": 0.0}),
    "Muon": ("orthogonalized_optimizers.muon:Muon", {"lr": 1.0, "momentum": 0.95, "weight_decay": 0.0}),
    "SOAP": (
        "soap.soap:SOAP",
        {
            "lr": 1.0,
            "betas": (0.9, 0.95),
            "shampoo_beta": 0.95,
            "weight_decay": 0.0,
            "fp32_matmul_prec": "highest",
            "use_kl_shampoo": True,
        },
    ),
    "REKLS": ("soap.rekls:REKLS", {"lr": 1.0, "betas": (0.9, 0.95), "shampoo_beta": 0.95, "weight_decay": 0.0}),
}


@pytest.mark.parametrize("name", COMPARISON)
def test_the_comparison_notebook_runs_and_records_updates_of_its_steady_size(name):
    path, options = COMPARISON[name]
    g = torch.Generator().manual_seed(0)
    param = torch.zeros((128, 64), requires_grad=True)
    opt = load(path)([param], **options)
    for _ in range(12):
        param.grad = torch.randn((128, 64), generator=g)
        p_before = param.detach().clone()
        opt.step()
        update = p_before - param.detach()
    rms = update.square().mean().sqrt().item()
    assert 0.97 < rms < 1.03 if name == "Muon" else 0.1 < rms < 1


@pytest.mark.parametrize("precision", ["high", "highest"])
@pytest.mark.parametrize("use_eigh", [False, True])
def test_the_eigenbasis_notebook_runs_and_reads_a_basis_and_a_factor(use_eigh, precision):
    g = torch.Generator().manual_seed(0)
    param = torch.zeros((16, 8), requires_grad=True)
    opt = load("soap.soap:SOAP")(
        [param],
        lr=1.0,
        betas=(0.9, 0.95),
        shampoo_beta=0.95,
        weight_decay=0.0,
        use_kl_shampoo=True,
        use_eigh=use_eigh,
        fp32_matmul_prec=precision,
    )
    Q_L_traj = torch.empty(6, 16, 16)
    for i in range(6):
        param.grad = torch.randn((16, 8), generator=g) * (1000.0 if i == 3 else 1.0)
        opt.step()
        Q_L_traj[i] = opt.state[param]["Q_L"].detach().cpu()
    torch.testing.assert_close(Q_L_traj.mT @ Q_L_traj, torch.eye(16).expand(6, 16, 16), rtol=0, atol=1e-4)
    assert not torch.equal(Q_L_traj[-1], Q_L_traj[-2])  # copies of each step, not six views of the last
    assert (torch.linalg.eigvalsh(opt.state[param]["L"]) > -1).all()


# function: (tensors, keyword-only arguments without a default, those with one)
FUNCTIONS = {
    "adam": (["grad", "exp_avg", "exp_avg_sq"], ["betas", "eps", "correct_bias", "nesterov", "step"], {}),
    "laprop": (["grad", "exp_avg", "exp_avg_sq"], ["betas", "eps", "correct_bias", "step"], {}),
    "lion": (["grad", "exp_avg"], ["betas"], {"step": None}),
    "signum": (
        ["grad", "exp_avg"],
        ["momentum", "correct_bias", "nesterov", "step"],
        {"use_shape_scaling": False},
    ),
    "ademamix": (
        ["grad", "exp_avg_fast", "exp_avg_slow", "exp_avg_sq"],
        ["betas", "eps", "correct_bias", "step", "num_beta_slow_warmup_steps", "num_alpha_warmup_steps"],
        {"alpha": 2},
    ),
    "sim_ademamix": (
        ["grad", "exp_avg", "exp_avg_sq"],
        ["betas", "eps", "correct_bias", "step", "num_beta_fast_warmup_steps", "min_beta_fast"],
        {"alpha": 2},
    ),
    "madam": (["grad", "exp_avg", "exp_avg_sq_scaled"], ["betas", "correct_bias", "step", "scale_log2"], {}),
    "rmsprop": (["grad", "exp_avg_sq"], ["alpha", "eps"], {"step": None}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("module", ["scalar_optimizers", "scalar_optimizers.update_functions"])
def test_published_update_functions_have_their_arguments(name, module):
    parameters = inspect.signature(load(f"{module}:calculate_{name}_update")).parameters.values()
    named = [p for p in parameters if p.kind is Parameter.KEYWORD_ONLY]
    tensors, required, optional = FUNCTIONS[name]
    assert [p.name for p in parameters if p.kind is Parameter.POSITIONAL_OR_KEYWORD] == tensors
    assert [p.name for p in named if p.default is REQUIRED] == required
    assert {p.name: p.default for p in named if p.default is not REQUIRED} == optional


# ---- the published functions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (3, 6, 4)])
def test_published_newton_schulz_orthogonalizes_a_matrix_or_a_stack(shape):
    newton_schulz = load("orthogonalized_optimizers.muon_utils:newton_schulz")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = newton_schulz(x, steps=8, coefficient_type="polar_express", eps=1e-7)
    U, _, Vh = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(out, U @ Vh, rtol=0, atol=1e-3)


@pytest.mark.parametrize("x", [torch.ones(3), torch.ones(1, 1, 2, 2), torch.ones(2, 2, dtype=torch.bfloat16)])
def test_published_newton_schulz_refuses_what_it_refused(x):
    with pytest.raises(TypeError):
        load("orthogonalized_optimizers.muon_utils:newton_schulz")(x, steps=5)


def test_published_coefficient_iterator_cycles_or_repeats_the_last():
    iterate = load("orthogonalized_optimizers.muon_utils:get_coefficient_iterator")
    one, two = (1.0, 0.0, 0.0), (2.0, 0.0, 0.0)
    assert list(iterate(3, [one, two])) == [one, two, one]
    assert list(iterate(4, [one, two], mode="repeat_last")) == [one, two, two, two]
    for bad in (([],), ([one], "stop")):
        with pytest.raises(ValueError, match=r"empty|mode"):
            iterate(2, *bad)
