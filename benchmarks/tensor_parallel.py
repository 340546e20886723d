"""Muon under plain tensor parallelism, on paper: each matrix to an owner, or its Gram matrix added up by an all-reduce.

`python -m benchmarks.tensor_parallel` prints the table of docs/distributed.md. Nothing is timed: shapes are Llama 7B's,
rates those of `eopt estimate`, operations are counted. Each of t ranks has N / t columns of an M x N matrix (M <= N),
makes the Gram matrix of its columns, and an all-reduce of M^2 numbers adds these up. Then every rank iterates on the
M x M matrix, or one does and hands it out, which moves as much. Each multiplies its columns by the result.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from emerging_optimizers.cost.models import read_model
from emerging_optimizers.cost.scale import DIRECTION_BYTES, Machine
from emerging_optimizers.linalg.coefficients import coefficients
from emerging_optimizers.linalg.flops import FlopCounter
from emerging_optimizers.linalg.newton_schulz import gram_newton_schulz, newton_schulz

STEPS, RESTART = 5, 2
MACHINE = Machine()


class Operations(NamedTuple):
    """Of a matrix: of products of M x M matrices, and of those whose number grows with N."""

    square: float
    long: float


class Way(NamedTuple):
    """What a rank does and moves for all matrices, on average."""

    name: str
    flops: float
    bytes: float

    @property
    def times(self) -> tuple[float, float]:
        """Seconds of work and of exchange."""
        return self.flops / (MACHINE.tflops * 1e12), self.bytes / (MACHINE.link * 1e9)


def counted(function: Callable[[Tensor], Tensor], M: int, N: int) -> Operations:
    """From the function itself, on tensors without data."""
    found = []
    for side in (N, 2 * N):
        with FlopCounter() as counter:
            function(torch.empty(1, M, side, device="meta"))
        found.append(counter.flops)
    return Operations(2 * found[0] - found[1], found[1] - found[0])


def ways(shapes: list[tuple[int, int]], ranks: int) -> Iterator[Way]:
    """For matrices that are cut along their longer side."""
    five = coefficients("quintic", STEPS)
    usual = [counted(partial(newton_schulz, coefficients=five), *s) for s in shapes]
    often, once = (
        [counted(partial(gram_newton_schulz, coefficients=five, restart=r), *s) for s in shapes]
        for r in (RESTART, STEPS)
    )
    share = (ranks - 1) / ranks
    gathered = 2 * DIRECTION_BYTES * sum(M * N for M, N in shapes) / ranks * share
    reduced = 2 * DIRECTION_BYTES * sum(M**2 for M, _ in shapes) * share  # an all-reduce sends each number twice

    def owned(some: list[Operations]) -> float:
        return sum(map(sum, some)) / ranks

    def repeated(some: list[Operations]) -> float:
        return sum(x.square + x.long / ranks for x in some)

    grams = -(-STEPS // RESTART)
    yield Way("gather to an owner", owned(usual), gathered)
    yield Way(f"all-reduce, {grams} Gram matrices", repeated(often), grams * reduced)
    yield Way("all-reduce, one", repeated(once), reduced)
    yield Way("one, at an owner", owned(once), reduced)
    yield Way("one, at an owner, half of it sent", owned(once), reduced / 2)


def main() -> None:
    """Count and show."""
    weights = [w for w in read_model("llama-7b").weights() if w.is_hidden]
    shapes = [(min(w.shape), max(w.shape)) for w in weights for _ in range(w.number)]
    print("| ranks | way | operations | sent or received | compute | exchange | together |")
    print("|--:|---|--:|--:|--:|--:|--:|")
    for ranks in (2, 4, 8):
        for way in ways(shapes, ranks):
            cells = (f"{way.flops / 1e12:.0f} TFLOP", f"{way.bytes / 2**30:.1f} GiB")
            times = (f"{1e3 * x:.0f} ms" for x in (*way.times, sum(way.times)))
            print("| " + " | ".join((str(ranks), way.name, *cells, *times)) + " |")


if __name__ == "__main__":
    main()
