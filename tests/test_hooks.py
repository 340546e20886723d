"""Laws by which a weight moves, on any optimizer."""

import copy
import io
from typing import Any

import pytest
import torch

from emerging_optimizers import SOAP, AdamW, LaProp, Muon, MuonHyperball, Spel, create_optimizer
from emerging_optimizers.engine.hooks import (
    HyperballHook,
    KeepNorm,
    RadialBrakeHook,
    RelativeUpdateHook,
    RowUpdateFloorHook,
    SpectralClipHook,
    SpectralWeightDecayHook,
    UpdateFloorHook,
    WeightUpdateHook,
    make_hook,
)
from tests.reference.hooks import move

HOOKS = [
    ("hyperball", 2.0),
    ("hyperball",),
    ("relative_update",),
    ("radial_brake", 0.3, 0.6),
    ("update_floor", 0.8),
    ("update_floor", 1.2),
    ("row_update_floor", 1.0),
    ("spectral_clip", 0.5),
    ("spectral_weight_decay", 1.0, 0.4),
]


def stack(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("plain", HOOKS, ids=lambda hook: hook[0])
@pytest.mark.parametrize("keep", [1.0, 0.9])
def test_a_hook_is_the_law_of_its_docstring_for_every_matrix_of_a_stack(plain, keep):
    W, U, lr = stack(0, 3, 7, 5), stack(1, 3, 7, 5), 0.2
    hook = make_hook(plain)
    new = hook.move(W, U, keep, lr)
    expected = torch.stack([move(w, keep * w, u, lr, plain) for w, u in zip(W, U, strict=True)])
    torch.testing.assert_close(new, expected, rtol=0, atol=5e-3 if hook.matrices_only else 1e-12)


@pytest.mark.parametrize("plain", HOOKS, ids=lambda hook: hook[0])
def test_zero_weights_and_zero_updates_stay_finite(plain):
    zero, x = torch.zeros(2, 4, 3), stack(0, 2, 4, 3).float()
    for W, U in ((zero, zero), (zero, x), (x, zero)):
        assert make_hook(plain).move(W, U, 0.9, 0.1).isfinite().all()


@pytest.mark.usefixtures("without_code")
@pytest.mark.parametrize("optimizer", [AdamW, LaProp, Muon, SOAP])
@pytest.mark.parametrize("execution", ["stacked", "per_matrix", "compiled"])
def test_every_optimizer_follows_a_hook_in_every_execution(optimizer, execution):
    """On the hyperball each parameter, and each matrix of a batch for a matrix optimizer, keeps its norm."""
    ps = [torch.nn.Parameter(stack(i, *shape)) for i, shape in enumerate([(6, 4), (6, 4), (3, 4, 4)])]
    before = [p.detach().clone() for p in ps]
    o = optimizer(ps, lr=0.1, weight_update_hook="hyperball", execution=execution)
    for t in range(3):
        for i, p in enumerate(ps):
            p.grad = stack(10 * t + i, *p.shape)
        o.step()
    for p, b in zip(ps, before, strict=True):
        assert not torch.equal(p, b)
        dims = (-2, -1) if optimizer in (Muon, SOAP) else tuple(range(p.ndim))
        torch.testing.assert_close(
            torch.linalg.vector_norm(p.detach(), dim=dims), torch.linalg.vector_norm(b, dim=dims), rtol=1e-9, atol=0
        )


@pytest.mark.parametrize("name", ["soap", "kl", "rekls"])
@pytest.mark.parametrize("hook", ["hyperball", HyperballHook(radius=3.0)], ids=["own norm", "published class"])
def test_soap_on_the_hyperball_turns_by_the_learning_rate_and_resumes_there(name, hook):
    """Without weight decay; the update is a direction, so bf16 or a spike in its size changes no norm."""
    options = {
        "lr": 0.1,
        "weight_decay": 0.0,
        "weight_update_hook": hook,
        **({"use_kl_shampoo": True} if name == "kl" else {}),
    }
    p = torch.nn.Parameter(stack(0, 8, 6).float())
    radius = getattr(hook, "radius", p.detach().norm())
    o = create_optimizer("soap" if name == "kl" else name, [p], **options)
    for t in range(6):
        before = p.detach() / p.detach().norm()
        p.grad = stack(t + 1, 8, 6).float() * (1e4 if t == 3 else 1.0)
        o.step()
        torch.testing.assert_close(p.detach().norm(), torch.as_tensor(radius), rtol=1e-5, atol=0)
        # tan and sin of 0.1: an update along a tangent, and one with a part along the weight
        assert (p.detach() / p.detach().norm() - before).norm() <= 0.101
    q = torch.nn.Parameter(p.detach().clone())
    other = create_optimizer("soap" if name == "kl" else name, [q], **options)
    other.load_state_dict(o.state_dict())
    for x, optimizer in ((p, o), (q, other)):
        x.grad = stack(9, 8, 6).float()
        optimizer.step()
    assert torch.equal(p, q)


def test_relative_update_makes_the_learning_rate_the_relative_change():
    p = torch.nn.Parameter(stack(0, 300_000))
    before = p.detach().clone()
    o = AdamW([p], lr=0.03, weight_decay=0.0, weight_update_hook="relative_update")
    p.grad = stack(1, 300_000)  # more elements than one chunk of an element-wise rule
    o.step()
    assert ((p.detach() - before).norm() / before.norm()).item() == pytest.approx(0.03, rel=1e-9)


@pytest.mark.parametrize("name", ["update_floor", "row_update_floor"])
def test_a_floor_lengthens_what_is_short_beside_its_weight_and_nothing_else(name):
    """Rows whose weight is long, short and zero, and one whose gradient is zero."""
    W = torch.tensor([[30.0, 40.0], [0.3, 0.4], [0.0, 0.0], [3.0, 4.0]])
    p = torch.nn.Parameter(W.clone())
    o = LaProp([p], lr=0.1, weight_decay=0.0) if name == "update_floor" else Muon([p], lr=0.1, weight_decay=0.0)
    o.param_groups[0]["weight_update_hook"] = (name, 0.5)
    p.grad = torch.tensor([[1.0, -2.0], [-3.0, 1.0], [2.0, 2.0], [0.0, 0.0]])
    o.step()
    moved = (p.detach() - W).norm(dim=1) / 0.1
    if name == "update_floor":  # LaProp's first update has elements of 1
        assert (p.detach() - W).norm().item() == pytest.approx(0.1 * 0.5 * W.norm().item(), rel=1e-4)
        return
    assert moved[0].item() == pytest.approx(0.5 * 50.0, rel=1e-4)
    assert moved[3] == 0.0  # a row that has no direction
    assert moved[1:3].amax() < 3.0  # as long as Muon made them
    assert (moved[1:3] > 0.5 * 0.5).all()


def test_spectral_weight_decay_bounds_the_weight_and_spectral_clip_the_update():
    p = torch.nn.Parameter(3 * stack(0, 8, 6, dtype=torch.float32))
    hook = ("spectral_weight_decay", 1.0, 1.0)
    o = SOAP([p], lr=0.01, weight_decay=0.0, weight_update_hook=hook)
    for t in range(4):
        p.grad = stack(t, 8, 6, dtype=torch.float32)
        o.step()
    assert torch.linalg.svdvals(p.detach()).max() < 1.02
    before = p.detach().clone()
    o.param_groups[0]["weight_update_hook"] = ("spectral_clip", 0.5)
    o.step()
    assert torch.linalg.svdvals(p.detach() - before).max() < 0.01 * 0.51


def test_a_hook_is_plain_data_in_groups_and_checkpoints():
    p = torch.nn.Parameter(torch.ones(3, 2))
    o = Muon([{"params": [p], "weight_update_hook": HyperballHook(2.0)}], weight_update_hook=RadialBrakeHook())
    assert o.defaults["weight_update_hook"] == ("radial_brake", 0.5, 1.0, 1e-15)
    assert o.param_groups[0]["weight_update_hook"] == ("hyperball", 2.0, 1e-15)
    file = io.BytesIO()
    torch.save(o.state_dict(), file)
    file.seek(0)
    resumed = Muon([torch.nn.Parameter(torch.ones(3, 2))])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert make_hook(resumed.param_groups[0]["weight_update_hook"]) == HyperballHook(2.0)


def test_a_checkpoint_from_before_the_option_means_none():
    p = torch.nn.Parameter(torch.ones(3, 2))
    old = copy.deepcopy(Muon([p]).state_dict())
    del old["param_groups"][0]["weight_update_hook"]
    o = Muon([p])
    o.load_state_dict(old)
    assert o.param_groups[0]["weight_update_hook"] is None


def test_a_hook_of_ones_own():
    class Frozen(WeightUpdateHook):
        def move(self, weight: torch.Tensor, update: torch.Tensor, keep: Any, lr: Any) -> torch.Tensor:
            return weight

    p = torch.nn.Parameter(torch.ones(3, 2))
    o = Muon([p], weight_update_hook=Frozen())
    p.grad = torch.randn(3, 2)
    o.step()
    assert torch.equal(p, torch.ones(3, 2))


def test_a_skipped_gradient_leaves_the_weight_where_it_is():
    ps = [torch.nn.Parameter(stack(i, 4, 3)) for i in range(2)]
    before = [p.detach().clone() for p in ps]
    o = Muon(ps, lr=0.1, weight_update_hook=("hyperball", 9.0))
    ps[0].grad, ps[1].grad = torch.full((4, 3), float("nan"), dtype=torch.float64), stack(5, 4, 3)
    o.step()
    assert torch.equal(ps[0], before[0])
    assert ps[1].norm().item() == pytest.approx(9.0)


def test_a_model_gets_the_hook_for_its_matrices_only():
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 9))
    o = create_optimizer("muon", model, weight_update_hook="spectral_clip")
    assert {g["algorithm"]: g["weight_update_hook"] for g in o.param_groups} == {
        "adamw": None,
        "muon": "spectral_clip",
    }


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: Muon(p, weight_update_hook="hypersphere"), r"weight_update_hook='hypersphere' .*hyperball"),
        (lambda p: Muon(p, weight_update_hook=("update_flor", 1.0)), "allowed: 'update_flor' .*mean 'update_floor'"),
        (lambda p: Muon(p, weight_update_hook=("hyperball", -1.0)), r"allowed: radius=-1\.0 .* >= eps=1e-15"),
        (lambda p: Muon(p, weight_update_hook=("relative_update", 1, 2)), r"give \('relative_update', eps=1e-15\)"),
        (lambda p: Muon(p, weight_update_hook="update_floor"), r"hook='update_floor' .*give \('update_floor', ratio\)"),
        (
            lambda p: Muon(p, weight_update_hook=("update_floor", -1)),
            "ratio=-1 is not allowed; give a finite number > 0",
        ),
        (lambda p: Muon(p, weight_update_hook=5), "hook=5 .*give None, a hook, its name .* or .name, its arguments"),
        (lambda p: Muon(p, weight_update_hook=()), "hook=.. .*give None, a hook, its name .* or .name, its arguments"),
        (lambda p: AdamW(p, weight_update_hook="spectral_clip"), "AdamW: .*element-wise; leave it None"),
        (lambda p: AdamW(p, weight_update_hook=("row_update_floor", 0.4)), "AdamW: .*rows.*element-wise; leave it"),
        (lambda p: MuonHyperball(p, weight_update_hook="radial_brake"), "law of its own"),
        (lambda p: Spel(p, weight_update_hook="radial_brake"), "law of its own"),
        (lambda p: LaProp(p, frob_normalize=True, weight_update_hook="radial_brake"), "law of its own"),
    ],
)
def test_what_is_not_possible_raises_at_construction(make, match):
    with pytest.raises(ValueError, match=match):
        make([torch.nn.Parameter(torch.ones(3, 2))])


@pytest.mark.parametrize(
    "make",
    [
        lambda: HyperballHook(0.0),
        lambda: HyperballHook(1.0, eps=0.0),
        lambda: RadialBrakeHook(outward_scale=1.5),
        lambda: RadialBrakeHook(inward_scale=-0.1),
        lambda: RelativeUpdateHook(eps=-1.0),
        lambda: UpdateFloorHook(0.0),
        lambda: RowUpdateFloorHook(float("inf")),
        lambda: UpdateFloorHook(True),
        lambda: UpdateFloorHook("1"),
        lambda: UpdateFloorHook(10**400),
        lambda: SpectralClipHook(0.0),
        lambda: SpectralWeightDecayHook(1.0, 2.0),
        lambda: make_hook("keep_norm"),
    ],
)
def test_arguments_out_of_range_raise(make):
    with pytest.raises(ValueError, match=r"is not allowed; give|is not one of"):
        make()


def test_keep_norm_undoes_weight_decay():
    W, U = stack(0, 2, 4, 3), stack(1, 2, 4, 3)
    new = KeepNorm().move(W, U, 0.5, 0.1)
    torch.testing.assert_close(new.norm(dim=(1, 2)), W.norm(dim=(1, 2)))
