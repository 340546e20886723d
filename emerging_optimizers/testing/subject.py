"""What `check_optimizer` tries its checks on, and what these share."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emerging_optimizers.distributed.dtensor import local_of
from emerging_optimizers.testing.one_process import part_of

RunT = Callable[["Subject"], str | None]
MakeT = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class DoesNotApplyError(Exception):
    """A check that says nothing about this optimizer or this machine; the text says why."""


@dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
        name: of it.
        run: raises AssertionError or whatever the optimizer raises; returns what was seen, or None.
        link: to what users rely on.
    """

    name: str
    run: RunT
    link: str


class Subject:
    """An optimizer that is checked, made anew for every trial.

    Args:
        make: from a list of parameters to an optimizer.
        shapes: of the parameters.
        layout: shards a tensor, over all processes; None: they are not sharded.
    """

    def __init__(
        self, make: MakeT, shapes: Sequence[Sequence[int]], layout: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self._make, self.shapes, self.layout = make, [tuple(shape) for shape in shapes], layout
        self._plain: dict[torch.dtype, list[list[Tensor]]] = {}

    def parameters(self, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
        """The same weights at every call."""
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") for shape in self.shapes]
        return [nn.Parameter(x.to(dtype) if self.layout is None else self.layout(x.to(dtype))) for x in made]

    def optimizer(self, parameters: list[nn.Parameter]) -> Any:
        """For these parameters."""
        torch.manual_seed(0)
        return self._make(parameters)

    def fresh(self, dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], Any]:
        """Parameters and their optimizer."""
        parameters = self.parameters(dtype)
        return parameters, self.optimizer(parameters)

    def trained(self, steps: int, dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], Any]:
        """The same, some steps later."""
        parameters, optimizer = self.fresh(dtype)
        train(parameters, optimizer, range(steps))
        return parameters, optimizer

    def weights(self, steps: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Those after at most six steps, of a run that all checks share."""
        if dtype not in self._plain:
            parameters, optimizer = self.fresh(dtype)
            found = []
            for step in range(6):
                train(parameters, optimizer, range(step, step + 1))
                found.append(copies(parameters))
            self._plain[dtype] = found
        return self._plain[dtype][steps - 1]


def gradients(parameters: Sequence[Tensor], step: int) -> list[Tensor]:
    """The gradients of a step, the same at every call."""
    generator = torch.Generator().manual_seed(1000 + step)
    wholes = [torch.randn(p.shape, generator=generator, dtype=torch.float32, device="cpu") for p in parameters]
    return [part_of(whole.to(p.dtype), p) for whole, p in zip(wholes, parameters, strict=True)]


def train(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Some steps with the gradients of those steps."""
    for step in steps:
        for p, grad in zip(parameters, gradients(parameters, step), strict=True):
            p.grad = grad
        optimizer.step()
        optimizer.zero_grad()


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Of their values."""
    return [x.detach().clone() for x in tensors]


def same(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> bool:
    """Bit for bit; NaN is not."""
    return all(torch.equal(local_of(x), local_of(y)) for x, y in zip(found, wanted, strict=True))


def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers are."""
    return all(bool(local_of(x).isfinite().all()) for x in tensors)


def close(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> bool:
    """Up to rounding in float32."""
    pairs = ((local_of(x), local_of(y)) for x, y in zip(found, wanted, strict=True))
    return all(torch.allclose(x, y, rtol=1e-5, atol=1e-7) for x, y in pairs)


def moved_from(parameters: Sequence[Tensor], before: Sequence[Tensor]) -> list[bool]:
    """Which of them are other than before."""
    return [not same([p], [x]) for p, x in zip(parameters, before, strict=True)]


def give(parameters: Sequence[Tensor], step: int, scale: float = 1.0) -> None:
    """Give parameters the gradients of a step, times a number."""
    for p, grad in zip(parameters, gradients(parameters, step), strict=True):
        p.grad = grad * scale


class Checks(list[Check]):
    """Checks in the order in which they stand in a file."""

    def add(self, name: str, link: str) -> Callable[[RunT], RunT]:
        """Decorator: a function is a check."""

        def adding(run: RunT) -> RunT:
            self.append(Check(name, run, link))
            return run

        return adding
