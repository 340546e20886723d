"""Small models whose parameter names say nothing about what the parameters are."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GPTLike(nn.Module):
    """Embedding, positions, one hidden block, norm, head; the head is registered first, so that order says nothing."""

    def __init__(self, vocab: int = 11, context: int = 6, width: int = 8, *, tied: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(width, vocab, bias=False)  # head
        self.b = nn.Embedding(vocab, width)
        self.c = nn.Embedding(context, width)  # positions
        self.d = nn.LayerNorm(width)
        self.e = nn.Linear(width, 4 * width)
        self.f = nn.Linear(4 * width, width)
        self.g = nn.Linear(width, width, bias=False)
        if tied:
            self.a.weight = self.b.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.b(tokens) + self.c.weight[: tokens.size(-1)]
        x = x + self.f(F.gelu(self.e(self.d(x))))
        return self.a(self.g(x))


class HFLike(nn.Module):
    """Names its head as transformers models do; the head's size says nothing."""

    def __init__(self, *, has_head: bool = True) -> None:
        super().__init__()
        self.x = nn.Embedding(11, 8)
        self.y = nn.Linear(8, 8)
        self.z = nn.Linear(8, 5)
        self.has_head = has_head

    def get_output_embeddings(self) -> nn.Module | None:
        return self.z if self.has_head else None


class Experts(nn.Module):
    """A batch of matrices, a class token, a scalar, and a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(3, 4, 6))
        self.q = nn.Parameter(torch.randn(1, 5, 4))
        self.r = nn.Parameter(torch.tensor(1.0))
        self.s = nn.Embedding(7, 4)
        self.t = nn.Linear(6, 4)


def attention() -> nn.Module:
    return nn.ModuleList([nn.Embedding(11, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 11)])


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv1d(4, 5, 3), nn.Flatten(), nn.Linear(20, 2))


def without_embeddings() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))


def frozen() -> nn.Module:
    model = GPTLike()
    model.e.requires_grad_(False)
    return model


MODELS = {
    "untied": GPTLike,
    "tied": lambda: GPTLike(tied=True),
    "hf": HFLike,
    "experts": Experts,
    "attention": attention,
    "convolutional": convolutional,
    "without embeddings": without_embeddings,
    "frozen": frozen,
}


def tokens(seed: int, vocab: int = 11) -> Tensor:
    return torch.randint(vocab, (4, 6), generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Train a GPTLike on step k's own tokens."""
    for k in steps:
        optimizer.zero_grad()
        F.cross_entropy(model(tokens(k)).flatten(0, 1), tokens(k).flatten()).backward()
        optimizer.step()


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
