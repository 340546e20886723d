"""Methods of the published library that a subclass overrides are called, or refused; so is what they return.

`orthogonalize` has `test_orthogonalize_override`.
"""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emerging_optimizers import create_optimizer, registry
from emerging_optimizers.engine.hooks import HyperballHook, WeightUpdateHook
from emerging_optimizers.orthogonalized_optimizers import AdaptiveMuon, Muon
from emerging_optimizers.riemannian_optimizers import Iso
from emerging_optimizers.scalar_optimizers import LaProp, Signum, SingleMomentumOptimizer
from emerging_optimizers.shampoo import KlShampoo, Shampoo
from emerging_optimizers.shampoo.soap_v3 import KlSoapV3
from tests.compat.test_release_050 import gradient, stepped

# ---- what is not called ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "method"),
    [
        *((registry.entry(name).load(), "_apply_weight_decay_inplace") for name in ("muon", "soap", "lion", "adamw")),
        (AdaptiveMuon, "_apply_moment2_normalization"),
        (Iso, "_init_state"),
    ],
)
def test_a_method_that_no_step_calls_is_refused(base, method):
    cls = type("Mine", (base,), {method: lambda self, *args: None})
    with pytest.raises(ValueError, match=rf"Mine\.{method} would never be called.*write a Rule, or a whole `step`"):
        cls([nn.Parameter(torch.eye(3))], lr=0.1)


def test_a_step_of_ones_own_may_call_it_and_the_library_s_step_still_refuses():
    class Decaying(Muon):
        def _apply_weight_decay_inplace(self, p, grad, lr, weight_decay):
            p.mul_(0.5)

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    self._apply_weight_decay_inplace(p, p.grad, group["lr"], group["weight_decay"])

    class Announcing(Decaying):
        def step(self, closure=None):
            return Muon.step(self, closure)

    p, q = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    assert torch.equal(stepped(Decaying([p], lr=0.1), p, 1), torch.full((2, 2), 0.5))
    optimizer = Announcing([q], lr=0.1)
    with pytest.raises(ValueError, match=r"Announcing._apply_weight_decay_inplace would never be called"):
        stepped(optimizer, q, 1)
    assert torch.equal(q, torch.ones(2, 2))


@pytest.mark.parametrize("method", ["step", "zero_grad", "_init_group", "_make_rule", "_apply_weight_decay_inplace"])
def test_an_optimizer_for_a_model_refuses_a_class_with_a_method_of_a_whole_optimizer(method, monkeypatch):
    monkeypatch.setattr(registry, "OPTIMIZERS", dict(registry.OPTIMIZERS))

    def mine(self, *args, **kwargs):
        return getattr(Muon, method)(self, *args, **kwargs)

    registry.register_optimizer("mine", start=0.1)(type("Mine", (Muon,), {method: mine, "__doc__": "Mine."}))
    with pytest.raises(ValueError, match=rf"Mine\.{method} "):
        create_optimizer("mine", nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)))


# ---- what is called -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
def test_init_group_is_called_before_each_step_and_may_add_to_the_state(whole):
    """Published subclasses make all of a parameter's state there, or add to what their base makes."""

    class Counting(Muon):
        def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = True) -> None:
            if not whole:
                super()._init_group(group, skip_non_grad_params)
            for p in group["params"]:
                if p.grad is None and skip_non_grad_params:
                    continue
                if whole:
                    self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                self.state[p].setdefault("seen", torch.zeros(()))

        def orthogonalize(self, p: Tensor, grad: Tensor, **kwargs: Any) -> Tensor:
            self.state[p]["seen"] += 1
            return super().orthogonalize(p, grad, **kwargs)

    p, q = nn.Parameter(gradient(9)), nn.Parameter(gradient(9))
    optimizer = Counting([p, nn.Parameter(torch.eye(2))], lr=0.1)
    assert torch.equal(stepped(optimizer, p, 3), stepped(Muon([q], lr=0.1, execution="per_matrix"), q, 3))
    assert optimizer.state[p]["seen"] == 3
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    r = nn.Parameter(p.detach().clone())
    resumed = Counting([r, nn.Parameter(torch.eye(2))], lr=0.1)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    twin = copy.deepcopy(optimizer)
    twin_p = twin.param_groups[0]["params"][0]
    ends = [stepped(o, x, 2) for o, x in ((optimizer, p), (resumed, r), (twin, twin_p))]
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])
    assert [o.state[x]["seen"] for o, x in ((resumed, r), (twin, twin_p))] == [5, 5]


class Passing(Muon):
    def post_weight_update_fn_inplace(self, p):
        pass


class PassingSignum(Signum):
    def pre_step_inplace(self, p, group):
        pass


@pytest.mark.parametrize("shape", [(6, 4), (3, 6, 4), (4, 3, 2, 2)])
@pytest.mark.parametrize(
    "hook",
    [
        None,
        ("hyperball",),
        ("hyperball", 3.0),
        ("radial_brake", 0.3, 0.6),
        ("relative_update",),
        ("update_floor", 10.0),
        ("row_update_floor", 10.0),
        ("spectral_clip", 0.5),
        ("spectral_weight_decay", 0.5, 0.5),
    ],
    ids=lambda hook: hook and hook[0],
)
def test_a_law_is_the_same_around_an_override_that_does_nothing(hook, shape):
    """With decay, of each matrix of a batch, and of a convolution as (out, rest)."""
    pairs = [(Muon, Passing)]
    if hook is None or hook[0] not in ("row_update_floor", "spectral_clip", "spectral_weight_decay"):
        pairs.append((Signum, PassingSignum))
    for pair in pairs:
        ps = [nn.Parameter(gradient(9, shape)) for _ in pair]
        ends = [
            stepped(cls([p], lr=0.05, weight_decay=0.5, weight_update_hook=hook), p)
            for cls, p in zip(pair, ps, strict=True)
        ]
        torch.testing.assert_close(*ends, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
@pytest.mark.parametrize("cls", [Passing, PassingSignum])
def test_a_rate_of_zero_moves_nothing_around_an_override(cls, lr):
    p = nn.Parameter(gradient(9))
    assert torch.equal(
        stepped(cls([p], lr=lr, weight_decay=0.5, weight_update_hook=("hyperball", 3.0)), p), gradient(9)
    )


def test_laprop_keeps_a_norm_around_a_hook_of_a_subclass():
    class Mine(LaProp):
        def post_step_inplace(self, p, group, ctx):
            pass

    p = nn.Parameter(gradient(9))
    with pytest.warns(UserWarning, match="frob_normalize"):
        optimizer = Mine([p], lr=0.1, weight_decay=0.5, frob_normalize=True)
    torch.testing.assert_close(stepped(optimizer, p).norm(), gradient(9).norm())


def test_a_law_in_one_function_leaves_no_place_for_two():
    class Frozen(WeightUpdateHook):
        def move(self, weight: Tensor, update: Tensor, keep: Any, lr: Any) -> Tensor:
            return weight

    with pytest.raises(ValueError, match=r"Passing: weight_update_hook=.*Frozen.*give it `direct` and `retract`"):
        Passing([nn.Parameter(torch.eye(2))], lr=0.1, weight_update_hook=Frozen())
    p = nn.Parameter(gradient(9))
    optimizer = PassingSignum([p], lr=0.1, weight_update_hook=Frozen())
    assert torch.equal(stepped(optimizer, p), gradient(9))
    with pytest.raises(ValueError, match=r"weight_update_hook=.*HyperballHook.*give None, a hook"):
        Muon([p], lr=0.1, weight_update_hook=HyperballHook)


# ---- what they return -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("returned", [None, torch.zeros(2, 4)])
@pytest.mark.parametrize(
    ("base", "method"), [(Muon, "orthogonalize"), (Shampoo, "_scalar_update"), (KlSoapV3, "_scalar_update")]
)
def test_what_a_method_has_returned_in_place_of_an_update_is_named(base, method, returned):
    p = nn.Parameter(gradient(9))
    optimizer = type("Mine", (base,), {method: lambda *args, **kwargs: returned})([p], lr=0.1)
    found = "NoneType" if returned is None else r"a tensor of shape \(2, 4\)"
    with pytest.raises(TypeError, match=rf"has returned {found}; .* the update, a tensor of shape \(6, 4\)"):
        stepped(optimizer, p)
    assert torch.equal(p, gradient(9))


@pytest.mark.parametrize(
    ("base", "method"), [(Muon, "orthogonalize"), (Shampoo, "_scalar_update"), (KlSoapV3, "_scalar_update")]
)
def test_an_update_in_another_dtype_is_taken(base, method):
    def rounded(self, *args, **kwargs):
        return getattr(base, method)(self, *args, **kwargs).bfloat16()

    p, q = nn.Parameter(gradient(9)), nn.Parameter(gradient(9))
    ends = stepped(type("Mine", (base,), {method: rounded})([p], lr=0.1), p, 1), stepped(base([q], lr=0.1), q, 1)
    torch.testing.assert_close(*ends, rtol=0, atol=0.1 * 2**-7)


def test_an_update_fn_is_held_to_the_same():
    p = nn.Parameter(gradient(9))
    optimizer = SingleMomentumOptimizer([p], {"lr": 0.1}, update_fn=lambda grad, exp_avg, *, step: None)
    with pytest.raises(TypeError, match=r"update_fn has returned NoneType"):
        stepped(optimizer, p)
    with pytest.raises(TypeError, match=r"has no default learning rate; give 'lr' in defaults"):
        SingleMomentumOptimizer([p], {}, update_fn=lambda grad, exp_avg, *, step: grad)


@pytest.mark.parametrize("base", [Shampoo, KlSoapV3])
@pytest.mark.parametrize("preconditioner", [None, dict])
def test_a_preconditioner_without_its_methods_is_refused(base, preconditioner):
    cls = type("Mine", (base,), {"PreconditionerCls": preconditioner})
    with pytest.raises(TypeError, match=r"PreconditionerCls is .*has no init_state, init_step, step, rebind_state, p"):
        cls([nn.Parameter(torch.eye(2))], lr=0.1)


# ---- remedies that can be followed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["oblique_sgd", "oblique_steepest_adam", "kl_shampoo", "soap", "muon_hyperball"])
def test_a_vector_is_sent_to_an_optimizer_that_there_is(name):
    with pytest.raises(ValueError, match=rf"or call create_optimizer\('{name}', model\)"):
        registry.entry(name).load()([nn.Parameter(torch.zeros(3))], lr=0.1)


def test_a_rate_is_named_for_a_class_with_the_options_that_it_was_measured_with():
    with pytest.raises(TypeError, match=r"Shampoo has no default learning rate; give lr, 0.1 to start with"):
        Shampoo([nn.Parameter(torch.eye(2))])
    with pytest.raises(TypeError, match=r"KlShampoo has no default learning rate; give lr$"):
        KlShampoo([nn.Parameter(torch.eye(2))])
