"""Tiny models of well-known families, and the role that every one of their parameters has.

The roles are read from the papers and from the modelling code of each family, not from a routing plan: they are what a
plan is held against. A role says what a parameter does in its model, whatever it is called and whatever its shape:

- ``embedding``: a lookup table of tokens, ids or categories, also where it is tied to the output head.
- ``position``: a table indexed by position, relative position or segment.
- ``table``: another table that is no linear map: class, register, mask and detection tokens, queries, latents, A_log.
- ``head``: a linear layer or convolution whose output leaves the model. The dense layer before it is hidden.
- ``hidden``: the matrix of a hidden linear map, also a fused one and one stored with three axes.
- ``conv``: a convolution that mixes channels, also transposed, strided or of one tap.
- ``depthwise``: a convolution with one input channel per filter and one group per channel.
- ``patch``: the projection of the raw image's patches to the width of the model.
- ``router``: the gate of a mixture of experts.
- ``experts``: a stack of expert matrices.
- ``adapter``: a low-rank factor or a rotation that a fine-tuning method adds.
- ``vector``: biases, gains and scalars, of any shape with one long axis, and the stacked biases of experts.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emerging_optimizers.routing.roles import TREATMENTS

Roles = dict[str, str]
Example = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """One tiny model. Of the patterns that match a parameter's name, the first decides its role."""

    package: str
    build: Callable[[], nn.Module]
    roles: Mapping[str, str]
    example: Example | None = None  # keyword arguments of one call of the model


def installed(family: Family) -> bool:
    """Looks without importing, since torchvision beside another build of torch does not import (see `_libraries`)."""
    return importlib.util.find_spec(family.package) is not None


def expected(family: Family, model: nn.Module) -> dict[str, str]:
    """The role of every parameter by name. A table that no longer fits the model is an error, never a guess.

    Raises:
        LookupError: a pattern decides nothing, or a parameter with two axes or more matches no pattern.
    """
    roles: dict[str, str] = {}
    idle = dict.fromkeys(family.roles)
    for name, parameter in model.named_parameters():
        pattern = next((pattern for pattern in family.roles if fnmatchcase(name, pattern)), None)
        if pattern is not None:
            roles[name] = family.roles[pattern]
            idle.pop(pattern, None)
        elif parameter.ndim < 2:
            roles[name] = "vector"
        else:
            raise LookupError(f"no pattern matches {name}, of shape {tuple(parameter.shape)}")
    if idle:
        raise LookupError(f"patterns that decide nothing: {', '.join(idle)}")
    if not TREATMENTS.keys() >= {*roles.values()}:
        raise LookupError(f"roles that do not exist: {sorted({*roles.values()} - TREATMENTS.keys())}")
    return roles


# --- builders -------------------------------------------------------------------------------------------


@contextmanager
def _libraries() -> Iterator[None]:
    """Lets the libraries be imported and built beside each other's versions."""
    with warnings.catch_warnings():
        # What one library deprecates, another still calls.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        if importlib.util.find_spec("torchvision") is not None:
            try:
                importlib.import_module("torchvision")
            except RuntimeError:
                # A torchvision built for CUDA cannot load its operators beside a CPU build of torch. It then stops at
                # the first operator that it wants to annotate, and takes timm and transformers with it. Declared
                # without a body they are enough here: no model of this file calls them.
                for operator in ("nms", "qnms"):
                    torch.library.define(
                        f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                    )
                importlib.import_module("torchvision")
        yield


def _transformers(config: str, model: str, /, **settings: Any) -> nn.Module:
    with _libraries():
        library = importlib.import_module("transformers")
        return getattr(library, model)(getattr(library, config)(**settings))


def _timm(name: str, /, **settings: Any) -> nn.Module:
    with _libraries():
        return importlib.import_module("timm").create_model(name, **settings)


def _diffusers(model: str, /, **settings: Any) -> nn.Module:
    with _libraries():
        return getattr(importlib.import_module("diffusers"), model)(**settings)


def _peft(config: str, /, **settings: Any) -> nn.Module:
    """An adapted Llama."""
    llama = _transformers("LlamaConfig", "LlamaForCausalLM", **DECODER)
    with _libraries():
        library = importlib.import_module("peft")
        return library.get_peft_model(llama, getattr(library, config)(task_type="CAUSAL_LM", **settings))


def _detr() -> nn.Module:
    """Its backbone is a configuration inside the configuration."""
    with _libraries():
        library = importlib.import_module("transformers")
        backbone = library.ResNetConfig(
            embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], out_features=["stage2"], layer_type="basic"
        )
    return _transformers(
        "DetrConfig",
        "DetrForObjectDetection",
        **BOTH_SIDES,
        use_timm_backbone=False,
        backbone_config=backbone,
        num_queries=6,
        num_labels=5,
    )


# The vocabulary and the number of positions are no multiple of a width, so that no shape agrees by accident.
VOCAB, POSITIONS = 61, 22
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER: dict[str, Any] = dict(SIZES, vocab_size=VOCAB, max_position_embeddings=POSITIONS, pad_token_id=0)
DECODER: dict[str, Any] = dict(ENCODER, **SPECIAL | {"num_key_value_heads": 2})
GPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5_SIZES: dict[str, Any] = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BOTH_SIDES: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
SEQ2SEQ: dict[str, Any] = dict(SPECIAL, **BOTH_SIDES, vocab_size=VOCAB, decoder_start_token_id=1)
VISION: dict[str, Any] = dict(SIZES, image_size=16, patch_size=4, num_labels=5)
MOE: dict[str, Any] = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _ids(rows: int = 2, columns: int = 6) -> Tensor:
    return torch.arange(3, 3 + rows * columns).reshape(rows, columns)


def _tokens() -> dict[str, Any]:
    return {"input_ids": _ids()}


def _both_tokens() -> dict[str, Any]:
    return {"input_ids": _ids(), "decoder_input_ids": _ids(2, 5)}


def _pixels(size: int = 16) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def _x(*shape: int) -> dict[str, Any]:
    return {"x": torch.randn(*shape)}


def _token_x() -> dict[str, Any]:
    return {"tokens": _ids()}


# --- models in plain torch -------------------------------------------------------------------------------


class Block(nn.Module):
    """A transformer's block with one fused matrix for queries, keys and values."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


BLOCK: Roles = {"*.qkv.weight": "hidden", "*.proj.weight": "hidden", "*.up.weight": "hidden", "*.down.weight": "hidden"}


class Lookup(nn.Module):
    """An embedding of one's own: nothing but its forward says that its weight is a table."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class LanguageModel(nn.Module):
    """A decoder whose head may have more rows than the vocabulary, as is usual where it is split or aligned."""

    def __init__(self, *, rows: int = VOCAB, lookup: type[nn.Module] = nn.Embedding) -> None:
        super().__init__()
        self.embed = lookup(VOCAB, 32)
        self.positions = nn.Parameter(torch.randn(1, POSITIONS, 32))
        self.blocks = nn.ModuleList([Block(32), Block(32)])
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, rows, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions[:, : tokens.size(1)]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))[..., :VOCAB]


class MultiToken(nn.Module):
    """Several future tokens from one trunk (Gloeckle et al. 2024); with ``dense``, Medusa's layer before each head."""

    def __init__(self, *, dense: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        self.blocks = nn.ModuleList([Block(32), Block(32)])
        self.dense = nn.ModuleList([nn.Linear(32, 32) if dense else nn.Identity() for _ in range(3)])
        self.heads = nn.ModuleList([nn.Linear(32, VOCAB, bias=False) for _ in range(3)])

    def forward(self, tokens: Tensor) -> list[Tensor]:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return [head(x + F.silu(dense(x))) for dense, head in zip(self.dense, self.heads, strict=True)]


class ChatGLM2Layer(nn.Module):
    """Two groups of keys and values beside four heads of queries, and a gated MLP, each in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(32)
        self.query_key_value = nn.Linear(32, 4 * 8 + 2 * 2 * 8)
        self.dense = nn.Linear(32, 32, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(32)
        self.dense_h_to_4h = nn.Linear(32, 2 * 48, bias=False)
        self.dense_4h_to_h = nn.Linear(48, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query_key_value(self.input_layernorm(x)).split([32, 16, 16], dim=-1)
        query, key, value = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + self.dense(mixed.transpose(1, 2).flatten(2))
        gate, up = self.dense_h_to_4h(self.post_attention_layernorm(x)).chunk(2, dim=-1)
        return x + self.dense_4h_to_h(F.silu(gate) * up)


class ChatGLM2(nn.Module):
    """As in the code that is published with ChatGLM2's weights, less the rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCAB, 32)
        self.layers = nn.ModuleList([ChatGLM2Layer(), ChatGLM2Layer()])
        self.final_layernorm = nn.RMSNorm(32)
        self.output_layer = nn.Linear(32, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.word_embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.output_layer(self.final_layernorm(x))


class Recurrent(nn.Module):
    """An LSTM or a GRU over tokens, or over measurements where there is no embedding."""

    def __init__(self, cell: str, outputs: int, *, tokens: bool, every_step: bool = False, **settings: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 12) if tokens else nn.Identity()
        self.rnn = getattr(nn, cell)(12, 24, num_layers=2, batch_first=True, **settings)
        width = (settings.get("proj_size") or 24) * (2 if settings.get("bidirectional") else 1)
        self.out = nn.Linear(width, outputs)
        self.every_step = every_step

    def forward(self, x: Tensor) -> Tensor:
        states = self.rnn(self.embed(x))[0]
        return self.out(states if self.every_step else states[:, -1])


class Translator(nn.Module):
    """nn.Transformer between two vocabularies."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Embedding(VOCAB, 32)
        self.target = nn.Embedding(47, 32)
        self.positions = nn.Embedding(POSITIONS, 32)
        self.transformer = nn.Transformer(32, 4, 2, 2, 48, dropout=0.0, batch_first=True)
        self.generator = nn.Linear(32, 47)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        ahead = nn.Transformer.generate_square_subsequent_mask(target.size(1))
        x = self.source(source) + self.positions(torch.arange(source.size(1)))
        y = self.target(target) + self.positions(torch.arange(target.size(1)))
        return self.generator(self.transformer(x, y, tgt_mask=ahead))


class DLRM(nn.Module):
    """Naumov et al. 2019: one table per category. The first layer of each MLP is as wide as the first table is long."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.EmbeddingBag(rows, 8, mode="sum") for rows in (40, 17, 8)])
        self.bottom = nn.Sequential(nn.Linear(13, 40), nn.ReLU(), nn.Linear(40, 8), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(8 + 6, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))

    def forward(self, dense: Tensor, categories: Tensor) -> Tensor:
        x = self.bottom(dense)
        features = [table(bag) for table, bag in zip(self.tables, categories.unbind(1), strict=True)]
        every = torch.stack([x, *features], dim=1)
        first, second = torch.tril_indices(4, 4, offset=-1)
        return self.top(torch.cat([x, (every @ every.mT)[:, first, second]], dim=1))


class ActorCritic(nn.Module):
    """Two heads over a shared trunk; the critic's has a single row."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(11, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.actor = nn.Linear(32, 4)
        self.critic = nn.Linear(32, 1)
        self.log_std = nn.Parameter(torch.zeros(1, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.trunk(x)
        return self.actor(x), self.log_std.exp(), self.critic(x)


class WeightNormed(nn.Module):
    """A temporal convolutional classifier whose convolutions keep direction and length apart."""

    def __init__(self, *, old: bool) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch deprecates the old form; models still use it
            norm = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
            self.first = norm(nn.Conv1d(6, 16, 3, padding=1))
            self.second = norm(nn.Conv1d(16, 16, 3, padding=1, groups=2))
        self.classifier = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.relu(self.second(F.relu(self.first(x)))).mean(-1))


class LinearPatches(nn.Module):
    """A vision transformer that flattens its patches and projects them with a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.to_patch_embedding = nn.Linear(3 * 4 * 4, 32)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 32))
        self.pos_embedding = nn.Parameter(torch.randn(1, 17, 32))
        self.blocks = nn.ModuleList([Block(32), Block(32)])
        self.mlp_head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        x = self.to_patch_embedding(patches)
        x = torch.cat([self.cls_token.expand(x.size(0), -1, -1), x], dim=1) + self.pos_embedding
        for block in self.blocks:
            x = block(x)
        return self.mlp_head(x[:, 0])


class Perceiver(nn.Module):
    """Jaegle et al. 2021: learned latents read the input by cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(7, 32))
        self.cross = nn.MultiheadAttention(32, 4, kdim=10, vdim=10, batch_first=True)
        self.inner = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
        self.logits = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.expand(x.size(0), -1, -1)
        latents = latents + self.cross(latents, x, x, need_weights=False)[0]
        return self.logits(self.inner(latents).mean(1))


def _stage() -> nn.Module:
    """A pipeline's middle stage: its last matrix leads out of this part of the model, not out of the model."""
    return nn.ModuleDict({"layers": nn.Sequential(Block(32), Block(32))})["layers"]


def _autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 3, 4, stride=2, padding=1),
    )


# --- shared patterns ------------------------------------------------------------------------------------


def _hidden(*names: str) -> Roles:
    """Hidden matrices of layers with these names."""
    return {f"*.{name}.weight": "hidden" for name in names}


def _heads(*names: str) -> Roles:
    return {f"{name}.weight": "head" for name in names}


QKVO = _hidden("q_proj", "k_proj", "v_proj", "o_proj")
GLU = _hidden("gate_proj", "up_proj", "down_proj")
EXPERTS: Roles = {"*.experts.gate_up_proj": "experts", "*.experts.down_proj": "experts"}
TOKENS: Roles = {"model.embed_tokens.weight": "embedding"}
HEAD = _heads("lm_head")
LLAMA: Roles = TOKENS | QKVO | GLU
GPT2: Roles = {"*.wte.weight": "embedding", "*.wpe.weight": "position"} | _hidden("c_attn", "c_proj", "c_fc")
MEGATRON = _hidden("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
MAMBA: Roles = {
    "*.A_log": "table",
    "*.conv1d.weight": "depthwise",
    **_hidden("in_proj", "x_proj", "dt_proj", "out_proj"),
}
# `dense` also names the pooler, the hidden layer of RoBERTa's classifier, and the transform before BERT's decoder.
BERT: Roles = {
    "*.word_embeddings.weight": "embedding",
    "*.position_embeddings.weight": "position",
    "*.token_type_embeddings.weight": "position",
    **_hidden("query", "key", "value", "dense"),
}
DISTILBERT: Roles = {
    "*.word_embeddings.weight": "embedding",
    "*.position_embeddings.weight": "position",
    **_hidden("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
}
T5: Roles = {
    "shared.weight": "embedding",
    "*.relative_attention_bias.weight": "position",
    "*Attention.[qkvo].weight": "hidden",
}
BART: Roles = {
    "*.embed_positions.weight": "position",
    **_hidden("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
}
VIT: Roles = {
    "*cls_token": "table",
    "*position_embeddings": "position",
    "*.patch_embeddings.projection.weight": "patch",
    **QKVO,
    **_hidden("fc1", "fc2"),
}
RESNET: Roles = {"*.convolution.weight": "conv"}
PEFT_LLAMA: Roles = {"*.embed_tokens.weight": "embedding", **QKVO, **GLU, "*.lm_head.weight": "head"}
LORA: Roles = {"*.lora_[AB].*": "adapter", "*_proj.base_layer.weight": "hidden"}
RNN: Roles = {"rnn.weight_ih_*": "hidden", "rnn.weight_hh_*": "hidden", "out.weight": "head"}


# --- the table ------------------------------------------------------------------------------------------


def _causal(
    name: str,
    roles: Roles,
    base: dict[str, Any],
    /,
    *,
    config: str | None = None,
    task: str = "ForCausalLM",
    **settings: Any,
) -> Family:
    """A decoder of transformers, whose classes are called after the family and the task."""
    build = partial(_transformers, config or f"{name}Config", name + task, **(base | settings))
    return Family("transformers", build, roles, _tokens)


def _encoder(name: str, task: str, roles: Roles, **settings: Any) -> Family:
    build = partial(_transformers, f"{name}Config", f"{name}For{task}", **{**ENCODER, **settings})
    return Family("transformers", build, roles, _tokens)


def _vision(name: str, task: str, roles: Roles, size: int = 16, **settings: Any) -> Family:
    return Family(
        "transformers", partial(_transformers, f"{name}Config", name + task, **settings), roles, partial(_pixels, size)
    )


DECODERS: dict[str, Family] = {
    # Tied unless the configuration says otherwise: one table for the tokens and the logits.
    "gpt2": _causal("GPT2", GPT2, GPT, task="LMHeadModel"),
    "gpt2-untied": _causal("GPT2", GPT2 | HEAD, GPT, tie_word_embeddings=False, task="LMHeadModel"),
    "llama3": _causal("Llama", LLAMA | HEAD, DECODER),
    "llama3-classification": _causal(
        "Llama", LLAMA | _heads("score"), DECODER, num_labels=3, task="ForSequenceClassification"
    ),
    # The first layer is dense, the second has experts beside a shared expert.
    "llama4": _causal(
        "Llama4",
        LLAMA | EXPERTS | {"*.router.weight": "router"} | HEAD,
        DECODER,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        config="Llama4TextConfig",
    ),
    "qwen2": _causal("Qwen2", LLAMA | HEAD, DECODER),
    "qwen3": _causal("Qwen3", LLAMA | HEAD, DECODER, head_dim=8),
    "qwen3-moe": _causal("Qwen3Moe", TOKENS | QKVO | EXPERTS | {"*.mlp.gate.weight": "router"} | HEAD, DECODER | MOE),
    # A layer of linear attention and one of full attention. The shared expert's gate has a single row and is a
    # router all the same: it weighs an expert's output, one number for each token.
    "qwen3-next": _causal(
        "Qwen3Next",
        {
            **LLAMA,
            **_hidden("in_proj_qkvz", "in_proj_ba", "out_proj"),
            "*.conv1d.weight": "depthwise",
            **EXPERTS,
            "*.mlp.gate.weight": "router",
            "*.mlp.shared_expert_gate.weight": "router",
            **HEAD,
        },
        DECODER | MOE,
        shared_expert_intermediate_size=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "mixtral": _causal(
        "Mixtral", TOKENS | QKVO | EXPERTS | {"*.mlp.gate.weight": "router"} | HEAD, DECODER, num_local_experts=4
    ),
    # The first layer is dense. The factors of the latent attention are two linear maps with a norm between them.
    "deepseek-v3": _causal(
        "DeepseekV3",
        {
            **TOKENS,
            **_hidden("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
            **GLU,
            **EXPERTS,
            "*.mlp.gate.weight": "router",
            **HEAD,
        },
        DECODER,
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        kv_lora_rank=8,
        q_lora_rank=12,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "gemma2": _causal("Gemma2", LLAMA, DECODER, head_dim=8),
    "gemma3": _causal("Gemma3", LLAMA, DECODER, head_dim=8, config="Gemma3TextConfig"),
    # The experts have biases, which are stacked as their matrices are.
    "gpt-oss": _causal(
        "GptOss",
        {**TOKENS, **QKVO, "*.experts.*_bias": "vector", **EXPERTS, "*.mlp.router.weight": "router", **HEAD},
        DECODER,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "olmo2": _causal("Olmo2", LLAMA | HEAD, DECODER),
    "phi3": _causal("Phi3", TOKENS | _hidden("qkv_proj", "o_proj", "gate_up_proj", "down_proj") | HEAD, DECODER),
    "glm": _causal("Glm", TOKENS | QKVO | _hidden("gate_up_proj", "down_proj") | HEAD, DECODER, head_dim=8),
    "gpt-neox": _causal("GPTNeoX", {"*.embed_in.weight": "embedding", **MEGATRON, **HEAD}, ENCODER | SPECIAL),
    "bloom": _causal(
        "Bloom",
        {"*.word_embeddings.weight": "embedding", **MEGATRON},
        SPECIAL,
        vocab_size=VOCAB,
        hidden_size=32,
        n_layer=2,
        n_head=4,
    ),
    # One head of keys and values for all queries, in the one matrix.
    "falcon": _causal("Falcon", {"*.word_embeddings.weight": "embedding", **MEGATRON}, ENCODER | SPECIAL),
    "gpt-bigcode-multi-query": _causal("GPTBigCode", GPT2, GPT),
    "gpt-bigcode-multi-head": _causal("GPTBigCode", GPT2, GPT, multi_query=False),
    "codegen": _causal(
        "CodeGen",
        {"*.wte.weight": "embedding", **_hidden("qkv_proj", "out_proj", "fc_in", "fc_out"), **HEAD},
        GPT,
        rotary_dim=4,
    ),
    # Projections are stored as (width, heads, head width). The *_bias are added to the queries, one per head; the
    # segment table is indexed by whether two tokens share a segment.
    "xlnet": _causal(
        "XLNet",
        {
            "*.mask_emb": "table",
            "*.word_embedding.weight": "embedding",
            "*.rel_attn.[qkvor]": "hidden",
            "*.rel_attn.r_?_bias": "vector",
            "*.rel_attn.seg_embed": "position",
            **_hidden("layer_1", "layer_2"),
        },
        {},
        vocab_size=VOCAB,
        d_model=32,
        n_layer=2,
        n_head=4,
        d_inner=48,
        task="LMHeadModel",
    ),
    "mamba": _causal(
        "Mamba",
        {"*.embeddings.weight": "embedding", **MAMBA},
        SPECIAL,
        vocab_size=VOCAB,
        hidden_size=32,
        state_size=4,
        num_hidden_layers=2,
    ),
    # One decay per head, so that A_log has one axis.
    "mamba2": _causal(
        "Mamba2",
        {
            "*.embeddings.weight": "embedding",
            "*.conv1d.weight": "depthwise",
            **_hidden("in_proj", "out_proj"),
            **HEAD,
        },
        SPECIAL,
        vocab_size=VOCAB,
        hidden_size=32,
        state_size=8,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=8,
        n_groups=2,
        chunk_size=8,
    ),
    "jamba": _causal(
        "Jamba",
        {**LLAMA, **MAMBA, **EXPERTS, "*.router.weight": "router", **HEAD},
        DECODER,
        num_experts=4,
        num_experts_per_tok=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        mamba_d_conv=4,
        mamba_dt_rank=4,
    ),
}

ENCODERS: dict[str, Family] = {
    # The decoder of a masked language model is tied to the word embeddings in each of these.
    "bert-mlm": _encoder("Bert", "MaskedLM", BERT),
    "bert-pretraining": _encoder("Bert", "PreTraining", BERT | _heads("cls.seq_relationship")),
    "bert-classification": _encoder("Bert", "SequenceClassification", BERT | _heads("classifier"), num_labels=3),
    "bert-qa": _encoder("Bert", "QuestionAnswering", BERT | _heads("qa_outputs")),
    "roberta-classification": _encoder(
        "Roberta", "SequenceClassification", BERT | _heads("classifier.out_proj"), num_labels=3
    ),
    "distilbert-mlm": _encoder(
        "DistilBert", "MaskedLM", DISTILBERT | {"vocab_transform.weight": "hidden"}, hidden_dim=48
    ),
    "distilbert-classification": _encoder(
        "DistilBert",
        "SequenceClassification",
        DISTILBERT | {"pre_classifier.weight": "hidden"} | _heads("classifier"),
        hidden_dim=48,
    ),
    # Wi holds gate and values. What the code calls `head` is the dense layer before the tied decoder.
    "modernbert": _encoder(
        "ModernBert",
        "MaskedLM",
        {"*.tok_embeddings.weight": "embedding", "head.dense.weight": "hidden", **_hidden("Wqkv", "Wo", "Wi")},
        cls_token_id=1,
        sep_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "t5": Family(
        "transformers",
        partial(_transformers, "T5Config", "T5ForConditionalGeneration", **T5_SIZES),
        T5 | _hidden("wi", "wo"),
        _both_tokens,
    ),
    "t5-v1.1": Family(
        "transformers",
        partial(_transformers, "T5Config", "T5ForConditionalGeneration", **T5_SIZES, feed_forward_proj="gated-gelu"),
        T5 | _hidden("wi_0", "wi_1", "wo"),
        _both_tokens,
    ),
    # Every expert is a module of its own here, so that its matrices are hidden ones.
    "switch-transformer": Family(
        "transformers",
        partial(
            _transformers,
            "SwitchTransformersConfig",
            "SwitchTransformersForConditionalGeneration",
            **T5_SIZES,
            num_decoder_layers=2,
            num_experts=4,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
        ),
        T5 | {"*.router.classifier.weight": "router"} | _hidden("wi", "wo"),
        _both_tokens,
    ),
    "bart": Family(
        "transformers",
        partial(
            _transformers,
            "BartConfig",
            "BartForConditionalGeneration",
            **SEQ2SEQ,
            max_position_embeddings=POSITIONS,
        ),
        BART | {"model.shared.weight": "embedding"},
        _both_tokens,
    ),
    "whisper": Family(
        "transformers",
        partial(
            _transformers,
            "WhisperConfig",
            "WhisperForConditionalGeneration",
            **SEQ2SEQ,
            num_mel_bins=10,
            max_source_positions=16,
            max_target_positions=POSITIONS,
        ),
        BART | {"model.encoder.conv[12].weight": "conv", "model.decoder.embed_tokens.weight": "embedding"},
        lambda: {"input_features": torch.randn(2, 10, 32), "decoder_input_ids": _ids(2, 5)},
    ),
    # The first convolution has one group and one input channel, the waveform's: nothing about it is depthwise.
    "wav2vec2-ctc": Family(
        "transformers",
        partial(
            _transformers,
            "Wav2Vec2Config",
            "Wav2Vec2ForCTC",
            **SIZES,
            vocab_size=21,
            conv_dim=(8, 8, 8),
            conv_stride=(5, 2, 2),
            conv_kernel=(10, 3, 2),
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=4,
            mask_time_length=2,
        ),
        {
            "*.feature_extractor.conv_layers.*.conv.weight": "conv",
            "*.pos_conv_embed.conv.parametrizations.weight.original0": "vector",
            "*.pos_conv_embed.conv.parametrizations.weight.original1": "conv",
            **_hidden("projection", "q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense"),
            **HEAD,
        },
        lambda: {"input_values": torch.randn(2, 400)},
    ),
}

IMAGES: dict[str, Family] = {
    "vit-classification": _vision("ViT", "ForImageClassification", VIT | _heads("classifier"), **VISION),
    "vit-pooler": _vision("ViT", "Model", VIT | {"pooler.dense.weight": "hidden"}, **VISION),
    "deit-distilled": _vision(
        "DeiT",
        "ForImageClassificationWithTeacher",
        VIT | {"*.distillation_token": "table"} | _heads("cls_classifier", "distillation_classifier"),
        **VISION,
    ),
    "swin": _vision(
        "Swin",
        "ForImageClassification",
        {
            "*.patch_embeddings.projection.weight": "patch",
            "*.relative_position_bias_table": "position",
            **QKVO,
            **_hidden("fc1", "fc2", "reduction"),
            **_heads("classifier"),
        },
        image_size=16,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        num_labels=5,
    ),
    "beit": _vision(
        "Beit",
        "ForImageClassification",
        VIT | {"*.mask_token": "table", "*.relative_position_bias_table": "position"} | _heads("classifier"),
        **VISION,
        vocab_size=VOCAB,
        use_relative_position_bias=True,
        use_absolute_position_embeddings=True,
        use_mask_token=True,
    ),
    # The stem takes the image in patches. Between the stages the same kind of layer works on hidden channels.
    "convnext": _vision(
        "ConvNext",
        "ForImageClassification",
        {
            "*.patch_embeddings.weight": "patch",
            "*.dwconv.weight": "depthwise",
            **_hidden("pwconv1", "pwconv2"),
            "*.downsampling_layer.1.weight": "conv",
            **_heads("classifier"),
        },
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_stages=2,
        num_labels=5,
    ),
    "resnet": _vision(
        "ResNet",
        "ForImageClassification",
        RESNET | _heads("classifier.1"),
        size=32,
        embedding_size=8,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        layer_type="bottleneck",
        num_labels=5,
    ),
    # The first projection takes overlapping patches of the image, the second of hidden features.
    "segformer": _vision(
        "Segformer",
        "ForSemanticSegmentation",
        {
            "*.stages.0.patch_embeddings.proj.weight": "patch",
            "*.stages.1.patch_embeddings.proj.weight": "conv",
            "*.sequence_reduction.weight": "conv",
            "*.dwconv.weight": "depthwise",
            **QKVO,
            **_hidden("fc1", "fc2", "linear_projections.[01].proj"),
            "decode_head.linear_fuse.weight": "conv",
            **_heads("decode_head.classifier"),
        },
        size=32,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=5,
    ),
    "yolos": _vision(
        "Yolos",
        "ForObjectDetection",
        {
            "*.cls_token": "table",
            "*.detection_tokens": "table",
            "*position_embeddings": "position",
            "*.patch_embeddings.projection.weight": "patch",
            **_hidden("query", "key", "value", "dense"),
            **_heads("class_labels_classifier.layers.2", "bbox_predictor.layers.2"),
            "class_labels_classifier.layers.*.weight": "hidden",
            "bbox_predictor.layers.*.weight": "hidden",
        },
        **SIZES,
        image_size=[16, 16],
        patch_size=4,
        num_detection_tokens=6,
        num_labels=5,
    ),
    # The decoder's queries are a learned table, one row for each object that may be found.
    "detr": Family(
        "transformers",
        _detr,
        {
            "*.query_position_embeddings.weight": "table",
            **RESNET,
            "model.input_projection.weight": "conv",
            **QKVO,
            **_hidden("fc1", "fc2"),
            **_heads("class_labels_classifier", "bbox_predictor.layers.2"),
            "bbox_predictor.layers.*.weight": "hidden",
        },
        partial(_pixels, 32),
    ),
    "clip": Family(
        "transformers",
        partial(
            _transformers,
            "CLIPConfig",
            "CLIPModel",
            text_config=dict(ENCODER, bos_token_id=1, eos_token_id=2),
            vision_config=dict(SIZES, hidden_size=24, image_size=16, patch_size=4),
            projection_dim=20,
        ),
        {
            "*.token_embedding.weight": "embedding",
            "*.position_embedding.weight": "position",
            "*.patch_embedding.weight": "patch",
            **_hidden("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
            **_heads("visual_projection", "text_projection"),
        },
        lambda: _pixels() | _tokens(),
    ),
    # Attention's biases are read off by the offset between two pixels. The stem's convolutions overlap.
    "tiny-vit": Family(
        "timm",
        partial(
            _timm,
            "tiny_vit_5m_224",
            num_classes=5,
            embed_dims=(16, 16, 32, 32),
            depths=(1, 1, 1, 1),
            num_heads=(1, 2, 2, 2),
            window_sizes=(4, 4, 4, 4),
        ),
        {
            "*.attention_biases": "position",
            "patch_embed.conv[12].conv.weight": "conv",
            "*.conv2.conv.weight": "depthwise",
            "*.conv[13].conv.weight": "conv",
            "*.local_conv.conv.weight": "depthwise",
            **_hidden("qkv", "proj", "fc1", "fc2"),
            **_heads("head.fc"),
        },
        partial(_x, 2, 3, 64, 64),
    ),
    "vit-registers": Family(
        "timm",
        partial(
            _timm,
            "vit_tiny_patch16_224",
            img_size=16,
            patch_size=4,
            embed_dim=32,
            depth=2,
            num_heads=4,
            num_classes=5,
            reg_tokens=3,
            init_values=1e-5,
            qk_norm=True,
        ),
        {
            "cls_token": "table",
            "reg_token": "table",
            "pos_embed": "position",
            "patch_embed.proj.weight": "patch",
            **_hidden("qkv", "proj", "fc1", "fc2"),
            **_heads("head"),
        },
        partial(_x, 2, 3, 16, 16),
    ),
    # The table of classes has a row more than there are classes, for no class. proj_out_1 makes the last layer's
    # shift and scale from the condition; proj_out_2 is the last layer.
    "dit": Family(
        "diffusers",
        partial(
            _diffusers,
            "DiTTransformer2DModel",
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
        ),
        {
            "pos_embed.proj.weight": "patch",
            "*.embedding_table.weight": "embedding",
            **_hidden("linear_1", "linear_2", "norm1.linear", "to_q", "to_k", "to_v", "to_out.0"),
            **_hidden("ff.net.0.proj", "ff.net.2"),
            "proj_out_1.weight": "hidden",
            **_heads("proj_out_2"),
        },
        lambda: {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": torch.tensor([3, 5]),
            "class_labels": torch.tensor([1, 2]),
        },
    ),
    "unet2d": Family(
        "diffusers",
        partial(
            _diffusers,
            "UNet2DModel",
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            num_class_embeds=5,
        ),
        {
            "class_embedding.weight": "embedding",
            **_hidden("linear_1", "linear_2", "time_emb_proj", "to_q", "to_k", "to_v", "to_out.0"),
            "conv_out.weight": "head",
            "conv_in.weight": "conv",
            "*.conv*.weight": "conv",
        },
        lambda: {"sample": torch.randn(2, 3, 8, 8), "timestep": 3, "class_labels": torch.tensor([1, 2])},
    ),
}

PLAIN: dict[str, Family] = {
    "chatglm2": Family(
        "torch",
        ChatGLM2,
        {"word_embeddings.weight": "embedding", **MEGATRON, **_heads("output_layer")},
        _token_x,
    ),
    "lstm-classifier": Family(
        "torch",
        partial(Recurrent, "LSTM", 5, tokens=True, bidirectional=True),
        {"embed.weight": "embedding", **RNN},
        lambda: {"x": _ids()},
    ),
    "gru-classifier": Family("torch", partial(Recurrent, "GRU", 5, tokens=False), RNN, partial(_x, 2, 6, 12)),
    "lstm-language-model": Family(
        "torch",
        partial(Recurrent, "LSTM", VOCAB, tokens=True, every_step=True),
        {"embed.weight": "embedding", **RNN},
        lambda: {"x": _ids()},
    ),
    # Sak et al. 2014: each layer's output is projected. No example: torch warns whenever such a layer is called.
    "lstm-projected": Family(
        "torch",
        partial(Recurrent, "LSTM", VOCAB, tokens=True, every_step=True, proj_size=20),
        {"embed.weight": "embedding", **RNN, "rnn.weight_hr_*": "hidden"},
    ),
    "nn-transformer": Family(
        "torch",
        Translator,
        {
            "source.weight": "embedding",
            "target.weight": "embedding",
            "positions.weight": "position",
            "*.in_proj_weight": "hidden",
            **_hidden("out_proj", "linear1", "linear2"),
            **_heads("generator"),
        },
        lambda: {"source": _ids(), "target": _ids(2, 5)},
    ),
    "dlrm": Family(
        "torch",
        DLRM,
        {
            "tables.*.weight": "embedding",
            "bottom.*.weight": "hidden",
            "top.4.weight": "head",
            "top.*.weight": "hidden",
        },
        lambda: {"dense": torch.randn(2, 13), "categories": torch.arange(12).remainder(8).reshape(2, 3, 2)},
    ),
    "actor-critic": Family(
        "torch",
        ActorCritic,
        {"trunk.[02].weight": "hidden", "log_std": "vector", **_heads("actor", "critic")},
        partial(_x, 2, 11),
    ),
    "multi-token-prediction": Family(
        "torch", MultiToken, {"embed.weight": "embedding", **BLOCK, **_heads("heads.?")}, _token_x
    ),
    "medusa": Family(
        "torch",
        partial(MultiToken, dense=True),
        {"embed.weight": "embedding", **BLOCK, "dense.?.weight": "hidden", **_heads("heads.?")},
        _token_x,
    ),
    "padded-head": Family(
        "torch",
        partial(LanguageModel, rows=80),
        {"embed.weight": "embedding", "positions": "position", **BLOCK, **_heads("head")},
        _token_x,
    ),
    "pipeline-stage": Family("torch", _stage, BLOCK, lambda: {"input": torch.randn(2, 6, 32)}),
    "own-embedding": Family(
        "torch",
        partial(LanguageModel, lookup=Lookup),
        {"embed.weight": "embedding", "positions": "position", **BLOCK, **_heads("head")},
        _token_x,
    ),
    "weight-norm-old": Family(
        "torch",
        partial(WeightNormed, old=True),
        {"*.weight_g": "vector", "*.weight_v": "conv", **_heads("classifier")},
        partial(_x, 2, 6, 9),
    ),
    "weight-norm": Family(
        "torch",
        partial(WeightNormed, old=False),
        {"*.original0": "vector", "*.original1": "conv", **_heads("classifier")},
        partial(_x, 2, 6, 9),
    ),
    "linear-patches": Family(
        "torch",
        LinearPatches,
        {
            "to_patch_embedding.weight": "patch",
            "cls_token": "table",
            "pos_embedding": "position",
            **BLOCK,
            **_heads("mlp_head"),
        },
        partial(_x, 2, 3, 16, 16),
    ),
    # The keys and values are as wide as the input, so that torch keeps the three projections apart.
    "perceiver": Family(
        "torch",
        Perceiver,
        {
            "latents": "table",
            "cross.[qkv]_proj_weight": "hidden",
            "*.in_proj_weight": "hidden",
            **_hidden("out_proj", "linear1", "linear2"),
            **_heads("logits"),
        },
        partial(_x, 2, 9, 10),
    ),
    "autoencoder": Family(
        "torch",
        _autoencoder,
        {"6.weight": "head", "[024].weight": "conv"},
        lambda: {"input": torch.randn(2, 3, 16, 16)},
    ),
}

ADAPTED: dict[str, Family] = {
    # The head is trained as a copy; the original stays in the model, frozen.
    "lora": Family(
        "peft",
        partial(_peft, "LoraConfig", r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]),
        {
            "*.embed_tokens.weight": "embedding",
            **_hidden("k_proj", "o_proj"),
            **GLU,
            **LORA,
            "*.lm_head.original_module.weight": "head",
            "*.lm_head.modules_to_save.*.weight": "head",
        },
        _tokens,
    ),
    "lora-embedding-and-head": Family(
        "peft",
        partial(_peft, "LoraConfig", r=4, target_modules=["embed_tokens", "gate_proj", "lm_head"]),
        {
            "*.lora_embedding_[AB].*": "adapter",
            "*.embed_tokens.base_layer.weight": "embedding",
            **LORA,
            "*.lm_head.base_layer.weight": "head",
            **QKVO,
            **_hidden("up_proj", "down_proj"),
        },
        _tokens,
    ),
    # The magnitudes have one axis.
    "dora": Family(
        "peft",
        partial(_peft, "LoraConfig", r=4, target_modules=["q_proj", "v_proj"], use_dora=True),
        {
            "*.embed_tokens.weight": "embedding",
            **_hidden("k_proj", "o_proj"),
            **GLU,
            **LORA,
            "*.lm_head.weight": "head",
        },
        _tokens,
    ),
    "ia3": Family(
        "peft",
        partial(
            _peft,
            "IA3Config",
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        ),
        {
            "*.ia3_l.*": "vector",
            "*.embed_tokens.weight": "embedding",
            "*_proj.base_layer.weight": "hidden",
            **_hidden("q_proj", "o_proj", "gate_proj", "up_proj"),
            "*.lm_head.weight": "head",
        },
        _tokens,
    ),
    # Each row is the upper triangle of a skew-symmetric block, whose Cayley transform rotates the input.
    "oft": Family(
        "peft",
        partial(_peft, "OFTConfig", oft_block_size=8, r=0, target_modules=["q_proj", "v_proj"]),
        {
            "*.oft_R.*": "adapter",
            "*.embed_tokens.weight": "embedding",
            "*_proj.base_layer.weight": "hidden",
            **_hidden("k_proj", "o_proj"),
            **GLU,
            "*.lm_head.weight": "head",
        },
        _tokens,
    ),
}

FAMILIES: dict[str, Family] = DECODERS | ENCODERS | IMAGES | PLAIN | ADAPTED
