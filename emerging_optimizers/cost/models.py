"""The weights of language models by their sizes: names, shapes, how often, and along which axis they are cut."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

COLUMNS, ROWS = 0, 1  # the axis of a weight (out, in) that ColwiseParallel and RowwiseParallel cut


class Weight(NamedTuple):
    """Parameters that are alike.

    Attributes:
        name: what they are.
        shape: of each; three axes are a stack of experts.
        number: how many there are.
        is_hidden: they are matrices for a matrix optimizer; otherwise its companion has them.
        cut: the axis along which tensor parallelism cuts them; None: every process of it has a copy.
        used: the share of their products that a token takes part in.
    """

    name: str
    shape: tuple[int, ...]
    number: int
    is_hidden: bool = True
    cut: int | None = None
    used: float = 1.0

    @property
    def numel(self) -> int:
        """Elements of one."""
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A transformer that predicts the next token. A file has these fields as its keys.

    Attributes:
        layers: how many.
        width: of the residual stream.
        heads: of attention.
        vocabulary: tokens.
        kv_heads: heads of keys and values; None: as many as `heads`.
        head_size: of keys and values; None: width / heads.
        hidden: of a feed-forward layer; None: four times the width.
        gated: it has a gate beside up and down.
        tied: the head is the embedding table.
        biases: every matrix of a layer has one, and norms have a shift; so GPT-2.
        positions: of a learned table; 0: there is none.
        experts: of a layer; 0: no mixture.
        expert_hidden: of an expert; None: `hidden`.
        experts_used: by a token.
        experts_shared: by all tokens, as one that is so many times as large.
        dense_layers: the first ones, which have no experts.
        q_rank: of the latent queries; 0: attention is not latent. Then it is DeepSeek's.
        kv_rank: of the latent keys and values.
        rotary: how much longer queries and keys are than values, in latent attention.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int
    kv_heads: int | None = None
    head_size: int | None = None
    hidden: int | None = None
    gated: bool = True
    tied: bool = False
    biases: bool = False
    positions: int = 0
    experts: int = 0
    expert_hidden: int | None = None
    experts_used: int = 1
    experts_shared: int = 0
    dense_layers: int = 0
    q_rank: int = 0
    kv_rank: int = 0
    rotary: int = 0

    def weights(self) -> list[Weight]:
        """All of them, those without an element left out.

        Example:
            >>> tiny = Decoder(layers=2, width=8, heads=2, vocabulary=50)
            >>> [(w.name, w.shape, w.number) for w in tiny.weights() if w.is_hidden][:2]
            [('q', (8, 8), 2), ('o', (8, 8), 2)]
        """
        dense = self.dense_layers if self.experts else self.layers
        hidden = self.hidden or 4 * self.width
        tables = [
            Weight("embedding", (self.vocabulary, self.width), 1, False, COLUMNS, float(self.tied)),
            Weight("head", (self.vocabulary, self.width), 0 if self.tied else 1, False, COLUMNS),
            Weight("positions", (self.positions, self.width), 1, False, None, 0.0),
        ]
        found = [
            *(self._latent_attention() if self.q_rank else self._attention()),
            *self._feed_forward("", dense, (hidden,)),
            *self._experts(self.layers - dense),
            *tables,
            *self._vectors(dense, hidden),
        ]
        return [weight for weight in found if weight.number and weight.numel]

    def _attention(self) -> list[Weight]:
        size = self.head_size or self.width // self.heads
        q, kv = self.heads * size, (self.kv_heads or self.heads) * size
        return [
            Weight("q", (q, self.width), self.layers, cut=COLUMNS),
            Weight("o", (self.width, q), self.layers, cut=ROWS),
            Weight("k", (kv, self.width), self.layers, cut=COLUMNS),
            Weight("v", (kv, self.width), self.layers, cut=COLUMNS),
        ]

    def _latent_attention(self) -> list[Weight]:
        size = self.head_size or self.width // self.heads
        q, kv, out = ((size + extra) * self.heads for extra in (self.rotary, size, 0))
        return [
            Weight("q down", (self.q_rank, self.width), self.layers),
            Weight("q up", (q, self.q_rank), self.layers, cut=COLUMNS),
            Weight("kv down", (self.kv_rank + self.rotary, self.width), self.layers),
            Weight("kv up", (kv, self.kv_rank), self.layers, cut=COLUMNS),
            Weight("o", (self.width, out), self.layers, cut=ROWS),
        ]

    def _feed_forward(self, of: str, count: int, sizes: tuple[int, ...], used: float = 1.0) -> list[Weight]:
        """Of a hidden size, or of (experts, hidden size)."""
        *stack, hidden = sizes
        wide, back = (*stack, hidden, self.width), (*stack, self.width, hidden)
        first = len(stack)
        names = ("gate", "up") if self.gated else ("up",)
        return [
            *(Weight(f"{of}{name}", wide, count, cut=COLUMNS + first, used=used) for name in names),
            Weight(f"{of}down", back, count, cut=ROWS + first, used=used),
        ]

    def _experts(self, count: int) -> list[Weight]:
        if not self.experts:
            return []
        size = self.expert_hidden or self.hidden or 4 * self.width
        return [
            *self._feed_forward("experts' ", count, (self.experts, size), self.experts_used / self.experts),
            *self._feed_forward("shared experts' ", count, (self.experts_shared * size,)),
            Weight("router", (self.experts, self.width), count),
        ]

    def _vectors(self, dense: int, hidden: int) -> list[Weight]:
        """Norms, with shifts or without, and biases."""
        norms = (2 * self.layers + 1) * (2 if self.biases else 1)
        found = [
            Weight("norms", (self.width,), norms, False),
            Weight("norms of latent queries", (self.q_rank,), self.layers, False),
            Weight("norms of latent keys", (self.kv_rank,), self.layers, False),
        ]
        if self.biases:
            wide = COLUMNS
            found += [
                Weight("biases of q, k, v", (self.width,), 3 * self.layers, False, wide),
                Weight("biases of o and down", (self.width,), self.layers + dense, False),
                Weight("biases of up", (hidden,), dense, False, wide),
            ]
        return found


MODELS: Mapping[str, Decoder] = {
    "gpt2-small": Decoder(
        layers=12, width=768, heads=12, vocabulary=50257, gated=False, tied=True, biases=True, positions=1024
    ),
    "llama-7b": Decoder(layers=32, width=4096, heads=32, vocabulary=32000, hidden=11008),
    "llama-70b": Decoder(layers=80, width=8192, heads=64, kv_heads=8, vocabulary=32000, hidden=28672),
    # The sizes of DeepSeek-V3 without its layer that predicts a second token.
    "moe-256": Decoder(
        layers=61, width=7168, heads=128, head_size=128, vocabulary=129280, hidden=18432, experts=256,
        expert_hidden=2048, experts_used=8, experts_shared=1, dense_layers=3, q_rank=1536, kv_rank=512, rotary=64,
    ),
}  # fmt: skip


def read_model(name: str) -> Decoder:
    """A model of the table, or of a file.

    Args:
        name: a key of `MODELS`, or the path of a .json or .toml file whose keys are the fields of `Decoder`.

    Raises:
        ValueError: neither; or the file says something that a model does not have.

    Example:
        >>> read_model("llama-7b").width
        4096
    """
    if name in MODELS:
        return MODELS[name]
    path = Path(name)
    readers: dict[str, Any] = {".json": json.loads, ".toml": tomllib.loads}
    if path.suffix not in readers or not path.is_file():
        raise ValueError(
            f"model {name!r} is not one of {', '.join(MODELS)}, nor a .json or .toml file that is there; such a file "
            "has layers, width, heads, vocabulary, and what else `Decoder` has"
        )
    try:
        said = readers[path.suffix](path.read_text())
    except ValueError as wrong:
        raise ValueError(f"model {name!r} cannot be read: {wrong}") from None
    return _checked(name, said)


def _checked(name: str, said: Any) -> Decoder:
    if not isinstance(said, dict):
        raise ValueError(f"model {name!r} is no table of names and numbers")
    kinds = {field.name: bool if field.type is bool else int for field in fields(Decoder)}
    for key, value in said.items():
        if key not in kinds:
            near = get_close_matches(key, kinds, 1)
            raise ValueError(
                f"model {name!r} says {key!r}, which is none of {', '.join(kinds)}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
        if type(value) is not kinds[key] or value < 0:
            wanted = "true or false" if kinds[key] is bool else "a whole number from 0 on"
            raise ValueError(f"model {name!r} says {key} = {value!r}; it must be {wanted}")
    needed = ("layers", "width", "heads", "vocabulary")
    if missing := [key for key in needed if not said.get(key)]:
        raise ValueError(f"model {name!r} lacks {', '.join(missing)}; it needs {', '.join(needed)}, each at least 1")
    model = Decoder(**said)
    if model.head_size is None and model.width % model.heads:
        raise ValueError(
            f"model {name!r}: width {model.width} cannot be split into {model.heads} equal heads; give head_size"
        )
    return model
