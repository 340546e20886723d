"""Train a small GPT with Muon at a large learning rate, without QK-Clip and with it, and draw the attention logits.

    python examples/qk_clip.py              # both runs, about a minute on one core
    python examples/qk_clip.py --steps 100  # to try it

Without QK-Clip the largest logit of the model grows as long as training goes on; with it, it stays near the threshold.
The picture needs matplotlib; the numbers do not.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import nn

from emerging_optimizers import QKClip, create_optimizer

BATCH, CONTEXT, WIDTH, HEADS, GROUPS, BLOCKS = 16, 64, 96, 6, 2, 3
LR, COMPANION_LR, WARMUP = 0.03, 3e-3, 10
THRESHOLD = 100.0
NEVER = 1e30  # a threshold that nothing reaches, so that logits are only read


class Attention(nn.Module):
    """Causal attention; three query heads share a key head."""

    def __init__(self):
        super().__init__()
        self.n_heads, size = HEADS, WIDTH // HEADS
        self.wq, self.wo = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.wk, self.wv = (nn.Linear(WIDTH, GROUPS * size, bias=False) for _ in range(2))

    def forward(self, x):
        """One layer."""
        q, k, v = (m(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for m in (self.wq, self.wk, self.wv))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a perceptron, each added to the residual stream."""

    def __init__(self):
        super().__init__()
        self.attention_norm, self.mlp_norm, self.attention = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH), Attention()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        """One layer."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """Logits of the next character."""

    def __init__(self, vocabulary):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, ids):
        """Of each position."""
        x = self.token(ids) + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def train(text, steps, threshold):
    """The loss and the largest logit of every step, and how often a head was clipped."""
    torch.manual_seed(0)
    model = GPT(int(text.max()) + 1)
    optimizer = create_optimizer("muon", model, lr=LR, companion_lr=COMPANION_LR)
    clip = QKClip(model, threshold=threshold)
    clip.attach(optimizer)  # the only line that a training loop needs
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / WARMUP))
    generator = torch.Generator().manual_seed(1)
    losses, largest = [], []
    for _ in range(steps):
        starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=generator)
        ids = torch.stack([text[start : start + CONTEXT + 1] for start in starts])
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warmup.step()
        losses.append(loss.item())
        largest.append(max(map(max, clip.maxima().values())))
    return losses, largest, sum(map(sum, clip.events().values()))


def draw(runs, path):
    """Logits on the left, losses on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for (name, (losses, largest, _)), color in zip(runs.items(), ("#c44e52", "#4c72b0"), strict=True):
        left.plot(largest, color=color, label=name)
        smooth = torch.tensor(losses).unfold(0, min(20, len(losses)), 1).mean(1)
        right.plot(range(len(losses) - len(smooth), len(losses)), smooth, color=color, label=name)
    left.axhline(THRESHOLD, color="0.5", linewidth=0.8, linestyle=":")
    left.set(yscale="log", xlabel="step", title="largest attention logit")
    right.set(xlabel="step", title="training loss, mean of 20 steps")
    left.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main():
    """Both runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("qk_clip.png"), help="the picture")
    parser.add_argument("--no-picture", action="store_true")
    options = parser.parse_args()
    characters = "\n".join(topics[name] for name in sorted(topics))
    order = {c: i for i, c in enumerate(sorted(set(characters)))}
    text = torch.tensor([order[c] for c in characters])
    runs = {}
    for name, threshold in (("Muon", NEVER), ("Muon with QK-Clip", THRESHOLD)):
        losses, largest, clipped = runs[name] = train(text, options.steps, threshold)
        last = losses[-20:]
        print(
            f"{name}: largest logit {largest[-1]:.0f} in the last step, {max(largest):.0f} in all; loss "
            f"{sum(last) / len(last):.3f}; heads clipped {clipped} times"
        )
    if not options.no_picture:
        draw(runs, options.out)
        print(f"drawn: {options.out}")


if __name__ == "__main__":
    main()
