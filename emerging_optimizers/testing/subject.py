"""What `check_optimizer` tries its checks on, and what these share."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
    """

    def __init__(self, make: MakeT, shapes: Sequence[Sequence[int]]) -> None:
        self._make, self.shapes = make, [tuple(shape) for shape in shapes]

    def parameters(self, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
        """The same weights at every call."""
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") for shape in self.shapes]
        return [nn.Parameter(x.to(dtype)) for x in made]

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


def gradients(parameters: Sequence[Tensor], step: int) -> list[Tensor]:
    """The gradients of a step, the same at every call."""
    generator = torch.Generator().manual_seed(1000 + step)
    return [
        torch.randn(p.shape, generator=generator, dtype=torch.float32, device="cpu").to(p.dtype) for p in parameters
    ]


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
    return all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers are."""
    return all(bool(x.isfinite().all()) for x in tensors)


def moved_from(parameters: Sequence[Tensor], before: Sequence[Tensor]) -> list[bool]:
    """Which of them are other than before."""
    return [not torch.equal(p, x) for p, x in zip(parameters, before, strict=True)]


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
