"""Which modules of a model are attention, and which rows of their projections belong to which head.

Modules are recognised by the names of their layers and by their sizes, so that the library which defines them need not
be installed. How fused projections lie is asked of `routing.layouts`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from emerging_optimizers.engine.options import COUNT, WHOLE, Check, optional
from emerging_optimizers.engine.validate import check_group
from emerging_optimizers.qk_clip.attention import KEY, QUERY, ROTARY, Attention, Span, called
from emerging_optimizers.routing.layouts import FUSED_ATTENTION, INTERLEAVED_ATTENTION, layout
from emerging_optimizers.routing.layouts import _number as number_of
from emerging_optimizers.routing.places import Place, plain_path

PAIRS = (
    ("q_proj", "k_proj"),
    ("query", "key"),
    ("q", "k"),
    ("wq", "wk"),
    ("to_q", "to_k"),
    ("q_lin", "k_lin"),
    ("query_proj", "key_proj"),
)
# Latent attention: queries out of their latent, or out of the input where they have none; keys and values.
LATENT_QUERIES = ("q_b_proj", "q_proj", "wq_b", "wq", "linear_q_up_proj", "linear_q_proj")
LATENT_KEYS = ("kv_b_proj", "wkv_b", "linear_kv_up_proj")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
# The argument of `Heads` that says where queries or keys are made.
LAYER = Check(
    lambda v: (
        isinstance(v, str) or (isinstance(v, tuple) and len(v) == 2 and isinstance(v[0], str) and WHOLE.holds(v[1]))
    ),
    "the name of a layer, or (name, first row) with a row >= 0",
)
# A norm of queries or keys behind their projections; those of latents (`q_a_layernorm`) stand before.
_NAME, _KIND = "(q|k|qk|query|key)", "((layer|rms|l2)?_?norm|ln)"
_NORM = re.compile(f"{_NAME}_?{_KIND}|{_KIND}_?{_NAME}")
LOOKED_FOR = (
    f"torch.nn.MultiheadAttention; layers {', '.join('/'.join(pair) for pair in PAIRS)}; fused ones called "
    f"{', '.join((*FUSED_ATTENTION, *INTERLEAVED_ATTENTION))}; latent attention with {', '.join(LATENT_KEYS)}"
)


@dataclass(frozen=True)
class Heads:
    """Where the heads of an attention module lie, for one that QKClip does not recognise.

    Args:
        heads: H, how many query heads.
        query: the linear layer that makes queries, by its name within the module; or (name, first row), where it makes
            more than that. Heads lie one below another.
        key: the same of keys.
        key_heads: G, how many key heads, of which H is a multiple; None: what the rows of the key layer say, or H
            where it makes more than keys.
        head_dim: rows of a head; None: the query layer's rows over H.

    Example:
        >>> Heads(8, query="to_query", key="to_key")
        Heads(heads=8, query='to_query', key='to_key', key_heads=None, head_dim=None)
        >>> fused = Heads(8, query=("qkv", 0), key=("qkv", 512), key_heads=2, head_dim=64)
    """

    heads: int
    query: str | tuple[str, int]
    key: str | tuple[str, int]
    key_heads: int | None = None
    head_dim: int | None = None

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("key_heads", "head_dim"), optional(COUNT))
        check_group("Heads", "its arguments", vars(self), {"heads": COUNT, "query": LAYER, "key": LAYER, **sizes})


class _Unfit(Exception):
    """Why a module that looks like attention cannot be clipped."""


def find(
    model: nn.Module, projections: Mapping[str, Heads] | None, heads: int | None
) -> tuple[list[Attention], dict[str, str]]:
    """The attention modules of a model, and of those that cannot be clipped the reason.

    Raises:
        ValueError: there is none, a pattern of `projections` matches no module, or two share a parameter.
    """
    modules = _by_path(model)
    found: list[Attention] = []
    skipped: dict[str, str] = {}
    if projections is None:
        for path, module in modules.items():
            try:
                attention = _recognise(path, module, heads)
            except _Unfit as reason:
                skipped[path] = str(reason)
            else:
                found += [] if attention is None else [attention]
    else:
        found = _as_given(modules, projections)
    if not found:
        reasons = "".join(f"; {line}" for line in in_words(skipped))
        raise ValueError(
            f"QKClip: {type(model).__name__} has no attention module whose heads could be clipped{reasons}. Looked "
            f"for: {LOOKED_FOR}. Say where heads lie: projections={{'blocks.*.attention': Heads(8, query='wq', "
            "key='wk')}"
        )
    _check_shared(found)
    return found, skipped


def _by_path(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by their paths without wrappers, of which DistributedDataParallel calls what it wraps `module`."""
    wrapper = [name for name, _ in model.named_children()] == ["module"]
    found = {}
    for path, module in model.named_modules():
        first, _, rest = path.partition(".")
        own = first == "module" and not wrapper
        found[f"module.{plain_path(rest)}".rstrip(".") if own else plain_path(path)] = module
    return found


def in_words(skipped: Mapping[str, str]) -> list[str]:
    """A line for each reason, with the modules for which it holds."""
    paths: dict[str, list[str]] = {}
    for path, reason in skipped.items():
        paths.setdefault(reason, []).append(path)
    return [
        f"{', '.join(map(called, some[:2]))}{f' and {len(some) - 2} more' if len(some) > 2 else ''}: {reason}"
        for reason, some in paths.items()
    ]


def _as_given(modules: Mapping[str, nn.Module], projections: Mapping[str, Heads]) -> list[Attention]:
    if not (isinstance(projections, Mapping) and all(isinstance(x, Heads) for x in projections.values())):
        raise TypeError(
            f"QKClip: projections={projections!r} is not allowed; give a dictionary from paths of modules to `Heads`"
        )
    found: list[Attention] = []
    for pattern, heads in projections.items():
        paths = [path for path in modules if fnmatchcase(path, pattern)]
        if not paths:
            raise ValueError(f"QKClip: projections names {pattern!r}, which is the path of no module of the model")
        for path in paths:
            if any(attention.name == path for attention in found):
                raise ValueError(
                    f"QKClip: projections[{pattern!r}] and a pattern before it both match {called(path)}; give one"
                )
            try:
                found.append(_explicit(path, modules[path], heads))
            except _Unfit as reason:
                raise ValueError(f"QKClip: projections[{pattern!r}] does not fit {called(path)}: {reason}") from None
    return found


def _check_shared(found: list[Attention]) -> None:
    owners: dict[int, str] = {}
    for attention in found:
        for rows in attention.rows:
            other = owners.setdefault(id(rows.parameter), attention.name)
            if other != attention.name:
                raise ValueError(
                    f"QKClip: {called(other)} and {attention.called} share {rows.name}, which would be scaled for "
                    "both; give one of them with projections="
                )


# ---- kinds of attention -----------------------------------------------------------------------------------------


def _recognise(path: str, module: nn.Module, heads: int | None) -> Attention | None:
    for kind in (_multi_head, _latent, _fused, _separate):
        if (attention := kind(path, module, heads)) is not None:
            return attention
    return None


def _multi_head(path: str, module: nn.Module, _: int | None) -> Attention | None:
    if not isinstance(module, nn.MultiheadAttention):
        return None
    H, D = module.num_heads, module.head_dim
    attention = Attention(path, module, H, H, D)
    query, key = Span(QUERY, 1, 0, H, D), Span(KEY, 1, H * D, H, D)
    alone = key._replace(offset=0)
    if module.in_proj_weight is not None:
        attention.add(path, module, "in_proj_weight", 0, [query, key])
    else:
        attention.add(path, module, "q_proj_weight", 0, [query])
        attention.add(path, module, "k_proj_weight", 0, [alone])
    if module.in_proj_bias is not None:
        attention.add(path, module, "in_proj_bias", 0, [query, key])
    if module.bias_k is not None:
        attention.add(path, module, "bias_k", 2, [alone])
    return attention


def _latent(path: str, module: nn.Module, _: int | None) -> Attention | None:
    keys = _child(module, LATENT_KEYS)
    if keys is None:
        return None
    queries = _child(module, LATENT_QUERIES)
    if queries is None:
        raise _Unfit(f"it has {keys}, and none of {', '.join(LATENT_QUERIES)}")
    nope, rope = (
        number_of(module, "qk_nope_head_dim", "qk_head_dim"),
        number_of(module, "qk_rope_head_dim", "qk_pos_emb_head_dim"),
    )
    values = number_of(module, "v_head_dim")
    q_rows, kv_rows = (_projection(module, name)[1] for name in (queries, keys))
    H, rest = divmod(q_rows, nope + rope) if nope else (0, 1)
    if rest or kv_rows != H * (nope + values):
        raise _Unfit(
            f"{queries} has {q_rows} rows and {keys} {kv_rows}, which {nope} + {rope} for a query and {nope} + "
            f"{values} for key and value do not make up"
        )
    attention = Attention(path, module, H, H, nope + rope)
    rotary = [Span(ROTARY, H, nope, 1, rope)] if rope else []
    _add(attention, queries, [Span(QUERY, H, 0, 1, nope), *rotary])
    _add(attention, keys, [Span(KEY, H, 0, 1, nope)])
    return attention


def _fused(path: str, module: nn.Module, heads: int | None) -> Attention | None:
    name = _child(module, (*FUSED_ATTENTION, *INTERLEAVED_ATTENTION))
    if name is None:
        return None
    _refuse_norms(module)
    layer, rows, axis = _projection(module, name)
    weight = layer._parameters["weight"]
    assert weight is not None
    place = Place(f"{path}.{name}.weight", weight, f"{path}.{name}", layer, "weight", module)
    view, what = layout(place, weight)
    if not (isinstance(view, tuple) and what.removeprefix("stored as (in, out), ").startswith("query")):
        raise _Unfit(f"how query and key lie in {name} is not known")
    kind, *sizes = view[1:] if axis else view
    if len(sizes) < 3 or "key and value" not in what:
        raise _Unfit(f"{name} makes {what}")
    queries, keys, begin = sizes[0], sizes[-2], sum(sizes[:-2])
    if kind == "split":
        H = _heads(module, heads, queries)
        D, periods = queries // H, 1
    else:
        D, periods = keys, rows // sum(sizes)
    if queries % D or keys % D or (queries // D) % (keys // D):
        raise _Unfit(f"{queries} rows of queries and {keys} of keys in {name} do not make heads of {D}")
    attention = Attention(path, module, periods * queries // D, periods * keys // D, D)
    _add(
        attention,
        name,
        [Span(QUERY, periods, 0, queries // D, D), Span(KEY, periods, begin, keys // D, D)],
    )
    return attention


def _separate(path: str, module: nn.Module, heads: int | None) -> Attention | None:
    pair = next((pair for pair in PAIRS if all(module._modules.get(name) is not None for name in pair)), None)
    if pair is None:
        return None
    _refuse_norms(module)
    H = _heads(module, heads, _projection(module, pair[0])[1])
    return _explicit(path, module, Heads(H, *pair))


def _explicit(path: str, module: nn.Module, heads: Heads) -> Attention:
    (query, first_q), (key, first_k) = _layer(heads.query), _layer(heads.key)
    q_rows, k_rows = (_projection(module, name)[1] for name in (query, key))
    H, D = heads.heads, heads.head_dim or q_rows // heads.heads
    G = heads.key_heads or (H if isinstance(heads.key, tuple) else k_rows // max(1, D))
    if min(H, D, G) < 1 or H % G or first_q + H * D > q_rows or first_k + G * D > k_rows:
        raise _Unfit(
            f"{H} query heads and {G} key heads of {D} rows do not fit {query} with {q_rows} rows from {first_q} on "
            f"and {key} with {k_rows} from {first_k} on"
        )
    if isinstance(heads.query, str) and q_rows != H * D:
        raise _Unfit(f"{H} heads of {D} rows are not the {q_rows} rows of {query}; give (name, first row)")
    if isinstance(heads.key, str) and k_rows != G * D:
        raise _Unfit(f"{G} key heads of {D} rows are not the {k_rows} rows of {key}; give (name, first row)")
    if query == key and first_q < first_k + G * D and first_k < first_q + H * D:
        raise _Unfit(
            f"rows {first_q} to {first_q + H * D} of {query} are given for queries, and {first_k} to "
            f"{first_k + G * D} for keys; a row cannot be both"
        )
    attention = Attention(path, module, H, G, D)
    spans = {query: [Span(QUERY, 1, first_q, H, D)]}
    spans.setdefault(key, []).append(Span(KEY, 1, first_k, G, D))
    for name, places in spans.items():
        _add(attention, name, places)
    return attention


# ---- their layers -----------------------------------------------------------------------------------------------


def _child(module: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if module._modules.get(name) is not None), None)


def _layer(layer: str | tuple[str, int]) -> tuple[str, int]:
    return (layer, 0) if isinstance(layer, str) else layer


def _projection(module: nn.Module, name: str) -> tuple[nn.Module, int, int]:
    """A linear layer, how many rows it has, and the axis of its weight along which they lie."""
    layer: nn.Module | None = module._modules.get(name)
    if layer is None:
        raise _Unfit(f"{type(module).__name__} has no layer {name!r}; it has {', '.join(module._modules) or 'none'}")
    weight = layer._parameters.get("weight")
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        raise _Unfit(f"{name} is a {type(layer).__name__}, whose weight is not one matrix that could be scaled by rows")
    axis = int(type(layer).__name__ == "Conv1D")  # GPT-2's, stored as (in, out)
    return layer, weight.shape[axis], axis


def _add(attention: Attention, name: str, spans: list[Span]) -> None:
    layer, _, axis = _projection(attention.module, name)
    attention.add(f"{attention.name}.{name}", layer, "weight", axis, spans)
    if layer._parameters.get("bias") is not None:
        attention.add(f"{attention.name}.{name}", layer, "bias", 0, spans)


def _heads(module: nn.Module, heads: int | None, rows: int) -> int:
    found = heads or number_of(module, *HEADS)
    if not found:
        raise _Unfit(f"how many heads it has is not known: none of {', '.join(HEADS)} is set; give heads=")
    size = number_of(module, "head_dim")
    if rows % found or (size and rows != found * size):
        raise _Unfit(f"{found} heads{f' of {size}' if size else ''} do not make up the {rows} rows of queries")
    return found


def _refuse_norms(module: nn.Module) -> None:
    norms = [
        name
        for name, child in module._modules.items()
        if child is not None and _NORM.fullmatch(name.lower()) and not isinstance(child, nn.Identity)
    ]
    if norms:
        raise _Unfit(
            f"it normalises queries or keys after the projection ({', '.join(norms)}), so the size of the projection "
            "does not reach the logits: there is nothing to clip"
        )
