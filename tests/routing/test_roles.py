"""How a role is found: marks, layers, what the model says, a call, and last names; and what follows from it."""

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from emerging_optimizers import create_optimizer, plan_parameters
from emerging_optimizers.registry import OPTIMIZERS

D = 8


class Named(nn.Module):
    """Modules and parameters under the names that are given."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def table(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def role(model: nn.Module, name: str, **options: Any) -> tuple[str, bool]:
    route = plan_parameters(model, "muon", lr=0.01, **options)[name]
    return route.role, route.fallback


def body(**parts: Any) -> Named:
    return Named(embed=nn.Embedding(50, D), up=nn.Linear(D, 16), down=nn.Linear(16, D), **parts)


# ---- marks ----------------------------------------------------------------------------------------------------------


def test_a_mark_of_megatron_lm_decides() -> None:
    model = body(inner=nn.Linear(D, D), last=nn.Linear(D, 3))
    for p in (model.embed.weight, model.inner.weight):
        p.is_embedding_or_output_parameter = True
    assert (role(model, "embed.weight"), role(model, "inner.weight")) == (("embedding", False), ("head", False))


def test_what_is_marked_does_not_decay() -> None:
    class Timm(Named):
        def no_weight_decay(self) -> set[str]:
            return {"up.weight", "elsewhere"}

    model = Timm(up=nn.Linear(D, D), down=nn.Linear(D, D), last=nn.Linear(D, D))
    model.down.weight._no_weight_decay = True
    plan = plan_parameters(Named(trunk=model, end=nn.Linear(D, 3)), "muon")
    assert [r.name for r in plan if r.decays] == ["trunk.last.weight", "end.weight"]


# ---- the layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrap", "own"),
    [
        (parametrizations.weight_norm, "parametrizations.weight.original1"),
        (parametrizations.orthogonal, "parametrizations.weight.original"),
        (parametrizations.spectral_norm, "parametrizations.weight.original"),
        (torch.nn.utils.spectral_norm, "weight_orig"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "weight_orig"),
    ],
    ids=["weight_norm", "orthogonal", "spectral_norm", "old spectral_norm", "prune"],
)
def test_a_parametrized_layer_keeps_its_role(wrap: Any, own: str) -> None:
    model = body(conv=nn.Conv1d(D, 16, 5), lm_head=nn.Linear(D, 50))
    for name in ("up", "conv", "lm_head"):
        wrap(getattr(model, name))
    plan = plan_parameters(model, "muon", lr=0.01)
    assert [plan[f"{name}.{own}"].role for name in ("up", "conv", "lm_head")] == ["hidden", "conv", "head"]
    assert plan[f"conv.{own}"].view == "flatten"
    for r in plan:
        if r.name.endswith("original0"):
            assert (r.role, r.optimizer, r.decays) == ("vector", "adamw", False)


@pytest.mark.parametrize(
    ("conv", "expected"),
    [
        (nn.Conv2d(3, D, 4, stride=4), "patch"),
        (nn.Conv2d(3, D, 3, padding=1), "conv"),
        (nn.Conv2d(3, D, 1), "conv"),
        (nn.Conv3d(3, D, 2, stride=2), "patch"),
    ],
)
def test_a_projection_of_pieces_that_do_not_overlap_is_a_patch_embedding(conv: nn.Module, expected: str) -> None:
    model = Named(stem=conv, deep=nn.Conv2d(D, D, 2, stride=2), wide=nn.Conv2d(D, D, 3, groups=D), fc=nn.Linear(D, 9))
    assert [role(model, f"{n}.weight")[0] for n in ("stem", "deep", "wide")] == [expected, "conv", "depthwise"]


@pytest.mark.parametrize(
    "experts", [nn.ModuleList([nn.Linear(D, D)] * 2), nn.Parameter(torch.zeros(4, D, D))], ids=["layers", "a stack"]
)
@pytest.mark.parametrize("gate", ["gate", "router", "wg"])
def test_a_gate_beside_experts_is_a_router_and_another_gate_is_not(gate: str, experts: Any) -> None:
    layer = Named(**{gate: nn.Linear(D, 4, bias=False)}, experts=experts)
    glu = Named(**{gate: nn.Linear(D, D)}, up=nn.Linear(D, D))
    model = Named(moe=layer, glu=glu, lm_head=nn.Linear(D, 50))
    assert (role(model, f"moe.{gate}.weight"), role(model, f"glu.{gate}.weight")) == (
        ("router", False),
        ("hidden", False),
    )


# ---- heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [2, 3, 50, 64], ids=["2", "3", "the vocabulary", "padded"])
@pytest.mark.parametrize("name", ["score", "classifier", "lm_head", "qa_outputs", "value_head", "logits", "whatever"])
def test_a_head_beside_an_embedding_is_one_however_wide_it_is(name: str, labels: int) -> None:
    plan = plan_parameters(body(norm=nn.LayerNorm(D), **{name: nn.Linear(D, labels)}), "muon", lr=0.01)
    assert (plan[f"{name}.weight"].role, plan["up.weight"].role) == ("head", "hidden")


def test_several_heads_are_found_and_what_stands_before_each_is_hidden() -> None:
    heads = nn.ModuleList([nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, 50)) for _ in range(2)])
    model = body(heads=heads, actor=nn.Linear(D, 4), critic=nn.Linear(D, 1))
    plan = plan_parameters(model, "muon", lr=0.01)
    assert {r.name for r in plan if r.role == "head"} == {
        "heads.0.2.weight", "heads.1.2.weight", "actor.weight", "critic.weight",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["out", "output", "fc", "predict_action"])
def test_a_layer_of_the_model_itself_that_is_called_output_is_one_and_inside_a_block_it_is_not(name: str) -> None:
    block = Named(attention=Named(output=nn.Linear(D, D), out=nn.Linear(D, D), fc=nn.Linear(D, D)))
    model = Named(
        **{name: nn.Linear(D, 3)}, embed=nn.Embedding(50, D), blocks=nn.ModuleList([block]), b=nn.Linear(D, D)
    )
    assert {r.name for r in plan_parameters(model, "muon", lr=0.01) if r.role == "head"} == {f"{name}.weight"}


def test_the_middle_of_a_pipeline_has_no_head() -> None:
    blocks = nn.ModuleList([Named(attn=nn.Linear(D, D), mlp=Named(up=nn.Linear(D, D), down=nn.Linear(D, D)))])
    for stage in (Named(layers=blocks), Named(layers=nn.ModuleList([*blocks, *blocks]))):
        assert {r.role for r in plan_parameters(stage, "muon", lr=0.01)} == {"hidden", "vector"}


class Called(nn.Module):
    """Nothing in it has a name that says what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.z = nn.Linear(D, 5)  # a head
        self.y = nn.Linear(D, 7)  # another
        self.a = table(11, D)  # looked up
        self.b = table(6, D)  # added
        self.c = table(D, D)  # multiplied by
        self.d = table(3, D, D)  # a batch of matrices
        self.e = nn.LSTM(D, D, batch_first=True)
        self.f = nn.Linear(D, D)

    def forward(self, tokens: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        x = F.embedding(tokens, self.a) + self.b[: tokens.shape[1]].unsqueeze(0)
        x = x + torch.einsum("bti,ij->btj", x, self.c.T) * scale
        x = (x.unsqueeze(1) @ self.d).mean(1)
        x = self.e(self.f(x).relu())[0]
        return {"one": self.z(x).softmax(-1), "two": self.y(x.mean(1))}


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_a_call_shows_the_heads_and_what_is_done_with_parameters_that_nobody_knows(where: str) -> None:
    with torch.device(where):
        model = Called()
    tokens = torch.zeros(2, 4, dtype=torch.long)
    before = {name: p._version for name, p in model.named_parameters()}
    plan = plan_parameters(model, "muon", lr=0.01, example={"tokens": tokens, "scale": 2.0}, strict=True)
    expected = {
        "a": "embedding",
        "b": "table",
        "c": "hidden",
        "d": "experts",
        "y.weight": "head",
        "z.weight": "head",
        **dict.fromkeys(["f.weight", "e.weight_ih_l0", "e.weight_hh_l0"], "hidden"),
    }
    assert {r.name: r.role for r in plan if len(r.shape) > 1} == expected
    assert before == {name: p._version for name, p in model.named_parameters()}
    assert model.training
    guessed = plan_parameters(model, "muon", lr=0.01)
    assert {r.name for r in guessed.fallbacks} >= {"a", "b", "c", "d"}


def test_a_call_that_hangs_on_values_is_made_for_real_and_changes_nothing() -> None:
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Linear(D, D), nn.Linear(D, 3)
            self.norm = nn.BatchNorm1d(D)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.inner(x))) if x.sum().item() > 0 else x

    model = Chooses()
    plan = plan_parameters(model, "muon", lr=0.01, example=torch.ones(4, D))
    assert (plan["last.weight"].role, plan["last.weight"].fallback) == ("head", False)
    assert model.norm.num_batches_tracked == 0
    with torch.device("meta"):
        empty = Chooses()
    with pytest.raises(ValueError, match=r"example: the model cannot be called with it .*item\(\)"):
        plan_parameters(empty, "muon", lr=0.01, example=torch.ones(4, D))
    with pytest.raises(ValueError, match=r"example: the model cannot be called with it \(TypeError"):
        plan_parameters(model, "muon", lr=0.01, example={"y": torch.ones(4, D)})


# ---- parameters of unknown layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("A_log", (16, 4), "table"),
        ("positional_embedding", (20, D), "position"),
        ("pos_embed", (1, 20, D), "position"),
        ("relative_position_bias_table", (49, 4), "position"),
        ("register_tokens", (4, D), "table"),
        ("cls_token", (1, 1, D), "table"),
        ("logit_scale", (4, 1, 1), "vector"),
        ("mystery", (4, D), "unknown"),
    ],
)
def test_a_raw_parameter_is_no_hidden_matrix_and_does_not_decay(
    name: str, shape: tuple[int, ...], expected: str
) -> None:
    route = plan_parameters(body(**{name: table(*shape)}), "muon", lr=0.01)[name]
    assert (route.role, route.optimizer, route.decays) == (expected, "adamw", False)
    assert route.fallback == (sum(n > 1 for n in shape) > 1)


# ---- what follows ---------------------------------------------------------------------------------------------------


def test_roles_turns_what_a_role_gets() -> None:
    layer = Named(gate=nn.Linear(D, 4, bias=False), experts=nn.ModuleList([nn.Linear(D, D)]))
    plan = plan_parameters(Named(moe=layer, lm_head=nn.Linear(D, 50)), "muon", lr=0.01, roles={"router": "adamw"})
    assert (plan["moe.gate.weight"].optimizer, plan["moe.experts.0.weight"].optimizer) == ("adamw", "muon")


def test_overrides_take_expressions_roles_third_optimizers_and_options() -> None:
    model = body(inner=nn.Linear(D, D), lm_head=nn.Linear(D, 50))
    overrides = {
        "embedding": {"lr": 1e-4, "weight_decay": 0.2},
        "re:^(up|down)\\.weight$": "soap",
        "inner.weight": {"optimizer": "lion", "lr": 3e-5},
        "inner.bias": "frozen",
    }
    optimizer = create_optimizer("muon", model, lr=0.01, weight_decay=0.3, overrides=overrides)
    got = {
        name: (g["algorithm"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups for name in g["param_names"]
    }
    assert got == {
        "embed.weight": ("adamw", 1e-4, 0.2),
        "up.weight": ("soap", 0.01, 0.3),
        "down.weight": ("soap", 0.01, 0.3),
        "inner.weight": ("lion", 3e-5, 0.3),
        "lm_head.weight": ("adamw", 0.01, 0.3),
        **dict.fromkeys(["up.bias", "down.bias", "lm_head.bias"], ("adamw", 0.01, 0.0)),
    }
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == ["inner.bias"]


@pytest.mark.parametrize("name", [name for name, known in OPTIMIZERS.items() if not known.elementwise])
def test_the_companion_follows_a_learning_rate_in_adams_unit_and_another_is_refused(name: str) -> None:
    model = body(lm_head=nn.Linear(D, 50))
    if OPTIMIZERS[name].in_adams_unit:
        rates = {g["lr"] for g in create_optimizer(name, model, lr=2e-5, weight_decay=0.0).param_groups}
        assert rates == {2e-5}
        return
    with pytest.raises(ValueError, match=rf"lr=2e-05 of '{name}' says nothing .*'adamw'.*Give companion_lr"):
        create_optimizer(name, model, lr=2e-5)
    rates = {g["algorithm"]: g["lr"] for g in create_optimizer(name, model, lr=0.1, companion_lr=1e-3).param_groups}
    assert rates == {name: 0.1, "adamw": 1e-3}


@pytest.mark.parametrize("name", [name for name, known in OPTIMIZERS.items() if known.in_adams_unit])
def test_a_learning_rate_in_adams_unit_is_about_what_an_element_moves_by(name: str) -> None:
    """Whatever the size of the gradient: the root mean square of an update is 0.18 to 2.2 times the rate."""
    for size in (1.0, 1e-3):
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(0.1 * torch.randn(48, 24, generator=generator))
        optimizer = create_optimizer(name, [p], lr=1e-3, weight_decay=0.0)
        signal, moved = torch.randn(48, 24, generator=generator), []
        for _ in range(30):
            before = p.detach().clone()
            p.grad = size * (0.2 * signal + torch.randn(48, 24, generator=generator))
            optimizer.step()
            moved.append((p.detach() - before).square().mean().sqrt().item() / 1e-3)
        assert 0.179 < sum(moved[20:]) / 10 < 2.2


def test_another_scale_of_the_updates_is_another_unit() -> None:
    with pytest.raises(ValueError, match=r"with scale_mode='shape_scaling' lr=0.01 of 'muon' says nothing"):
        create_optimizer("muon", body(), lr=0.01, scale_mode="shape_scaling")
    create_optimizer("muon", body(), lr=0.01, companion_lr=1e-3, scale_mode="shape_scaling")


def test_an_optimizer_that_is_its_own_companion_takes_one_learning_rate() -> None:
    with pytest.raises(ValueError, match=r"companion_lr=0.1: 'adamw' is its own companion"):
        create_optimizer("adamw", body(), lr=0.01, companion_lr=0.1)


def test_groups_have_names_and_the_main_algorithm_is_first() -> None:
    optimizer = create_optimizer("muon", body(conv=nn.Conv1d(D, D, 3)), lr=0.01)
    names = [group["name"] for group in optimizer.param_groups]
    assert names == ["muon: hidden matrices", "muon: convolutions", "adamw: embeddings", "adamw: vectors"]
    assert optimizer.defaults["lr"] == 0.01
    assert "betas" not in optimizer.param_groups[0]


@pytest.mark.parametrize("name", ["adamw", "muon", "soap", "lion"])
def test_schedulers_read_the_defaults_of_the_main_algorithm(name: str) -> None:
    model = body(lm_head=nn.Linear(D, 50))
    optimizer = create_optimizer(name, model, lr=1e-3)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=10, cycle_momentum=name == "adamw")
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        cycle.step()
    assert optimizer.param_groups[0]["lr"] > 4e-4


def test_what_was_frozen_joins_with_its_route_when_it_is_trained() -> None:
    model, other = body(lm_head=nn.Linear(D, 50)), body(lm_head=nn.Linear(D, 50))
    other.load_state_dict(model.state_dict())
    model.up.requires_grad_(False)
    plan = plan_parameters(model, "muon", lr=0.01)
    assert (plan["up.weight"].optimizer, plan["up.weight"].later.optimizer) == ("frozen", "muon")
    frozen, whole = create_optimizer("muon", model, lr=0.01), create_optimizer("muon", other, lr=0.01)
    assert not frozen.state
    model.up.requires_grad_(True)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        one.grad = torch.randn_like(one)
        two.grad = one.grad.clone()
    frozen.step()
    whole.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    for mine, theirs in zip(frozen.param_groups, whole.param_groups, strict=True):
        assert (mine["name"], set(mine["param_names"])) == (theirs["name"], set(theirs["param_names"]))


def test_what_joined_is_in_checkpoints_and_copies_and_a_group_in_which_all_wait_is_there_for_schedulers() -> None:
    model = body(lm_head=nn.Linear(D, 50))
    for layer in (model.up, model.down):
        layer.requires_grad_(False)
    optimizer = create_optimizer("muon", model, lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    first = optimizer.param_groups[0]
    assert (first["name"], first["params"], first["lr"]) == ("muon: hidden matrices", [], 0.005)
    twin_model, twin = copy.deepcopy((model, optimizer))
    for one in (model, twin_model):
        one.up.requires_grad_(True)
        for p in one.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    twin.step()
    schedule.step()
    assert optimizer.param_groups[0]["param_names"] == ["up.weight"]
    assert all(map(torch.equal, model.parameters(), twin_model.parameters()))
    other = copy.deepcopy(model)
    resumed = create_optimizer("muon", other, lr=0.01)
    resumed.load_state_dict(optimizer.state_dict())
    for one, o in ((model, optimizer), (other, resumed)):
        for p in one.parameters():
            p.grad = torch.full_like(p, 0.5) if p.requires_grad else None
        o.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_what_somebody_else_has_added_does_not_join_twice() -> None:
    """Lightning's BaseFinetuning adds what it thaws, at a lower rate."""
    model = body(lm_head=nn.Linear(D, 50))
    model.up.requires_grad_(False)
    optimizer = create_optimizer("muon", model, lr=0.01)
    model.up.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.up.parameters()), "lr": 0.001})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    assert rates == {name: 0.001 if name.startswith("up.") else 0.01 for name, _ in model.named_parameters()}
    assert len({group["name"] for group in optimizer.param_groups}) == len(optimizer.param_groups)


def test_an_empty_matrix_has_a_route() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that there is nothing to initialise
        model = body(none=nn.Linear(D, 0), nothing=nn.Linear(0, D), lm_head=nn.Linear(D, 50))
    plan = plan_parameters(model, "muon", lr=0.01)
    assert {plan["none.weight"].role, plan["nothing.weight"].role} == {"hidden"}
    create_optimizer("muon", model, lr=0.01)


def test_what_joins_the_model_obeys_the_overrides() -> None:
    model = body(lm_head=nn.Linear(D, 50))
    optimizer = create_optimizer("muon", model, lr=0.01, overrides={"re:(down|late).weight": "soap"})
    model.late = nn.Linear(D, D)
    optimizer.add_param_group({"params": list(model.late.parameters())})
    got = {name: group["algorithm"] for group in optimizer.param_groups for name in group["param_names"]}
    assert (got["down.weight"], got["late.weight"], got["late.bias"]) == ("soap", "soap", "adamw")


def test_a_frozen_parameter_that_no_optimizer_can_update_stays_out() -> None:
    model = body()
    model.packed = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    optimizer = create_optimizer("muon", model, lr=0.01)
    assert "packed" not in {name for group in optimizer.param_groups for name in group["param_names"]}


def test_a_long_plan_groups_what_repeats() -> None:
    block = {"q": nn.Linear(D, D), "k": nn.Linear(D, D)}
    model = Named(embed=nn.Embedding(50, D), layers=nn.ModuleList([nn.ModuleDict(block) for _ in range(40)]))
    model.layers = nn.ModuleList([Named(q=nn.Linear(D, D), k=nn.Linear(D, D)) for _ in range(40)])
    lines = str(plan_parameters(model, "muon", lr=0.01)).splitlines()
    assert len(lines) < 10
    assert any(re.match(r"layers\.\*\.q\.weight  40 x +8x8 +hidden +muon +0.01 +yes", line) for line in lines)
