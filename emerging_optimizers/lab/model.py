"""A small GPT in plain PyTorch: pre-norm, no biases, an untied head.

Query, key, value and output are four matrices, not one fused: a matrix optimizer then sees each linear map
as itself.

Shapes: B batch, T time, H heads, K width of a head, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emerging_optimizers.lab.data import seeded


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Mixes information from earlier positions into each position."""
        q, k, v = (
            linear(x_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B H T K
            for linear in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # B H T K
        return self.output(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each on a normalized copy of the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """One layer of the residual stream."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        return x_BTD + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x_BTD))))


class GPT(nn.Module):
    """Predicts the next character."""

    def __init__(self, *, vocabulary: int, context: int, width: int, depth: int, heads: int, seed: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self._initialize(seed)

    @torch.no_grad()
    def _initialize(self, seed: int) -> None:
        """Normal weights of deviation 0.02, smaller where a block writes to the residual stream (GPT-2)."""
        generator = seeded(seed, 0)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                writes = name.endswith(("attention.output.weight", "mlp_out.weight"))
                parameter.normal_(0, 0.02 / (2 * len(self.blocks)) ** 0.5 if writes else 0.02, generator=generator)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits (B, T, V) of the character that follows each position."""
        x_BTD = self.token(ids_BT) + self.position(torch.arange(ids_BT.shape[1]))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(self.norm(x_BTD))

    def loss(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy in nats per character."""
        return F.cross_entropy(self(ids_BT).flatten(0, 1), targets_BT.flatten())
