"""How well-known layers store their matrices: stored transposed, or several in one parameter.

Layers are recognised by the names of classes and attributes and by shapes, so that the library which defines them need
not be installed. A layer that fits no description is one matrix.
"""

from typing import Any

from torch import Tensor, nn

from emerging_optimizers.routing.places import Place

# Query, key and value below one another, as in nanoGPT, timm, Phi-3 and vLLM.
FUSED_ATTENTION = ("c_attn", "qkv_proj", "qkv", "Wqkv")
# Query, key and value of one head (of one group, where heads share keys) below those of the one before: GPT-NeoX, BLOOM
# and Falcon; Megatron-LM.
INTERLEAVED_ATTENTION = ("query_key_value", "linear_qkv")
# Key and value of one head below those of the one before, out of a latent: DeepSeek, Megatron-LM.
INTERLEAVED_LATENT = ("kv_b_proj", "linear_kv_up_proj")
# Perhaps gate and up below one another; how wide the layer after it is says so.
GATED = ("Wi", "wi", "w12", "fc1", "in_proj", "dense_h_to_4h", "linear_fc1", "gate_up", "up_gate_proj", "ff_proj")
# Gate and up alternate row by row.
INTERLEAVED_EXPERTS = ("GptOssExperts",)


def layout(place: Place, p: Tensor) -> tuple[Any, str]:
    """The matrix view of a parameter, and in words what it does; ("auto", "") where there is nothing to say."""
    owner, parent, own = place.layer, place.parent, place.own
    layer = place.path.rpartition(".")[2]
    if isinstance(owner, nn.Conv1d):
        return "flatten", ""
    if p.ndim == 3:
        return _experts(owner, own)
    if p.ndim != 2:
        return "auto", ""
    transposed = type(owner).__name__ == "Conv1D" and own == "weight"
    rows, columns = p.shape[::-1] if transposed else p.shape
    sizes: tuple[int, ...] = ()
    what, kind = "", "split"
    known = _by_its_sizes(parent, layer, rows, columns)
    if isinstance(owner, nn.MultiheadAttention) and own == "in_proj_weight":
        sizes, what = (rows // 3,) * 3, "query, key and value apart"
    elif isinstance(owner, (nn.RNNBase, nn.RNNCellBase)) and own.startswith(("weight_ih", "weight_hh")):
        gates = rows // owner.hidden_size
        sizes, what = (owner.hidden_size,) * gates if gates > 1 else (), f"{gates} gates apart"
    elif known is not None:
        kind, sizes, what = known
    elif layer in FUSED_ATTENTION:
        sizes = _attention(parent, rows, columns)
        what = "query, key and value apart" if len(sizes) == 3 else "key and value apart"
    elif layer in INTERLEAVED_ATTENTION:
        sizes, kind = _group(parent, rows), "interleaved"
        if not sizes:
            return "auto", "one matrix: query, key and value alternate by head, of which the number is not known"
        what = "query, key and value apart" if len(sizes) == 3 else "query, gate, key and value apart"
    elif layer in INTERLEAVED_LATENT:
        sizes = _number(parent, "qk_nope_head_dim", "qk_head_dim"), _number(parent, "v_head_dim")
        what, kind = "key and value apart", "interleaved"
    elif layer == "gate_up_proj" or (layer in GATED and _is_gated(parent, rows, columns)):
        sizes, what = (rows // 2,) * 2, "gate and up apart"
    elif layer == "kv_a_proj_with_mqa":
        sizes = tuple(_number(parent, key) for key in ("kv_lora_rank", "qk_rope_head_dim"))
        what = "latent and rotary key apart"
    if not sizes or min(sizes) < 1 or (rows % sum(sizes) if kind == "interleaved" else rows != sum(sizes)):
        return ("transposed", "stored as (in, out)") if transposed else ("auto", "")
    if rows == sum(sizes):
        kind = "split"  # one head or group: nothing alternates
    elif kind == "interleaved":
        what += f", gathered from {rows // sum(sizes)} heads or groups"
    if transposed:
        return ("transposed", kind, *sizes), f"stored as (in, out), {what}"
    return (kind, *sizes), what


def _by_its_sizes(parent: nn.Module, layer: str, rows: int, columns: int) -> tuple[str, tuple[int, ...], str] | None:
    """Kind, sizes and words for layers of which the module above has numbers that nobody else has."""
    three = "query, key and value apart"
    if layer == "c_attn" and hasattr(parent, "multi_query") and not getattr(parent, "is_cross_attention", False):
        size = _number(parent, "head_dim")  # GPTBigCode
        return (
            ("split", (rows - 2 * size, size, size), three)
            if parent.multi_query
            else ("interleaved", (size,) * 3, three)
        )
    if layer == "qkv_proj" and (shards := _number(parent, "mp_num")):  # CodeGen
        return "interleaved", (columns // shards,) * 3, "query, value and key apart"
    if layer == "qkv" and (values := _number(parent, "val_dim")):  # TinyViT, LeViT
        return "interleaved", (_number(parent, "key_dim"),) * 2 + (values,), three
    if layer == "query_key_value" and getattr(parent, "multi_query_attention", False):  # ChatGLM2
        groups = _number(parent, "num_multi_query_groups_per_partition")
        size = groups * _number(parent, "hidden_size_per_attention_head")
        return "split", (rows - 2 * size, size, size), three
    if layer in ("in_proj_qkvz", "in_proj_ba"):  # Qwen3-Next
        repeats = _number(parent, "num_v_heads") // max(1, _number(parent, "num_k_heads"))
        key, value = _number(parent, "head_k_dim"), repeats * _number(parent, "head_v_dim")
        if layer == "in_proj_ba":
            return "interleaved", (repeats, repeats), "beta and alpha apart"
        return "interleaved", (key, key, value, value), "query, key, value and gate apart"
    if (states := _number(parent, "ssm_state_size")) and _number(parent, "intermediate_size"):  # Mamba
        inner, steps = _number(parent, "intermediate_size"), _number(parent, "time_step_rank")
        groups, heads = _number(parent, "n_groups") * states, _number(parent, "num_heads")
        if layer == "x_proj":
            return "split", (steps, states, states), "step, B and C apart"
        if layer == "in_proj" and rows == 2 * inner:
            return "split", (inner, inner), "input and gate apart"
        if layer == "in_proj" and groups:
            return "split", (inner, inner, groups, groups, heads), "gate, input, B, C and step apart"
    return None


def _is_gated(parent: nn.Module, rows: int, columns: int) -> bool:
    """Whether the layer after one of so many rows takes half of them."""
    after = {(m.in_features, m.out_features) for m in parent.children() if isinstance(m, nn.Linear)}
    return (rows // 2, columns) in after and all(size != rows for size, _ in after)


def _attention(parent: nn.Module, rows: int, columns: int) -> tuple[int, ...]:
    """The heights of query, key and value; of key and value in GPT-2's cross-attention; () where they do not fit."""
    heads, groups = (
        _number(parent, "num_attention_heads", "num_heads", "n_head"),
        _number(parent, "num_key_value_heads"),
    )
    size = _number(parent, "head_dim")
    if heads and groups:
        size = size or rows // (heads + 2 * groups)
        return (heads * size, groups * size, groups * size)
    if rows == 2 * columns and getattr(parent, "is_cross_attention", False):
        return (columns, columns)
    # Without a count of its own, the keys have as many heads as the queries.
    return (rows // 3,) * 3 if rows == 3 * columns or rows == 3 * heads * size else ()


def _group(parent: nn.Module, rows: int) -> tuple[int, ...]:
    """The heights of the queries of one group, perhaps of their gates, of its key and its value; () where unknown."""
    heads = _number(parent, "num_attention_heads_per_partition", "num_attention_heads", "num_heads", "n_head")
    groups = _number(
        parent, "num_query_groups_per_partition", "num_query_groups", "num_kv_heads", "num_key_value_heads"
    )
    groups = groups or heads
    if not heads or heads % groups:
        return ()
    gates = int(getattr(getattr(parent, "config", None), "attention_output_gate", False) is True)
    parts = (heads // groups,) * (1 + gates) + (1, 1)
    size, rest = divmod(rows, groups * sum(parts))
    return () if rest else tuple(size * part for part in parts)


def _experts(owner: nn.Module, own: str) -> tuple[Any, str]:
    """A stack of experts with gate and up in one parameter; whether it is transposed follows from the shapes."""
    fused, down = getattr(owner, "gate_up_proj", None), getattr(owner, "down_proj", None)
    if not (isinstance(fused, Tensor) and isinstance(down, Tensor)) or fused.ndim != 3 or down.ndim != 3:
        return "auto", ""
    two, one = fused.shape[-2:], down.shape[-2:]
    turned = two == (one[1], 2 * one[0])
    if own not in ("gate_up_proj", "down_proj") or not (turned or two == (2 * one[1], one[0])):
        return "auto", ""
    if own == "down_proj":
        return ("transposed", "stored as (in, out)") if turned else ("auto", "")
    size, what = one[0] if turned else one[1], "gate and up apart"
    view: tuple[str | int, ...] = ("split", size, size)
    if type(owner).__name__ in INTERLEAVED_EXPERTS:
        view, what = ("interleaved", 1, 1), f"{what}, gathered from alternating rows"
    return (("transposed", *view), f"stored as (in, out), {what}") if turned else (view, what)


def _number(module: nn.Module, *names: str) -> int:
    """A size that a module or its configuration has under one of these names; else 0."""
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            if isinstance(value := getattr(holder, name, None), int):
                return value
    return 0
