"""What a step cannot be faster than: counted operations over the measured rate of products, or counted bytes over the
measured bandwidth of memory. Counts are of a matrix of m x n, m <= n; symmetric products count half.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from benchmarks.step.workloads import Shapes, elements

Rate = Literal["float32", "bfloat16", "tf32", "copy"]


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Seconds of the algorithm as it is usually written, and of the leanest form of it that is known."""

    usual: float
    least: float


@dataclass(frozen=True, kw_only=True)
class NewtonSchulz:
    """Operations of Newton-Schulz; usual: every product in full; least: symmetric by half, Gram form where it pays."""

    steps: int = 5
    rate: Rate = "bfloat16"

    def counts(self, shapes: Shapes) -> tuple[float, float]:
        usual = least = 0
        for count, (m, n) in _sides(shapes):
            k = self.steps
            usual += count * k * (4 * m * m * n + 2 * m**3)
            # R = X X^T, then on R alone: 1 product a step for R^2, 2 to move R on, 1 to gather the polynomial; Q X.
            # One restart costs two more long products and saves three short ones. Without it bfloat16 is not accurate.
            gram = 6 * m * m * n + (4 * k - 6) * m**3
            least += count * min(k * (3 * m * m * n + m**3), gram)
        return usual, least


@dataclass(frozen=True, kw_only=True)
class Eigenbasis:
    """Operations of SOAP with one power iteration and a QR; usual: as published; least: symmetric products, the
    momentum kept outside of the basis where that is cheaper, eigenvalues from the QR. An eigh takes no fewer."""

    every: int = 1
    """Steps between refreshes of the basis."""
    kl: bool = False
    """Factors are whitened by one another: the gradient meets both bases once more."""
    rate: Rate = "float32"

    def counts(self, shapes: Shapes) -> tuple[float, float]:
        usual = least = 0.0
        for count, (m, n) in _sides(shapes):
            both, cubes, k = 2 * (m * m * n + m * n * n), m**3 + n**3, self.every
            # Factors, into the basis, out of it; the momentum out of the old basis and into the new one.
            usual += count * ((3 + self.kl) * both + (2 * both + 20 / 3 * cubes) / k)
            least += count * ((2.5 + self.kl + min(1, 2 / k)) * both + 14 / 3 * cubes / k)
        return usual, least


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of an element-wise step: every tensor read or written once."""

    bytes: int
    """Bytes of one element."""
    rate: Rate = "copy"

    def counts(self, shapes: Shapes) -> tuple[float, float]:
        return (self.bytes * elements(shapes),) * 2


Cost = NewtonSchulz | Eigenbasis | Traffic


def floor(cost: Cost, shapes: Shapes, rates: Mapping[str, float]) -> Floor | None:
    """The floor of a cost at measured rates (operations or bytes a second); None where the rate is not known."""
    if cost.rate not in rates:
        return None
    rate = rates[cost.rate]
    if cost.rate == "bfloat16":  # no dtype is prescribed: on a CPU without hardware for it float32 is the faster one
        rate = max(rate, rates.get("float32", 0.0))
    usual, least = (count / rate for count in cost.counts(shapes))
    return Floor(usual=usual, least=least)


def _sides(shapes: Shapes) -> list[tuple[int, tuple[int, int]]]:
    """Shapes with the short side first; a stack of matrices counts as that many."""
    return [(count * prod(shape[:-2]), (min(shape[-2:]), max(shape[-2:]))) for count, shape in shapes]
