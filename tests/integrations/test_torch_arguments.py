import copy

import pytest
import torch
from torch import nn

from emerging_optimizers import AdamW, Lion, Muon, create_optimizer
from emerging_optimizers.integrations.torch_arguments import from_torch
from emerging_optimizers.linalg.precision import reduced_precision
from emerging_optimizers.registry import OPTIMIZERS, register_optimizer
from emerging_optimizers.scalar_optimizers.rmsprop import RMSProp


def two_steps(make, shape, dtype=torch.float32):
    """A weight after two steps."""
    torch.manual_seed(1)
    w = nn.Parameter(torch.randn(shape, dtype=dtype))
    optimizer = make([w])
    for _ in range(2):
        w.grad = torch.randn(shape, dtype=dtype)
        optimizer.step()
    return w.detach()


ADAMS = [
    {},
    {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.3},
    {"maximize": True},
    {"foreach": True},
    {"fused": True},
    {"foreach": False, "fused": None, "differentiable": False, "amsgrad": False},
    {"lr": torch.tensor(0.02), "capturable": True},
]


@pytest.mark.parametrize("arguments", ADAMS, ids=str)
def test_adamw_is_torchs(arguments):
    ours = two_steps(lambda p: AdamW(p, **from_torch("adamw", **arguments)), (5, 3), torch.float64)
    theirs = two_steps(lambda p: torch.optim.AdamW(p, **{**arguments, "capturable": False}), (5, 3), torch.float64)
    # Some roundings of a float64; of a float32 where the learning rate is one, with which torch's refuses a CPU.
    assert torch.allclose(ours, theirs, rtol=1e-6 if "capturable" in arguments else 1e-13, atol=1e-14)


def test_adam_with_its_l2_decay():
    given = {"lr": 0.02, "weight_decay": 0.3}
    options = from_torch("adamw", **given, decoupled_weight_decay=False)
    ours = two_steps(lambda p: AdamW(p, **options), (5, 3), torch.float64)
    theirs = two_steps(lambda p: torch.optim.Adam(p, **given), (5, 3), torch.float64)
    assert torch.allclose(ours, theirs, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("arguments", [{}, {"lr": 0.1, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.2}], ids=str)
def test_rmsprop_is_torchs(arguments):
    ours = two_steps(lambda p: RMSProp(p, **from_torch("rmsprop", **arguments)), (5, 3), torch.float64)
    theirs = two_steps(lambda p: torch.optim.RMSprop(p, **arguments), (5, 3), torch.float64)
    assert torch.allclose(ours, theirs, rtol=1e-13, atol=1e-14)


MUONS = [
    {},
    {"lr": 0.02, "weight_decay": 0.3, "momentum": 0.8, "nesterov": False},
    {"adjust_lr_fn": "original", "ns_steps": 6},
    {"adjust_lr_fn": "match_rms_adamw"},
    {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 3},
    {"ns_coefficients": [3.4445, -4.775, 2.0315]},
]


@pytest.mark.parametrize("shape", [(24, 6), (6, 24)], ids=str)
@pytest.mark.parametrize("arguments", MUONS, ids=str)
def test_muon_is_torchs_up_to_the_rounding_of_its_products(arguments, shape):
    options = from_torch("muon", **arguments)
    theirs = two_steps(lambda p: torch.optim.Muon(p, **arguments), shape)
    start = two_steps(lambda p: torch.optim.Muon(p, **{**arguments, "lr": 0.0}), shape)
    with reduced_precision("bfloat16"):
        ours = two_steps(lambda p: Muon(p, **options), shape)
    # Torch multiplies in bfloat16 throughout: 2^-8 in each of some ten products.
    distance = torch.linalg.norm(ours - theirs) / torch.linalg.norm(theirs - start)
    assert distance < 0.04
    # A scale that is wrong by a fifth is seen.
    options["extra_scale_factor"] *= 1.2
    other = two_steps(lambda p: Muon(p, **options), shape)
    assert torch.linalg.norm(other - theirs) / torch.linalg.norm(theirs - start) > 0.06


def test_for_a_model():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10))
    options = from_torch("muon", lr=2e-3, adjust_lr_fn="match_rms_adamw", fused=True)
    with pytest.raises(ValueError, match="give companion_lr"):  # its scale is not Adam's
        create_optimizer("muon", model, **from_torch("muon", lr=0.02))
    optimizer = create_optimizer("muon", model, **options, companion_lr=1e-3)
    assert optimizer.param_groups[0]["extra_scale_factor"] == 0.2


@pytest.mark.parametrize(
    "ignored", [{"fused": True}, {"foreach": False, "amsgrad": False, "differentiable": False}], ids=str
)
def test_what_means_nothing_may_be_given_to_create_optimizer(ignored):
    def groups(given, model):
        optimizer = create_optimizer("muon", model, lr=2e-3, companion_options={"eps": 1e-6, **given}, **given)
        return [{key: x for key, x in group.items() if key != "params"} for group in optimizer.param_groups]

    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10))
    assert groups(ignored, model) == groups({}, model)
    alone = create_optimizer("lion", [nn.Parameter(torch.ones(3))], **ignored)
    assert not ignored.keys() & alone.param_groups[0].keys()


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("muon", {"ns_steps": 6}, TypeError, "ns_steps=6 of torch.optim is num_ns_steps=6 here"),
        ("muon", {"ns_coefficients": (1.0, 2.0, 3.0)}, TypeError, "custom_coefficient_sets=\\(\\(1.0, 2.0, 3.0\\),\\)"),
        ("muon", {"adjust_lr_fn": "original"}, TypeError, r"scale_mode='shape_scaling'.*from_torch\('muon', ...\)"),
        ("muon", {"adjust_lr_fn": "rms"}, ValueError, r"create_optimizer\('muon'\): adjust_lr_fn='rms' is not one of"),
        ("soap", {"decoupled_weight_decay": False}, TypeError, "weight_decay_method='l2' here"),
        ("adamw", {"amsgrad": True}, ValueError, "amsgrad=True is not possible"),
        ("rmsprop", {"momentum": 0.9}, ValueError, "no momentum"),
        ("muon", {"companion_options": {"amsgrad": True}}, ValueError, r"create_optimizer\('adamw'\): amsgrad=True"),
        ("soap", {"ns_steps": 5}, TypeError, "no argument 'ns_steps'"),
    ],
    ids=str,
)
def test_create_optimizer_says_what_an_argument_of_torch_is_called_here(name, arguments, error, message):
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10))
    with pytest.raises(error, match=message):
        create_optimizer(name, model, **arguments)


def test_a_class_of_ones_own_gets_what_it_takes():
    @register_optimizer("fused_lion")
    class FusedLion(Lion):
        def __init__(self, params, lr=1e-4, **anything):
            self.given = anything
            super().__init__(params, lr)

    try:
        assert create_optimizer("fused_lion", [nn.Parameter(torch.ones(3))], fused=True).given == {"fused": True}
    finally:
        del OPTIMIZERS["fused_lion"]


def test_another_optimizer_keeps_its_own_defaults():
    w = nn.Parameter(torch.ones(3))
    optimizer = Lion([w], **from_torch("lion", lr=1e-4, foreach=True, fused=None, maximize=True))
    assert optimizer.defaults == {**Lion([copy.deepcopy(w)]).defaults, "lr": 1e-4, "maximize": True}


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("adamw", {"amsgrad": True}, ValueError, "amsgrad=True is not possible"),
        ("adamw", {"differentiable": True}, ValueError, "differentiable=True is not possible"),
        ("adamw", {"fused": "yes"}, ValueError, "fused='yes'"),
        ("adamw", {"beta": (0.9, 0.99)}, TypeError, "no argument 'beta'; did you mean 'betas'"),
        ("adamw", {"ns_steps": 5}, TypeError, "no argument 'ns_steps'"),
        ("muon", {"ns_step": 5}, TypeError, "did you mean 'ns_steps'"),
        ("muon", {"adjust_lr_fn": "rms"}, ValueError, "adjust_lr_fn='rms' is not one of"),
        ("muon", {"ns_coefficients": (1.0, 2.0)}, ValueError, "not three numbers"),
        ("muon", {"eps": 1e-5}, ValueError, "eps=1e-05 is not possible"),
        ("rmsprop", {"momentum": 0.9}, ValueError, "no momentum"),
        ("rmsprop", {"centered": True}, ValueError, "centered=True"),
        ("mouon", {}, ValueError, "did you mean 'muon'"),
        ("muon", {"params": []}, TypeError, "no argument 'params'"),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_named(name, arguments, error, message):
    with pytest.raises(error, match=message):
        from_torch(name, **arguments)
