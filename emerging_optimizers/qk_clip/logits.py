"""The largest logit of each head, seen where a module calls torch's attention or its softmax."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from emerging_optimizers.distributed.dtensor import local_of
from emerging_optimizers.engine.ambient import eager
from emerging_optimizers.qk_clip.attention import Attention

# Elements of the logits that are computed at once. On a CPU they stay in the cache (of 2^18 to 2^24 the fastest, for
# sequences of 512 and 2048); elsewhere 256 MiB in float32, so that launches are few. LEAST: queries in any case.
CHUNK_CPU, CHUNK, LEAST = 2**20, 2**26, 16
_unflatten: Callable[..., Tensor] = torch.unflatten  # untyped in torch


def largest_logits(
    q_BHSD: Tensor, k_BGTD: Tensor, scale: float, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """The largest of scale * <q, k> of each query head, over what is not masked.

    Args:
        q_BHSD: queries.
        k_BGTD: keys; each of the G heads serves H / G query heads that follow one another.
        scale: of the logits.
        mask: broadcast to (B, H, S, T); True, or a number that is not as good as -inf, where a query sees a key.
        is_causal: query i sees keys 0 to i alone.

    Returns:
        H numbers in float32; -inf where a head has no logit. Half precision is multiplied as it is, with the rounding
        of its products, float16 in float32, since products of this size overflow there.

    Example:
        >>> q = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
        >>> largest_logits(q, torch.tensor([3.0, 5.0]).view(1, 1, 2, 1), scale=0.5)
        tensor([2.5000, 5.0000])
    """
    B, H, S, _ = q_BHSD.shape
    G, T = k_BGTD.shape[1:3]
    found_H = q_BHSD.new_full((H,), -torch.inf, dtype=torch.float32)
    if 0 in (*q_BHSD.shape, T):
        return found_H
    if q_BHSD.dtype == torch.float16:
        q_BHSD, k_BGTD = q_BHSD.float(), k_BGTD.float()
    q_BGrSD, k_BG1DT = _unflatten(q_BHSD, 1, (G, H // G)), k_BGTD.unsqueeze(2).mT
    seen_BGrST = None if mask is None else _unflatten(_seen(mask).expand(B, H, S, T), 1, (G, H // G))
    step = max(LEAST, (CHUNK_CPU if q_BHSD.device.type == "cpu" else CHUNK) // (B * H * T))
    for start in range(0, S, step):
        stop = min(start + step, S)
        last = min(stop, T) if is_causal else T
        logits = q_BGrSD[..., start:stop, :] @ k_BG1DT[..., :last]
        if is_causal:
            sees = torch.ones(stop - start, last, dtype=torch.bool, device=logits.device).tril(start)
            logits.masked_fill_(~sees, -torch.inf)
        if seen_BGrST is not None:
            logits.masked_fill_(~seen_BGrST[..., start:stop, :last], -torch.inf)
        found_H = torch.maximum(found_H, logits.amax((0, -2, -1)).flatten().float())
    return found_H * scale


def _seen(mask: Tensor) -> Tensor:
    """Where a mask lets a query see a key; what a finite one adds is no product of queries and keys."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


class Sight(TorchFunctionMode):
    """Looks at the attention that is called inside of modules, and changes nothing.

    Attributes:
        inside: the modules that are being called, the innermost last.

    Args:
        rows: how many sequences of each batch are looked at, from the first on; None: all.
    """

    def __init__(self, rows: int | None) -> None:
        super().__init__()
        self.rows = rows
        self.inside: list[Attention] = []
        self._looking = ExitStack()

    def enter(self, attention: Attention) -> None:
        """A module is called."""
        if not self.inside:  # one that is inside of another is seen by the same
            self._looking.enter_context(self)
        self.inside.append(attention)

    def leave(self) -> None:
        """It has returned."""
        self.inside.pop()
        if not self.inside:
            self.close()

    def close(self) -> None:
        """Whatever was called is over."""
        self.inside.clear()
        self._looking.close()

    @eager  # what it looks at runs as it is; the layers around are compiled
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LOOKS:
            self._look(func, args, kwargs)
        return func(*args, **kwargs)

    def _look(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        attention = self.inside[-1]
        with torch.no_grad():
            maxima = _LOOKS[func](attention, self.rows, *args, **kwargs)
        if maxima is not None:
            attention.looks += 1
            attention.record(maxima)


def _dot_products(
    attention: Attention,
    rows: int | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `scaled_dot_product_attention` is given."""
    if query.is_nested:
        raise ValueError(
            f"QKClip: {attention.called} works on nested tensors, into which QKClip does not look; use measure=False "
            "and give the largest logit of each head with observe()"
        )
    if query.shape[-1] != attention.head_dim:
        raise ValueError(
            f"QKClip: queries of {attention.called} have {query.shape[-1]} elements a head, and its projection "
            f"{attention.head_dim} rows a head, as it seems; say it with projections=, or use measure=False and give "
            "the largest logit of each head with observe()"
        )
    scale = attention.head_dim**-0.5 if scale is None else scale
    q, k = map(local_of, (query, key))
    mask = None if attn_mask is None else _as_told(local_of(attn_mask))
    if q.ndim > 4:  # what is the same for several of its sequences is said for each
        k, mask = k.expand(*q.shape[:-3], *k.shape[-3:]), None if mask is None else mask.expand(*q.shape[:-2], -1, -1)
    q, k, mask = _in_four(q), _in_four(k), None if mask is None else _in_four(mask)
    if mask is not None and mask.shape[0] > 1:
        mask = mask[:rows]
    with torch.autocast(q.device.type, enabled=False):
        return largest_logits(q[:rows], k[:rows].to(q.dtype), scale, mask, is_causal)


def _in_four(x: Tensor) -> Tensor:
    """Axes in front of (H, S, D) are one batch."""
    return x.flatten(0, -4) if x.ndim >= 4 else x[(None,) * (4 - x.ndim)]


def _as_told(mask: Tensor) -> Tensor:
    """Where torch's own causal biases, which hold no numbers, show a key."""
    if type(mask).__name__ != "CausalBias":  # to import it takes seconds
        return mask
    bias: Any = mask
    S, T = bias.seq_len_q, bias.seq_len_kv
    below = T - S if bias.variant.name == "LOWER_RIGHT" else 0
    return torch.ones(S, T, dtype=torch.bool, device=mask.device).tril(below)


def _weights(
    attention: Attention, rows: int | None, input: Tensor, dim: int | None = None, *_: Any, **__: Any
) -> Tensor | None:
    """What a softmax is given; None for one over something else than the logits (B, H, S, T)."""
    x = local_of(input)
    if x.ndim != 4 or dim not in (-1, 3) or attention.heads % x.shape[1] or not x.numel():
        return None
    return x[:rows].amax((0, 2, 3)).float()


@cache
def _signature() -> inspect.Signature:
    return inspect.signature(F.multi_head_attention_forward)


def _multi_head(attention: Attention, rows: int | None, *args: Any, **kwargs: Any) -> Tensor:
    """What `nn.MultiheadAttention` is given: its projections are made once more, since torch shows nothing within."""
    bound = _signature().bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    H, query, key = given["num_heads"], given["query"], given["key"]
    if given["use_separate_proj_weight"]:
        W_q, W_k = given["q_proj_weight"], given["k_proj_weight"]
    else:
        W_q, W_k, _ = given["in_proj_weight"].chunk(3)
    b_q, b_k, _ = (None,) * 3 if given["in_proj_bias"] is None else given["in_proj_bias"].chunk(3)
    if query.ndim == 2:
        query, key = query[:, None], key[:, None]
    q_SBE, k_TBE = F.linear(query[:, :rows], W_q, b_q), F.linear(key[:, :rows], W_k, b_k)
    T, B = k_TBE.shape[:2]
    if (bias_k := given["bias_k"]) is not None:
        k_TBE = torch.cat([k_TBE, bias_k.to(k_TBE.dtype).expand(1, B, -1)])
    if given["add_zero_attn"]:
        k_TBE = torch.cat([k_TBE, torch.zeros_like(k_TBE[:1])])
    q_BHSD, k_BHTD = (_unflatten(x, 2, (H, -1)).permute(1, 2, 0, 3) for x in (q_SBE, k_TBE))
    hidden: list[Tensor] = []
    if (mask := given["attn_mask"]) is not None:
        hidden.append((_unflatten(mask, 0, (-1, H))[:rows] if mask.ndim == 3 else mask[None, None]).expand(B, H, -1, T))
    if (mask := given["key_padding_mask"]) is not None:
        hidden.append(mask.reshape(-1, 1, 1, T)[:rows].expand(B, H, len(q_SBE), T))
    sees = None
    for mask in hidden:  # True hides here, where in the other call it shows
        shows = ~mask if mask.dtype == torch.bool else _seen(mask)
        sees = shows if sees is None else sees & shows
    if sees is not None and (added := len(k_TBE) - T):
        sees = F.pad(sees, (0, added), value=True)
    with torch.autocast(query.device.type, enabled=False):
        return largest_logits(q_BHSD, k_BHTD, q_BHSD.shape[-1] ** -0.5, sees)


_LOOKS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.scaled_dot_product_attention: _dot_products,
    F.multi_head_attention_forward: _multi_head,
    F.softmax: _weights,
    torch.softmax: _weights,
    torch.special.softmax: _weights,
    Tensor.softmax: _weights,
}
