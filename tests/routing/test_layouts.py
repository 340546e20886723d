"""Layers with several matrices in one parameter are recognised; small stand-ins have the names of the real ones."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from emerging_optimizers import create_optimizer, plan_parameters
from emerging_optimizers.lowrank import LowRankLinear

D = 8


class Conv1D(nn.Module):
    """Transformers' layer: the weight is (in, out)."""

    def __init__(self, out: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, out))


class Block(nn.Module):
    """Modules under the names that are given, and attributes."""

    def __init__(self, attributes: dict[str, Any] | None = None, **modules: nn.Module) -> None:
        super().__init__()
        for name, value in {**(attributes or {}), **modules}.items():
            setattr(self, name, value)


def experts(kind: str, fused: tuple[int, ...], down: tuple[int, ...]) -> nn.Module:
    module: nn.Module = type(kind, (nn.Module,), {})()
    module.gate_up_proj = nn.Parameter(torch.randn(fused))
    module.down_proj = nn.Parameter(torch.randn(down))
    return module


def linear(out: int, width: int = D) -> nn.Linear:
    return nn.Linear(width, out, bias=False)


GROUPED = SimpleNamespace(num_attention_heads=4, num_key_value_heads=1, head_dim=2)
MLA = {"kv_lora_rank": 6, "qk_rope_head_dim": 2, "qk_nope_head_dim": 2, "qk_head_dim": 4, "v_head_dim": 3}
LAYERS: dict[str, tuple[nn.Module, dict[str, Any]]] = {
    "GPT-2": (
        Block(c_attn=Conv1D(3 * D, D), c_proj=Conv1D(D, D)),
        {"c_attn.weight": ("transposed", "split", D, D, D), "c_proj.weight": "transposed"},
    ),
    "GPT-2 cross-attention": (
        Block({"is_cross_attention": True}, c_attn=Conv1D(2 * D, D)),
        {"c_attn.weight": ("transposed", "split", D, D)},
    ),
    "nanoGPT": (Block({"n_head": 2}, c_attn=linear(3 * D)), {"c_attn.weight": ("split", D, D, D)}),
    "Phi-3": (
        Block({"config": GROUPED}, qkv_proj=linear(12), gate_up_proj=linear(20)),
        {"qkv_proj.weight": ("split", 8, 2, 2), "gate_up_proj.weight": ("split", 10, 10)},
    ),
    "Llama": (
        Block({"config": GROUPED}, q_proj=linear(8), k_proj=linear(2), gate_proj=linear(20)),
        {"q_proj.weight": "auto", "k_proj.weight": "auto", "gate_proj.weight": "auto"},
    ),
    "sizes that do not fit": (Block({"config": GROUPED}, qkv_proj=linear(15)), {"qkv_proj.weight": "auto"}),
    "GPT-NeoX": (
        Block({"config": SimpleNamespace(num_attention_heads=4)}, query_key_value=linear(3 * D)),
        {"query_key_value.weight": ("interleaved", 2, 2, 2)},
    ),
    "BLOOM": (
        Block({"num_heads": 2, "head_dim": 4}, query_key_value=linear(3 * D)),
        {"query_key_value.weight": ("interleaved", 4, 4, 4)},
    ),
    "Falcon": (
        Block({"num_heads": 4, "num_kv_heads": 2}, query_key_value=linear(16)),
        {"query_key_value.weight": ("interleaved", 4, 2, 2)},
    ),
    "Falcon, multi-query": (
        Block({"num_heads": 4, "num_kv_heads": 1}, query_key_value=linear(12)),
        {"query_key_value.weight": ("split", 8, 2, 2)},
    ),
    "Megatron-LM": (
        Block({"config": SimpleNamespace(num_attention_heads=8, num_query_groups=2)}, linear_qkv=linear(24)),
        {"linear_qkv.weight": ("interleaved", 8, 2, 2)},
    ),
    "Megatron-LM, one of two ranks": (
        Block(
            {
                "num_attention_heads_per_partition": 4,
                "num_query_groups_per_partition": 2,
                "config": SimpleNamespace(num_attention_heads=8, num_query_groups=4, attention_output_gate=True),
            },
            linear_qkv=linear(24),
        ),
        {"linear_qkv.weight": ("interleaved", 4, 4, 2, 2)},
    ),
    "heads that are not known": (Block(query_key_value=linear(3 * D)), {"query_key_value.weight": "auto"}),
    "heads that do not fit": (
        Block({"num_heads": 5}, query_key_value=linear(3 * D)),
        {"query_key_value.weight": "auto"},
    ),
    "DeepSeek": (
        Block(MLA, kv_a_proj_with_mqa=linear(8), kv_b_proj=linear(20, 6), q_b_proj=linear(16, 6)),
        {
            "kv_a_proj_with_mqa.weight": ("split", 6, 2),
            "kv_b_proj.weight": ("interleaved", 2, 3),
            "q_b_proj.weight": "auto",
        },
    ),
    "GPTBigCode, multi-query": (
        Block({"multi_query": True, "head_dim": 2}, c_attn=linear(12)),
        {"c_attn.weight": ("split", 8, 2, 2)},
    ),
    "GPTBigCode, multi-head": (
        Block({"multi_query": False, "head_dim": 2}, c_attn=linear(24)),
        {"c_attn.weight": ("interleaved", 2, 2, 2)},
    ),
    "CodeGen": (Block({"mp_num": 4}, qkv_proj=linear(24)), {"qkv_proj.weight": ("interleaved", 2, 2, 2)}),
    "TinyViT": (
        Block({"num_heads": 2, "key_dim": 2, "val_dim": 4}, qkv=linear(16)),
        {"qkv.weight": ("interleaved", 2, 2, 4)},
    ),
    "ChatGLM2": (
        Block(
            {
                "multi_query_attention": True,
                "num_multi_query_groups_per_partition": 2,
                "hidden_size_per_attention_head": 2,
            },
            query_key_value=linear(16),
        ),
        {"query_key_value.weight": ("split", 8, 4, 4)},
    ),
    "Qwen3-Next": (
        Block(
            {"num_v_heads": 4, "num_k_heads": 2, "head_k_dim": 3, "head_v_dim": 2},
            in_proj_qkvz=linear(28),
            in_proj_ba=linear(8),
        ),
        {"in_proj_qkvz.weight": ("interleaved", 3, 3, 4, 4), "in_proj_ba.weight": ("interleaved", 2, 2)},
    ),
    "Mamba": (
        Block(
            {"intermediate_size": 10, "ssm_state_size": 3, "time_step_rank": 2},
            in_proj=linear(20),
            x_proj=linear(8, 10),
        ),
        {"in_proj.weight": ("split", 10, 10), "x_proj.weight": ("split", 2, 3, 3)},
    ),
    "Mamba-2": (
        Block({"intermediate_size": 10, "ssm_state_size": 3, "n_groups": 2, "num_heads": 5}, in_proj=linear(37)),
        {"in_proj.weight": ("split", 10, 10, 6, 6, 5)},
    ),
    "ModernBERT": (Block(Wi=linear(20), Wo=linear(D, 10)), {"Wi.weight": ("split", 10, 10)}),
    "timm's gated MLP": (Block(fc1=linear(20), fc2=linear(D, 10)), {"fc1.weight": ("split", 10, 10)}),
    "timm's MLP": (Block(fc1=linear(20), fc2=linear(D, 20)), {"fc1.weight": "auto"}),
    "LSTM": (nn.LSTM(D, 6), {"weight_ih_l0": ("split", 6, 6, 6, 6), "weight_hh_l0": ("split", 6, 6, 6, 6)}),
    "GRU": (nn.GRUCell(D, 6), {"weight_ih": ("split", 6, 6, 6), "weight_hh": ("split", 6, 6, 6)}),
    "RNN": (nn.RNN(D, 6), {"weight_ih_l0": "auto", "weight_hh_l0": "auto"}),
    "MultiheadAttention": (nn.MultiheadAttention(D, 2), {"in_proj_weight": ("split", D, D, D)}),
    "Mixtral": (
        Block(experts=experts("MixtralExperts", (3, 12, D), (3, D, 6))),
        {"experts.gate_up_proj": ("split", 6, 6), "experts.down_proj": "auto"},
    ),
    "Llama 4": (
        Block(experts=experts("Llama4TextExperts", (3, D, 12), (3, 6, D))),
        {"experts.gate_up_proj": ("transposed", "split", 6, 6), "experts.down_proj": "transposed"},
    ),
    "gpt-oss": (
        Block(experts=experts("GptOssExperts", (3, D, 12), (3, 6, D))),
        {"experts.gate_up_proj": ("transposed", "interleaved", 1, 1), "experts.down_proj": "transposed"},
    ),
}


@pytest.mark.parametrize("family", LAYERS)
def test_a_known_layer_gets_its_view_and_the_reason_says_so(family: str) -> None:
    layer, views = LAYERS[family]
    model = nn.ModuleDict({"a": nn.Embedding(50, D), "b": layer, "c": linear(50)})
    plan = plan_parameters(model, "muon", strict=True)
    for name, view in views.items():
        route = plan[f"b.{name}"]
        assert (route.optimizer, route.view) == ("muon", view)
        assert ("stored as (in, out)" in route.reason) == ("transposed" in view)
        assert ("apart" in route.reason) == ("split" in view or "interleaved" in view)
        assert ("gathered from" in route.reason) == ("interleaved" in view)
    optimizer = create_optimizer("muon", model, plan=plan)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    groups = {n: g["matrix_view"] for g in optimizer.param_groups for n in g["param_names"]}
    assert {name: groups[f"b.{name}"] for name in views} == views


def gpt_oss() -> nn.Module:
    """With the biases that its experts have: (E, out), which is the shape of a matrix."""
    stack = experts("GptOssExperts", (3, D, 12), (3, 6, D))
    stack.gate_up_proj_bias = nn.Parameter(torch.randn(3, 12))
    stack.down_proj_bias = nn.Parameter(torch.randn(3, D))
    stack.scale = nn.Parameter(torch.randn(3, D))
    return nn.ModuleDict({"a": nn.Embedding(50, D), "b": Block(experts=stack, router=linear(3)), "c": linear(50)})


def test_the_biases_of_stacked_experts_are_vectors() -> None:
    plan = plan_parameters(gpt_oss(), "muon")
    assert [route.name for route in plan.fallbacks] == ["b.experts.scale"]
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        route = plan[f"b.experts.{name}"]
        assert (route.optimizer, route.decays, route.view) == ("adamw", False, "auto")
        assert route.reason == "biases of 3 experts, one vector each"
    assert (plan["b.experts.scale"].role, plan["b.router.weight"].role) == ("unknown", "router")
    assert plan["b.router.weight"].optimizer == "muon"
    assert not plan_parameters(gpt_oss(), "lion")["b.experts.down_proj_bias"].decays
    asked = plan_parameters(gpt_oss(), "muon", overrides={"*down_proj_bias": "muon"})["b.experts.down_proj_bias"]
    assert (asked.optimizer, asked.reason) == ("muon", "override '*down_proj_bias'")


def test_a_matrix_that_is_called_bias_is_no_vector_without_a_stack_beside_it() -> None:
    """A relative position bias is a table of its own, and a stack of another number of experts says nothing."""
    block = Block(experts=experts("Experts", (4, 12, D), (4, D, 6)))
    block.relative_bias = nn.Parameter(torch.randn(6, 6))
    block.experts.other_bias = nn.Parameter(torch.randn(3, 12))
    plan = plan_parameters(nn.ModuleList([nn.Embedding(50, D), block]), "muon")
    roles = [(plan[name].role, plan[name].fallback) for name in ("1.relative_bias", "1.experts.other_bias")]
    assert roles == [("position", True), ("vector", True)]


@pytest.mark.parametrize("family", ["Mixtral", "Llama 4", "gpt-oss"])
def test_stacked_soap_keeps_a_stack_of_experts_as_one(family: str) -> None:
    """What it is for; gate and up are apart under every other optimizer."""
    layer = LAYERS[family][0]
    model = nn.ModuleDict({"a": nn.Embedding(50, D), "b": layer, "c": linear(50)})
    optimizer = create_optimizer("stacked_soap", model, lr=0.01)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name in ("gate_up_proj", "down_proj"):
        p = getattr(layer.experts, name)
        short, long = sorted(p.shape[1:])
        sides = {optimizer.state[p][key].shape[0] for key in ("L", "R")}
        assert sides == {long, 3 * short}, name
        assert optimizer.plan[f"b.experts.{name}"].reason == (
            "batch of 3 matrices; as one, so that they share their factors"
        )


def test_heads_that_are_not_known_are_said_to_be_so() -> None:
    route = plan_parameters(LAYERS["heads that are not known"][0], "muon", overrides={"*": "muon"})[
        "query_key_value.weight"
    ]
    assert "one matrix: query, key and value alternate by head" in route.reason


@pytest.mark.parametrize("groups", [4, 2], ids=["multi-head", "grouped queries"])
@pytest.mark.parametrize("name", ["muon", "soap"])
def test_how_a_projection_is_stored_does_not_change_its_training(name: str, groups: int) -> None:
    """Rows by head, as GPT-NeoX and Megatron-LM have them, train as three layers of their own do."""
    heads, size = 4, 2
    per_group = (heads // groups * size, size, size)
    fused = linear(groups * sum(per_group))
    parts = [part.flatten(0, 1) for part in fused.weight.detach().unflatten(0, (groups, -1)).split(per_group, dim=1)]
    apart = [nn.Parameter(part.clone()) for part in parts]
    model = nn.ModuleList(
        [nn.Embedding(50, D), Block({"num_heads": heads, "num_kv_heads": groups}, query_key_value=fused)]
    )
    optimizers = [create_optimizer(name, model, lr=0.1), create_optimizer(name, apart, lr=0.1)]
    for step in range(3):
        grad = torch.randn(fused.weight.shape, generator=torch.Generator().manual_seed(step))
        fused.weight.grad = grad
        for p, part in zip(apart, grad.unflatten(0, (groups, -1)).split(per_group, dim=1), strict=True):
            p.grad = part.flatten(0, 1)
        for optimizer in optimizers:
            optimizer.step()
    ours = fused.weight.detach().unflatten(0, (groups, -1)).split(per_group, dim=1)
    for part, p in zip(ours, apart, strict=True):
        torch.testing.assert_close(part.flatten(0, 1), p.detach(), rtol=1e-4, atol=1e-5)


def test_an_element_wise_optimizer_needs_no_view() -> None:
    assert {route.view for route in plan_parameters(LAYERS["GPT-2"][0], "adamw")} == {"auto"}


def test_the_factors_of_a_low_rank_layer_are_no_matrix() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), LowRankLinear(4, 6, rank=2, bias=False), linear(9, 6))
    plan = plan_parameters(model, "muon", strict=True)
    assert plan["1.factors"].optimizer == "adamw"
    assert "only Spectron takes them" in plan["1.factors"].reason
    with pytest.raises(
        ValueError, match=r"'1.factors' holds two factors of a low-rank layer, not one matrix; create_optimizer\('spec"
    ):
        plan_parameters(model, "muon", overrides={"1.*": "muon"})
    assert plan_parameters(model, "muon", overrides={"1.*": "adamw"})["1.factors"].optimizer == "adamw"
