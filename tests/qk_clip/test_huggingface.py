"""QK-Clip on the attention of Hugging Face's models: where queries and keys lie, and how their logits are seen."""

import pytest
import torch

from emerging_optimizers import QKClip

transformers = pytest.importorskip("transformers", reason="transformers of the extra 'dev' is not installed")

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**SIZES, **TOKENS, "num_key_value_heads": 2}
GPT = {**TOKENS, "vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 4}
LATENT = {
    **SIZES, **TOKENS, "moe_intermediate_size": 8, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1,
    "topk_group": 1, "num_experts_per_tok": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6, "v_head_dim": 6, "first_k_dense_replace": 1,
}  # fmt: skip
# The projections that are scaled, by the endings of their parameters' names.
MODELS = {
    "Llama": (GROUPED, {"q_proj.weight", "k_proj.weight"}),
    "Qwen2": (GROUPED, {"q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias"}),
    "DeepseekV3": (LATENT, {"q_b_proj.weight", "kv_b_proj.weight"}),
    "DeepseekV2": ({**LATENT, "q_lora_rank": None}, {"q_proj.weight", "kv_b_proj.weight"}),
    "GPT2": (GPT, {"c_attn.weight", "c_attn.bias"}),
    "GPTBigCode": (GPT, {"c_attn.weight", "c_attn.bias"}),
    "GPTNeoX": ({**SIZES, **TOKENS}, {"query_key_value.weight", "query_key_value.bias"}),
    "Falcon": ({**SIZES, **TOKENS, "new_decoder_architecture": True, "num_kv_heads": 2}, {"query_key_value.weight"}),
    "Phi3": (GROUPED, {"qkv_proj.weight"}),
    "OPT": (
        {**SIZES, **TOKENS, "ffn_dim": 32, "word_embed_proj_dim": 16},
        {f"{x}_proj.{own}" for x in "qk" for own in ("weight", "bias")},
    ),
}


def make(name, sizes, implementation):
    """With weights that make logits of about 10."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    config._attn_implementation = implementation
    model = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(0, 0.5)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_clipped_heads_reach_the_threshold(name, implementation):
    sizes, scaled = MODELS[name]
    model = make(name, sizes, implementation)
    ids = torch.randint(3, 32, (3, 9), generator=torch.Generator().manual_seed(1))

    def largest(threshold):
        clip.threshold = threshold
        model(input_ids=ids)
        clip.step()
        (found,) = clip.maxima().values()
        return found

    clip = QKClip(model)
    before = largest(1e30)
    threshold = sorted(before)[1] * 1.001  # two heads stay below
    weights = {key: p.detach().clone() for key, p in model.named_parameters()}
    largest(threshold)
    after = largest(1e30)
    # Products in float32 of weights that were rounded once each.
    assert after == pytest.approx([min(s, threshold) for s in before], rel=1e-5)
    changed = {key for key, p in model.named_parameters() if not torch.equal(p, weights[key])}
    expected = {key for key in weights if any(key.endswith("." + end) for end in scaled)}
    zero = {key for key in expected if not weights[key].any()}  # biases
    # A key that an unclipped head shares stays.
    assert {key for key in expected - zero if "k_proj" not in key} <= changed <= expected
    assert clip.events() == {next(iter(clip.maxima())): [int(s > threshold) for s in before]}


def test_latent_attention_leaves_the_shared_rotary_key():
    model = make("DeepseekV3", LATENT, "sdpa")
    clip = QKClip(model, threshold=1.0, measure=False)
    attention = model.model.layers[0].self_attn
    q, kv = attention.q_b_proj.weight, attention.kv_b_proj.weight
    old_q, old_kv = q.detach().clone(), kv.detach().clone()
    clip.observe(attention, [4.0, 0.5, 16.0, 1.0])
    clip.step()
    by_head_q = (q / old_q).mean(1).view(4, 10)  # 6 rows without position, 4 rotary ones
    by_head_kv = (kv / old_kv).mean(1).view(4, 12)  # 6 rows of keys, 6 of values
    for head, gamma in enumerate([0.25, 1.0, 1 / 16, 1.0]):
        assert by_head_q[head].tolist() == pytest.approx([gamma**0.5] * 6 + [gamma] * 4, rel=1e-5)
        assert by_head_kv[head].tolist() == pytest.approx([gamma**0.5] * 6 + [1.0] * 6, rel=1e-5)


def test_a_model_that_normalises_queries_and_keys():
    model = make("Qwen3", {**GROUPED, "head_dim": 4}, "sdpa")
    with pytest.raises(
        ValueError, match=r"self_attn: it normalises queries or keys .*\(q_norm, k_norm\).*nothing to clip"
    ):
        QKClip(model)
