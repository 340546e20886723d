"""The role of each parameter of a model: what it is, how that is known, and what follows from it.

What is known comes first: marks on parameters and modules, the layer that owns a parameter, what the model says of
itself, and what a traced call shows. Names and positions come last, and what rests on them alone is a guess.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from emerging_optimizers.routing.places import Place, plain_path
from emerging_optimizers.routing.trace import Uses, trace

RoleT = Literal[
    "embedding",
    "position",
    "head",
    "hidden",
    "conv",
    "depthwise",
    "patch",
    "router",
    "experts",
    "adapter",
    "vector",
    "table",
    "unknown",
]


class Treatment(NamedTuple):
    """What follows from a role: whether the matrix optimizer takes it, and whether it decays."""

    matrix: bool
    decays: bool


# docs/routing.md says for each row why.
TREATMENTS: Mapping[RoleT, Treatment] = {
    "embedding": Treatment(False, True),
    "position": Treatment(False, False),
    "head": Treatment(False, True),
    "hidden": Treatment(True, True),
    "conv": Treatment(True, True),
    "depthwise": Treatment(False, True),
    "patch": Treatment(False, True),
    "router": Treatment(True, True),
    "experts": Treatment(True, True),
    "adapter": Treatment(True, True),
    "vector": Treatment(False, False),
    "table": Treatment(False, False),
    "unknown": Treatment(False, False),
}


@dataclass(frozen=True)
class Finding:
    """What a parameter is.

    Attributes:
        role: one of `TREATMENTS`.
        reason: how that is known, in words.
        guess: it rests on names, positions or shapes alone.
        decays: whether it gets weight decay.
    """

    role: RoleT
    reason: str
    guess: bool = False
    decays: bool = True


_POSITION = re.compile(
    r"(^|_)(pos|position|positions|positional|type|seg|segment|wpe|relative|attention_bias(es)?)(_|$|emb)", re.I
)
_TABLE = re.compile(r"(^|_)(token|tokens|query|queries|latent|latents|mask|cls|register|registers|prompt|prefix)(_|$)|"
                    r"A_log$|bias_table$|^tokens?$", re.I)  # fmt: skip
# With whatever stands before or behind them: "classification_head", "head_dist".
_HEAD_WORDS = (
    "head heads score classifier cls predict prediction predictions predictor logits unembed unembedding qa_outputs "
    "actor critic policy output_layer output_projection out_layer fc_out final_layer conv_out visual_projection "
    "text_projection image_projection"
)
_HEAD = re.compile(rf"^(?!pre_)(.*_)?({'|'.join(_HEAD_WORDS.split())})(_.*|\d*)?$", re.I)
# The same, directly in the model.
_TOP_HEAD = re.compile(r"^(out|output|outputs|readout|final|fc|last|last_layer)$", re.I)
# What stands before a head, or is one only for whoever uses a base model as an encoder.
_NOT_LAST = re.compile(r"pooler|transform|dense$", re.I)
_EMBEDDING = re.compile(r"emb(ed|edding|eddings)?$|^wte$", re.I)
_BIAS = re.compile(r"(^|_)bias(es)?$", re.I)
# Layers inside a block, of which none is the last of a model.
_HIDDEN = re.compile(
    r"(^|_)(q|k|v|o|qkv|kv|in|gate|up|down|gate_up)_?proj|query|(^|_)(key|value|attn|attention|mlp|ffn)|c_proj|c_fc|"
    r"^(up|down|gate|qkv|w[123i]|Wi|Wqkv|in_proj\w*)$"
)
_ROUTER = re.compile(r"^(gate|router|gating|wg|switch|shared_expert_gate)$", re.I)
_ADAPTERS = re.compile(r"\.(lora_(embedding_)?[AB]|hada_w\d.*|lokr_w\d.*|oft_[Rr]|boft_R|vera_[AB]|adalora_[AB])(\.|$)")
_ADAPTER_VECTORS = re.compile(r"\.(lora_magnitude_vector|ia3_l|lora_E|vera_lambda_\w+|boft_s)(\.|$)")
_EXPERTS = re.compile(r"expert|moe", re.I)
_EXPERT_STACKS = re.compile(r"^(gate_up_proj|down_proj|gate_proj|up_proj|w[123]|wi(_\d)?|wo|weight[12]?)$")
_RAW_PRODUCT = re.compile(r"(^|_)(weight|kernel|proj|w)(_|$)", re.I)


_VECTOR, _SCALAR = Finding("vector", "vector", decays=False), Finding("vector", "scalar", decays=False)


def find_roles(
    model: nn.Module, where: Sequence[Place], modules: Mapping[str, nn.Module], example: Any = None
) -> dict[str, Finding]:
    """The role of every parameter, by name, in the order of `named_parameters()`.

    Args:
        model: any module; tied parameters have one role, under their first name.
        where: its `places`.
        modules: all of its modules, by their paths.
        example: what the model is called with, see `trace`; None: without a call.

    Raises:
        ValueError: the call cannot be traced.
    """
    uses = None if example is None else trace(model, example)
    tied = _tied(modules)
    found: dict[str, Finding] = {}
    for place in where:
        found[place.name] = _marked(place, place.p) or _of_layer(place, place.p, tied) or _raw(place, place.p, uses)
    convs = [place.layer for place in where if isinstance(place.layer, nn.modules.conv._ConvNd)]
    first = min((conv.in_channels for conv in convs), default=0)
    for place in where:
        if found[place.name].role == "conv" and _is_patch(place, first):
            found[place.name] = Finding("patch", "patch embedding: cuts the input into pieces that do not overlap")
    found |= _heads(where, modules, found, uses, bool(tied))
    still = _undecayed(where, modules)
    for place in where:
        finding = found[place.name]
        if finding.decays and (not TREATMENTS[finding.role].decays or id(place.p) in still):
            found[place.name] = replace(finding, decays=False)
    return found


def _marked(place: Place, p: Tensor) -> Finding | None:
    if p.ndim >= 2 and getattr(p, "is_embedding_or_output_parameter", False):  # Megatron-LM's
        mark = "marked is_embedding_or_output_parameter"
        return (
            Finding("embedding", f"embedding: {mark}") if _looks_up(place) else Finding("head", f"output head: {mark}")
        )
    return None


def _undecayed(where: Sequence[Place], modules: Mapping[str, nn.Module]) -> set[int]:
    """Parameters that say of themselves, or of which a module says, that they do not decay."""
    found = {id(place.p) for place in where if getattr(place.p, "_no_weight_decay", False)}
    for module in modules.values():
        if callable(names := getattr(module, "no_weight_decay", None)):
            own = dict(module.named_parameters())
            found |= {id(own[name]) for name in names() if name in own}
    return found


def _tied(modules: Mapping[str, nn.Module]) -> set[int]:
    """Tables that also are the weight of a linear layer."""
    tables = {id(m.weight) for m in modules.values() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    return tables & {id(m.weight) for m in modules.values() if isinstance(m, nn.Linear)} if tables else tables


def _looks_up(place: Place) -> bool:
    kind = type(place.layer)
    return isinstance(place.layer, (nn.Embedding, nn.EmbeddingBag)) or ("Embedding" in kind.__name__ and place.own in (
        "weight", "embedding", "embeddings", "table"
    ))  # fmt: skip


def _is_conv(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.conv._ConvNd)


def _is_linear(place: Place) -> bool:
    """A layer that multiplies by one matrix: torch's, and everybody's that says so in its name."""
    if place.own not in ("weight", "qweight"):
        return False
    name = type(place.layer).__name__
    return isinstance(place.layer, nn.Linear) or "Linear" in name or name == "Conv1D"  # transformers'


def _of_layer(place: Place, p: Tensor, tied: set[int]) -> Finding | None:
    """What a parameter is by the layer that owns it; None: that does not say it."""
    layer, kind = place.layer, type(place.layer).__name__
    if place.magnitude:
        return Finding("vector", "lengths of the rows of a normalised weight, a vector")
    if p.ndim < 2:
        return _VECTOR if p.ndim else _SCALAR
    path = f".{place.path}.{place.own}"
    if _ADAPTER_VECTORS.search(path):
        return Finding("vector", "an adapter's scales, a vector")
    if _ADAPTERS.search(path):
        return Finding("adapter", "factor of an adapter")
    if id(p) in tied:
        return Finding("embedding", "embedding, tied to the output head")
    if _looks_up(place):
        if "quer" in place.word.lower():
            return Finding("table", "table of queries")
        if _POSITION.search(place.word) or _POSITION.search(kind):
            return Finding("position", "table of positions or types")
        return Finding("embedding", "embedding")
    if experts := experts_of_a_bias(place, p):
        return Finding("vector", f"biases of {experts} experts, one vector each")
    if isinstance(layer, nn.modules.conv._ConvNd) and place.own == "weight":
        if layer.groups > 1 and layer.groups == layer.in_channels:
            return Finding("depthwise", "depthwise filters: one for each channel, which share nothing")
        return Finding(
            "conv", "transposed convolution, as (in, rest)" if layer.transposed else "convolution, as (out, rest)"
        )
    if sum(size > 1 for size in p.shape) <= 1 and not _is_linear(place):
        if _TABLE.search(place.own):
            return Finding("table", "token: a vector in the shape of a matrix")
        return Finding("vector", "a vector in the shape of a matrix")
    if _is_router(place):
        return Finding("router", "router of a mixture of experts")
    if _is_linear(place):
        if "patch" in place.path.lower().split(".")[-2:][0] or "patch_embed" in place.path.lower():
            return Finding("patch", "patch embedding")
        return Finding("hidden", "hidden matrix")
    if isinstance(layer, (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)) and p.ndim == 2:
        return Finding("hidden", "hidden matrix")
    if p.ndim == 3 and _EXPERT_STACKS.match(place.own) and (_EXPERTS.search(kind) or _EXPERTS.search(place.path)):
        return Finding("experts", f"batch of {p.shape[0]} matrices")
    return None


def _raw(place: Place, p: Tensor, uses: Uses | None) -> Finding:
    """A parameter of a layer that nobody knows: by what a call does with it, else by its name."""
    own = place.own if place.own != "weight" else f"{place.word}_weight"
    if uses is not None and place.name in uses.lookups | uses.products | uses.others:
        if place.name in uses.stacks:
            return Finding("experts", f"batch of {p.shape[0]} matrices: a call multiplies by them")
        if place.name in uses.products:
            return Finding("hidden", "hidden matrix: a call multiplies by it")
        if place.name in uses.lookups:
            return Finding("embedding", "embedding: a call takes its rows by number")
        role: RoleT = "position" if _POSITION.search(own) else "vector" if _BIAS.search(own) else "table"
        return Finding(role, "table: a call adds it or multiplies element by element")
    kind = type(place.layer).__name__
    if _POSITION.search(own):
        return Finding("position", "table of positions or types, by its name", True)
    if _BIAS.search(own):
        return Finding("vector", "bias, by its name", True)
    if place.own == "weight" and _EMBEDDING.search(place.word):
        return Finding("embedding", f"embedding, by its name, in a {kind}", True)
    if p.ndim == 3 and _by_head(place.layer, p):
        return Finding("hidden", "hidden matrix, stored by head")
    if _TABLE.search(own) or p.shape[0] == 1:
        return Finding("table", "table, by its name" if p.shape[0] > 1 else "table with a leading axis of one", True)
    if p.ndim == 3 and (_EXPERTS.search(kind) or _EXPERTS.search(place.path)):
        return Finding("experts", f"batch of {p.shape[0]} matrices, by their name", True)
    if p.ndim == 2 and _RAW_PRODUCT.search(own):
        return Finding("hidden", f"hidden matrix, by its name in a {kind}", True)
    return Finding("unknown", f"unknown: a parameter of {kind}, which is no layer that is known", True)


def experts_of_a_bias(place: Place, p: Tensor) -> int:
    """How many experts a 2-D parameter holds the biases of: (E, out) beside a stack of weights (E, ..., out, ...).

    gpt-oss has `gate_up_proj_bias` beside `gate_up_proj`. 0: it is no such parameter.
    """
    if p.ndim != 2 or not place.own.endswith("bias"):
        return 0
    stacks = (w.shape for w in place.layer.parameters(recurse=False) if w.ndim == 3)
    return p.shape[0] if any(p.shape[0] == s[0] and p.shape[1] in s[1:] for s in stacks) else 0


def _by_head(layer: nn.Module, p: Tensor) -> bool:
    """Whether a parameter is (width, heads, size of a head), as XLNet's are."""
    heads = {getattr(layer, name, None) for name in ("n_head", "num_heads", "num_attention_heads")}
    sizes = {getattr(layer, name, None) for name in ("d_head", "head_dim", "attention_head_size")}
    return p.shape[1] in heads and p.shape[2] in sizes


def _is_router(place: Place) -> bool:
    if place.own != "weight":
        return False
    if any(re.search(r"Router|TopK|MoEGate", type(module).__name__) for module in (place.layer, place.parent)):
        return True
    if not _ROUTER.match(place.word):
        return False
    owned = (*place.parent._modules, *place.parent._parameters)
    return any("expert" in name.lower() for name in (*owned, *vars(place.parent)))


def _is_patch(place: Place, first: int) -> bool:
    """Whether a convolution cuts the model's own input into pieces."""
    layer = place.layer
    assert isinstance(layer, nn.modules.conv._ConvNd)
    if layer.transposed or layer.in_channels != first or layer.in_channels > 16:
        return False
    apart = layer.kernel_size == layer.stride and max(layer.kernel_size) > 1
    above = [part for part in place.path.split(".")[:-1] if not part.isdigit()]
    return apart or "patch" in "".join(above[-1:]).lower()


def _heads(
    where: Sequence[Place],
    modules: Mapping[str, nn.Module],
    found: Mapping[str, Finding],
    uses: Uses | None,
    tied: bool,
) -> dict[str, Finding]:
    """Which of the layers are output heads."""
    names = {id(place.p): place.name for place in where}
    heads: dict[str, Finding] = {}
    for module in modules.values():
        get_head = getattr(module, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        weight = getattr(head, "weight", None)
        if isinstance(weight, Tensor) and (name := names.get(id(weight))) and found[name].role != "embedding":
            heads[name] = Finding("head", "output head: named by get_output_embeddings()")
    may_be = [place for place in where if found[place.name].role in ("hidden", "conv") and place.own == "weight"
              and (_is_linear(place) or _is_conv(place.layer))]  # fmt: skip
    if uses is not None:
        repeated = _repeated(modules)
        leaving = {place.path for place in may_be if place.name in uses.heads and not _inside(place.path, repeated)}
        for place in may_be:
            if place.path in leaving and "pooler" not in place.path:
                heads.setdefault(place.name, Finding("head", "output head: what it computes leaves the model"))
        return heads
    repeated = {path for path in _repeated(modules) if not any(map(_HEAD.match, path.split(".")))}
    outside = [place for place in may_be if not _inside(place.path, repeated)]
    linear = [place for place in outside if _is_linear(place)]
    by_name: dict[str, Place] = {}
    for place in outside:
        if (named := _named_head(place)) is not None:
            by_name[named] = place  # the last layer of what has the name
    # In "decode_head.classifier" the inner name decides, unless something comes after it.
    order = {place.name: k for k, place in enumerate(outside)}
    decisive = {
        path
        for path, place in by_name.items()
        if not any(
            other.startswith(path + ".") and order[last.name] > order[place.name] for other, last in by_name.items()
        )
    }
    lasts = {
        by_name[path].path: path for path in decisive if not _NOT_LAST.search(by_name[path].path.removeprefix(path))
    }
    said = {place.name: lasts[place.path] for place in outside if place.path in lasts}
    # A hidden layer may well be as wide as a table has rows, but hardly of its shape too, or the last.
    tables = {place.name: place.p.shape for place in where if found[place.name].role == "embedding"}
    rows = {shape[0]: name for name, shape in reversed(tables.items())}
    alike = [place for place in linear if place.p.shape in tables.values()
             or (place is linear[-1] and place.p.shape[0] in rows)]  # fmt: skip
    if alike and not heads and not tied:
        table = rows[alike[-1].p.shape[0]]
        reason = f"output head: as many rows as the embedding {table!r}"
        heads[alike[-1].name] = Finding("head", reason, len(alike) > 1 and alike[-1].name not in said)
    for name, path in said.items():
        heads.setdefault(name, Finding("head", f"output head, by the name {path!r}", True))
    if heads or tied:
        return heads
    last = (linear or outside)[-1:] if sum(place.p.ndim >= 2 for place in where) > 1 else []
    if last and last[0].path.count(".") <= 1 and not (_NOT_LAST.search(last[0].path) or _HIDDEN.search(last[0].word)):
        kind = "linear layer" if linear else "convolution"
        heads[last[0].name] = Finding("head", f"output head: the last {kind} of the model", True)
    return heads


def _named_head(place: Place) -> str | None:
    """The path of the innermost module that has the name of a head and holds a layer, or is it."""
    parts = place.path.split(".")
    if len(parts) == 1 and _TOP_HEAD.match(place.path):
        return place.path
    for depth in reversed(range(len(parts))):
        if _HEAD.match(parts[depth]) and not (depth < len(parts) - 1 and _is_conv(place.layer)):
            numbered = "heads" in parts[depth] and depth + 1 < len(parts) and parts[depth + 1].isdigit()
            return ".".join(parts[: depth + 1 + numbered])
    return None


def _repeated(modules: Mapping[str, nn.Module]) -> set[str]:
    """Paths of blocks that stand beside one another, in a list or as a sequence of their kind: a model's trunk."""
    found: set[str] = set()
    for path, module in modules.items():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        blocks: dict[type, list[str]] = {}
        for name, child in module.named_children():
            if child._modules:
                blocks.setdefault(type(child), []).append(plain_path(f"{path}.{name}" if path else name))
        least = 1 if isinstance(module, nn.ModuleList) else 2  # a list is made for more, whatever it holds now
        found |= {name for same in blocks.values() if len(same) >= least for name in same}
    return found


def _inside(path: str, blocks: set[str]) -> bool:
    while path:
        if path in blocks:
            return True
        path = path.rpartition(".")[0]
    return False
