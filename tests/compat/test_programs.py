"""Whole programs as users of the published library write them: its import paths, its calls, and nothing of ours.

The first three run unchanged against the published library of August 2026 as well, whose registry knows a class once
its module was imported.
"""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# ---- a transformer block: fused attention split by a subclass, everything else by other optimizers ------------------


def train_a_block() -> tuple[list[float], torch.optim.Optimizer, nn.Parameter]:
    """Per-head Muon by overriding `orthogonalize`; a weight update hook; element-wise optimizers for the rest."""
    from emerging_optimizers.orthogonalized_optimizers.muon import Muon
    from emerging_optimizers.scalar_optimizers import LaProp
    from emerging_optimizers.weight_update_hooks import RelativeUpdateHook

    heads, width, length = 4, 16, 12

    class HeadwiseMuon(Muon):
        """Query, key and value are told apart, and of each the heads."""

        def orthogonalize(self, p: Tensor, grad: Tensor, **group: Any) -> Tensor:
            parts = getattr(p, "fused_parts", 1) * (group["num_heads"] if getattr(p, "by_head", False) else 1)
            if parts == 1:
                return super().orthogonalize(p, grad, **group)
            stacked = grad.view(parts, -1, grad.size(1))
            return self.scaled_orthogonalize_fn(stacked).view_as(grad)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, width)
            self.norm = nn.LayerNorm(width)
            self.qkv = nn.Linear(width, 3 * width, bias=False)
            self.out = nn.Linear(width, width, bias=False)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            self.head = nn.Linear(width, 11)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            q, k, v = (
                part.view(*tokens.shape, heads, -1).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1)
            )
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).flatten(2))
            return self.head(x + self.mlp(x))

    torch.manual_seed(0)
    model = Block()
    model.qkv.weight.fused_parts = 3
    model.qkv.weight.by_head = True
    matrices = [
        p for name, p in model.named_parameters() if p.ndim == 2 and "embedding" not in name and "head" not in name
    ]
    others = [p for p in model.parameters() if not any(p is q for q in matrices)]
    muon = HeadwiseMuon(
        [{"params": matrices, "num_heads": heads}],
        lr=0.02,
        momentum=0.9,
        weight_decay=0.0,
        fp32_matmul_prec="highest",
        weight_update_hook=RelativeUpdateHook(),
    )
    scalar = LaProp(others, lr=1e-2, betas=(0.9, 0.99))
    assert (muon.num_ns_steps, muon.coefficient_type, muon.nesterov) == (5, "quintic", False)

    tokens = torch.randint(11, (8, length + 1))
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        for optimizer in (muon, scalar):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses, muon, model.qkv.weight


def test_a_block_with_per_head_muon_learns():
    losses, muon, qkv = train_a_block()
    assert losses[-1] < 0.5 * losses[0]
    assert muon.state[qkv]["momentum_buffer"].shape == qkv.shape


# ---- a layer of experts in one parameter ----------------------------------------------------------------------------


def train_experts() -> tuple[list[float], torch.optim.Optimizer, nn.Parameter]:
    """Expert weights (E, out, in) under StackedSoap, the router under Signum, everything in bfloat16."""
    from emerging_optimizers.legacy_soap.stacked_soap import StackedSoap
    from emerging_optimizers.scalar_optimizers import Signum

    torch.manual_seed(0)
    experts, inputs, outputs = 4, 12, 20
    weight = nn.Parameter(0.1 * torch.randn(experts, outputs, inputs, dtype=torch.bfloat16))
    router = nn.Parameter(torch.zeros(experts, inputs, dtype=torch.bfloat16))
    stacked = StackedSoap([weight], lr=3e-2, weight_decay=0.0)
    signum = Signum([router], lr=1e-3)
    x = torch.randn(64, inputs, dtype=torch.bfloat16)
    target = torch.einsum("bi,oi->bo", x.float(), 0.3 * torch.randn(outputs, inputs))
    losses = []
    for _ in range(80):
        gate = torch.softmax(x @ router.T, dim=-1)
        y = torch.einsum("be,eoi,bi->bo", gate, weight, x)
        loss = (y.float() - target).square().mean()
        for optimizer in (stacked, signum):
            optimizer.zero_grad()
        loss.backward()
        stacked.step()
        signum.step()
        losses.append(loss.item())
    return losses, stacked, weight


def test_stacked_experts_learn_and_share_their_factors():
    losses, stacked, weight = train_experts()
    assert losses[-1] < 0.5 * losses[0]
    state = stacked.state[weight]
    assert {key: tuple(state[key].shape) for key in ("exp_avg", "L", "R")} == {
        "exp_avg": (20, 48),
        "L": (20, 20),
        "R": (48, 48),
    }


# ---- a configuration file: names, keyword arguments, a scheduler, and a run that is interrupted ---------------------


def run_from_a_configuration(names: list[tuple[str, dict[str, Any]]], steps: int, stop_at: int | None) -> list[Tensor]:
    """One optimizer a layer, from the registry; saved, thrown away and resumed at `stop_at`."""
    from emerging_optimizers.registry import get_configured_optimizer_cls, get_optimizer_cls, validate_optimizer_args

    def make(model: nn.Sequential) -> list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]:
        pairs = []
        for layer, (name, options) in zip(model, names, strict=True):
            validate_optimizer_args(get_optimizer_cls(name), options)
            optimizer = get_configured_optimizer_cls(name, **options)(
                [{"params": [layer.weight], "wd_mult": 1.0}, {"params": [layer.weight_2], "lr": 3e-3}]
            )
            pairs.append((optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)))
        return pairs

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(0.3 * torch.randn(8, 8))
            self.weight_2 = nn.Parameter(0.3 * torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(x @ self.weight.T) @ self.weight_2.T

    torch.manual_seed(0)
    model = nn.Sequential(*(Pair() for _ in names))
    data = torch.randn(steps, 16, 8)
    pairs = make(model)
    for step in range(steps):
        if step == stop_at:
            file = io.BytesIO()
            torch.save([model.state_dict(), *((o.state_dict(), s.state_dict()) for o, s in pairs)], file)
            file.seek(0)
            weights, *saved = torch.load(file, weights_only=True)
            model = copy.deepcopy(model)
            model.load_state_dict(weights)
            pairs = make(model)
            for (optimizer, scheduler), (state, schedule) in zip(pairs, saved, strict=True):
                optimizer.load_state_dict(state)
                scheduler.load_state_dict(schedule)
        (model(data[step]) - data[step].roll(1, dims=-1)).square().mean().backward()
        for optimizer, scheduler in pairs:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
    return [p.detach() for p in model.parameters()]


CONFIGURATION: list[tuple[str, dict[str, Any]]] = [
    ("soap", {"lr": 1e-2, "betas": (0.9, 0.95), "shampoo_beta": 0.9, "use_kl_shampoo": True}),
    ("rekls", {"lr": 1e-2, "weight_decay": 0.0}),
    ("kl_soap", {"lr": 1e-2}),
    ("moso", {"lr": 1e-2}),
    ("muon", {"lr": 1e-2, "scale_mode": "shape_scaling", "extra_scale_factor": 0.2}),
    ("psgd_pro", {"lr": 1e-2}),
    ("signum", {"lr": 1e-3}),
    ("lion", {"lr": 1e-3}),
    ("laprop", {"lr": 1e-3}),
    ("sim_ademamix", {"lr": 1e-3}),
]


def test_a_configured_run_that_is_interrupted_ends_where_it_would_have():
    from emerging_optimizers.legacy_soap import REKLS, SOAP
    from emerging_optimizers.registry import get_optimizer_cls

    assert (get_optimizer_cls("soap"), get_optimizer_cls("rekls")) == (SOAP, REKLS)
    whole = run_from_a_configuration(CONFIGURATION, steps=6, stop_at=None)
    resumed = run_from_a_configuration(CONFIGURATION, steps=6, stop_at=3)
    assert all(map(torch.equal, whole, resumed))


# ---- laws of the weight, in the two ways in which the published library has them ------------------------------------


class Ceiling:
    """A hook that is no subclass of anything: rows are not to grow beyond a norm; it counts what it cut."""

    def __init__(self, limit: float) -> None:
        self.limit, self.cut = limit, 0

    def pre_weight_update_inplace(self, p: Tensor, update: Tensor) -> Tensor:
        update.mul_(2.0)
        return p.norm(dim=1)

    def post_weight_update_inplace(self, p: Tensor, pre_update_state: Tensor) -> None:
        norms = p.norm(dim=1)
        assert pre_update_state.shape == norms.shape
        self.cut += int((norms > self.limit).sum())
        p.mul_((self.limit / norms).clamp(max=1).unsqueeze(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hook_of_two_functions_sees_the_parameter_itself(dtype):
    from emerging_optimizers.orthogonalized_optimizers.muon import Muon

    p, frozen = nn.Parameter(torch.ones(4, 3, dtype=dtype)), nn.Parameter(torch.ones(4, 3, dtype=dtype))
    hook = Ceiling(1.8)
    optimizer = Muon([p, frozen], lr=0.1, weight_decay=0.5, weight_update_hook=hook)
    p.grad, frozen.grad = -torch.eye(4, 3, dtype=dtype), torch.full((4, 3), float("nan"), dtype=dtype)
    plain = Muon([q := nn.Parameter(torch.ones(4, 3, dtype=dtype))], lr=0.1, weight_decay=0.5)
    q.grad = p.grad.clone()
    optimizer.step()
    plain.step()
    free = 0.95 + 2 * (q.detach().float() - 0.95)
    expected = free * (1.8 / free.norm(dim=1)).clamp(max=1).unsqueeze(1)
    torch.testing.assert_close(p.detach().float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)
    assert hook.cut == int((free.norm(dim=1) > 1.8).sum()) > 0
    assert torch.equal(frozen, torch.ones_like(frozen))  # its gradient was not finite

    saved = optimizer.state_dict()  # code is not data
    assert "weight_update_hook" not in saved["param_groups"][0]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["weight_update_hook"] is hook


def test_a_subclass_may_act_before_and_after_the_weight_moves():
    from emerging_optimizers.orthogonalized_optimizers.orthogonalized_optimizer import OrthogonalizedOptimizer

    calls: list[str] = []

    class Sphere(OrthogonalizedOptimizer):
        def pre_weight_update_fn_inplace(self, p: Tensor, update: Tensor) -> None:
            calls.append("before")
            p.radius = p.norm().item()
            update.mul_(p.radius / update.norm())

        def post_weight_update_fn_inplace(self, p: Tensor) -> None:
            calls.append("after")
            p.mul_(p.radius / p.norm())

    class Logging:
        def pre_weight_update_inplace(self, p: Tensor, update: Tensor) -> None:
            calls.append("hook before")

        def post_weight_update_inplace(self, p: Tensor, pre_update_state: None) -> None:
            calls.append("hook after")

    p = nn.Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    radius = p.detach().norm()
    optimizer = Sphere(
        [p], 0.1, 0.9, 0.0, nesterov=False, weight_decay_method="decoupled", fp32_matmul_prec="highest",
        scaled_orthogonalize_fn=torch.sign, weight_update_hook=Logging(),
    )  # fmt: skip
    p.grad = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    momentum = 0.1 * p.grad
    optimizer.step()
    assert calls == ["before", "hook before", "after", "hook after"]
    torch.testing.assert_close(p.detach().norm(), radius)
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], momentum)  # not what the function made of it


def test_functions_of_a_parameter_cannot_be_compiled_and_laws_do_not_stand_on_one_another():
    from emerging_optimizers.orthogonalized_optimizers import Muon, Spel

    class Both(Spel):
        def post_weight_update_fn_inplace(self, p: Tensor) -> None:
            pass

    p = nn.Parameter(torch.ones(3, 2))
    with pytest.raises(ValueError, match="use execution='stacked' or 'per_matrix'"):
        Muon([p], weight_update_hook=Ceiling(1.0), execution="compiled")
    with pytest.raises(ValueError, match="a law of its own"):
        Both([p])


@pytest.mark.parametrize(
    "make",
    [lambda h: h.HyperballHook(2.0), lambda h: h.RadialBrakeHook(0.3, 0.6), lambda h: h.RelativeUpdateHook()],
    ids=["hyperball", "radial brake", "relative"],
)
@pytest.mark.parametrize("shape", [(7,), (4, 3), (2, 3, 4)])
def test_a_published_hook_may_be_called_in_a_loop_of_ones_own(make, shape):
    from emerging_optimizers import weight_update_hooks

    hook = make(weight_update_hooks)
    g = torch.Generator().manual_seed(0)
    W, U = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    p, update = W.clone(), U.clone()
    state = hook.pre_weight_update_inplace(p, update)
    assert torch.equal(p, W)
    p.add_(update, alpha=-0.1)
    hook.post_weight_update_inplace(p, state)
    torch.testing.assert_close(p, hook.move(W[None], U[None], 1.0, 0.1)[0])


def test_a_no_op_hook_is_none_and_anything_may_derive_from_the_published_protocol():
    from emerging_optimizers.orthogonalized_optimizers import Muon
    from emerging_optimizers.weight_update_hooks import NoOpWeightUpdateHook, WeightUpdateHook

    class Halving(WeightUpdateHook[None]):
        def pre_weight_update_inplace(self, p: Tensor, update: Tensor) -> None:
            update.mul_(0.5)

    assert Muon([nn.Parameter(torch.ones(2, 2))], weight_update_hook=NoOpWeightUpdateHook()).weight_update_hook is None
    p, q = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(3, 2))
    for x, options in ((p, {"weight_update_hook": Halving()}), (q, {})):
        x.grad = torch.eye(3, 2)
        Muon([x], lr=0.1, **options).step()
    torch.testing.assert_close(p, 0.5 * q)


# ---- an element-wise optimizer out of a function --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_of_ones_own_out_of_an_update_function_is_the_optimizer_of_that_name(dtype):
    from emerging_optimizers.scalar_optimizers import Signum, SingleMomentumOptimizer, update_functions

    class ShapedSignum(SingleMomentumOptimizer):
        def __init__(self, params: Any, lr: float = 1e-2, momentum: float = 0.9, weight_decay: float = 0.1) -> None:
            super().__init__(
                params,
                defaults={
                    "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "correct_bias": True,
                    "nesterov": True, "use_shape_scaling": True,
                },
                update_fn=update_functions.calculate_signum_update,
                update_kwarg_names=("momentum", "correct_bias", "nesterov", "use_shape_scaling"),
                weight_decay_method="independent",
            )  # fmt: skip

    g = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (6, 5), (2, 7)]
    ps = [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]
    qs = [nn.Parameter(p.detach().clone()) for p in ps]
    ours = ShapedSignum([{"params": ps[:2]}, {"params": ps[2:], "momentum": 0.5}])
    theirs = Signum(
        [{"params": qs[:2]}, {"params": qs[2:], "momentum": 0.5}], lr=1e-2, weight_decay=0.1, nesterov=True,
        use_shape_scaling=True, weight_decay_method="independent",
    )  # fmt: skip
    for step in range(5):
        if step == 3:  # saved and resumed
            state = copy.deepcopy(ours.state_dict())
            ours = ShapedSignum([{"params": ps[:2]}, {"params": ps[2:]}])
            ours.load_state_dict(state)
        for p, q in zip(ps, qs, strict=True):
            p.grad = torch.randn(p.shape, generator=g).to(dtype)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q)
        assert ours.state[p].keys() == {"step", "exp_avg"}
        assert ours.state[p]["step"] == 5


def test_its_functions_before_and_after_a_step_see_the_parameter_and_its_group():
    from emerging_optimizers.scalar_optimizers import TwoMomentsOptimizer, calculate_adam_update

    class NormKeeper(TwoMomentsOptimizer):
        def pre_step_inplace(self, p: Tensor, group: dict) -> Tensor:
            assert any(p is q for q in group["params"])
            return p.norm()

        def post_step_inplace(self, p: Tensor, group: dict, ctx: Tensor) -> None:
            p.mul_(ctx / p.norm())

    p = nn.Parameter(torch.randn(300_000, generator=torch.Generator().manual_seed(0)))
    before = p.detach().clone()
    options = {
        "lr": 0.1,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "weight_decay": 0.5,
        "correct_bias": True,
        "nesterov": False,
    }
    names = ("betas", "eps", "correct_bias", "nesterov")
    optimizer = NormKeeper([p], options, update_fn=calculate_adam_update, update_kwarg_names=names)
    p.grad = torch.ones_like(p)
    optimizer.step()
    free = before * 0.95 - 0.1
    torch.testing.assert_close(p.detach(), free * before.norm() / free.norm(), rtol=1e-4, atol=1e-5)

    with pytest.raises(ValueError, match="update_kwarg_names has 'bets', which defaults has not; it has 'lr'"):
        NormKeeper([p], options, update_fn=calculate_adam_update, update_kwarg_names=("bets",))


# ---- an inner step of one's own in SOAP's eigenbasis ----------------------------------------------------------------


def test_a_scalar_update_of_ones_own_runs_in_the_eigenbasis():
    """Handing on to the class's own is the class itself; anything else is what it says."""
    from emerging_optimizers.shampoo.soap_v3 import KlMSoap, KlSoapV3, ReklsV3, SoapBase

    steps: list[int] = []

    class Passing:
        def _scalar_update(self, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, **options: Any) -> Tensor:
            steps.append(options["step"])
            return super()._scalar_update(grad, exp_avg, exp_avg_sq, **options)

    for cls in (KlSoapV3, ReklsV3, KlMSoap):
        steps.clear()
        p, q = (nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0))) for _ in range(2))
        ours, theirs = type("Mine", (Passing, cls), {})([p], lr=0.1), cls([q], lr=0.1)
        for step in range(4):
            for x, optimizer in ((p, ours), (q, theirs)):
                x.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
                optimizer.step()
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        assert steps == [1, 2, 3, 4]
        theirs.load_state_dict(ours.state_dict())
    with pytest.raises(NotImplementedError, match="SoapBase has no _scalar_update; override it"):
        SoapBase([nn.Parameter(torch.ones(2, 2))], lr=0.1)


def test_a_preconditioner_of_ones_own_keeps_its_own_state():
    """Derived and unchanged it is what KlSoapV3 and ReklsV3 do for stacks."""
    from emerging_optimizers.shampoo.shampoo_base import TensorPair
    from emerging_optimizers.shampoo.soap_v3 import (
        KlSoapPreconditioner,
        KlSoapV3,
        ReklsPreconditioner,
        ReklsV3,
    )

    for base, cls in ((KlSoapPreconditioner, KlSoapV3), (ReklsPreconditioner, ReklsV3)):
        mine = type("Mine", (cls,), {"PreconditionerCls": type("Own", (base,), {})})
        p, q = (nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0))) for _ in range(2))
        ours, theirs = mine([p], lr=0.1), cls([q], lr=0.1)
        for step in range(5):
            for x, optimizer in ((p, ours), (q, theirs)):
                x.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
                optimizer.step()
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
        assert ours.state[p].keys() == {"step", *base.init_state((6, 4), torch.device("cpu"))}

    class Diagonal:
        """Nothing is rotated; the rows have a running mean of their squares."""

        def __init__(self, state: dict[str, Tensor], eps: float) -> None:
            self.rows, self.exp_avg, self.exp_avg_sq, self.eps = state["rows"], state["m"], state["v"], eps

        @staticmethod
        def init_state(shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
            return {"rows": torch.zeros(shape[0], device=device), "m": torch.zeros(shape), "v": torch.zeros(shape)}

        def init_step(self, grad: Tensor, shampoo_beta: float) -> None:
            assert shampoo_beta == 0
            self.step(grad, shampoo_beta)

        def step(self, grad: Tensor, shampoo_beta: float) -> None:
            self.rows.lerp_(grad.square().mean(dim=1), 1 - shampoo_beta)

        def rebind_state(self, state: dict[str, Tensor]) -> None:
            state.update(rows=self.rows, m=self.exp_avg, v=self.exp_avg_sq)

        def project_in(self, x: Tensor) -> Tensor:
            return x / (self.rows.sqrt() + self.eps).unsqueeze(1)

        def project_out(self, x: Tensor) -> Tensor:
            return 2 * x

    class DiagonalSoap(KlSoapV3):
        PreconditionerCls = Diagonal

    p = nn.Parameter(torch.zeros(2, 3, 4))  # a batch of two
    optimizer = DiagonalSoap([p], lr=0.1)
    p.grad = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    torch.testing.assert_close(p.detach(), -0.2 * p.grad.sign())
    torch.testing.assert_close(optimizer.state[p]["rows"], p.grad.square().mean(dim=2))
    resumed = DiagonalSoap([nn.Parameter(p.detach().clone())], lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    L, R = TensorPair(torch.ones(1), torch.zeros(2))
    assert (len(L), len(R)) == (1, 2)
    state = KlSoapPreconditioner.init_state((2, 3), torch.device("cpu"))
    one = KlSoapPreconditioner(state, 1e-8)
    del state["exp_avg"]
    with pytest.raises(KeyError, match="the state has no exp_avg"):
        one.rebind_state(state)


# ---- options as attributes ------------------------------------------------------------------------------------------


def test_an_option_is_an_attribute_that_holds_for_every_group():
    from emerging_optimizers.orthogonalized_optimizers.muon import Muon

    groups = [
        {"params": [nn.Parameter(torch.ones(2, 2))]},
        {"params": [nn.Parameter(torch.ones(2, 2))], "nesterov": True},
    ]
    optimizer = Muon(groups)
    assert optimizer.nesterov is False
    optimizer.nesterov = True
    assert [group["nesterov"] for group in optimizer.param_groups] == [True, True]
    assert copy.deepcopy(optimizer).nesterov is True
    optimizer.note = "anything else is an ordinary attribute"
    with pytest.raises(AttributeError, match="'Muon' object has no attribute 'nestrov'"):
        _ = optimizer.nestrov


def test_package_info_has_the_version():
    import emerging_optimizers
    from emerging_optimizers import package_info

    assert package_info.__version__ == emerging_optimizers.__version__
    assert package_info.__package_name__ == "emerging_optimizers"
