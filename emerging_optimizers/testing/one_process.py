"""Whether an optimizer does to a sharded model what it does to the same model in one process."""

from collections.abc import Callable, Mapping
from math import inf, isfinite
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from emerging_optimizers.distributed.dtensor import as_sharded, cut_out, is_dtensor, local_of, spread_of
from emerging_optimizers.distributed.plan import Box

GradientsT = Callable[[int, Mapping[str, torch.Size]], Mapping[str, Tensor]]


def assert_same_as_one_process(
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    layout: Callable[[nn.Module], nn.Module | None],
    *,
    steps: int = 20,
    tolerance: float = 1e-10,
    gradients: GradientsT | None = None,
) -> None:
    """Step a sharded model and, on rank 0, an unsharded one with the same gradients, and compare their weights.

    Every process of the default group calls it: under `torchrun`, say, after `init_process_group`. Give a model in
    float64 with small matrices. Both sides see the same bits; factors of SOAP that lack full rank would amplify any
    others.

    Args:
        make_model: the model, the same on every process, with its random numbers seeded; in float64.
        make_optimizer: the optimizer of a model.
        layout: shards the model in place, or returns it: `lambda model: fully_shard(model)`.
        steps: how many.
        tolerance: the largest difference between two weights, in the weights' unit.
        gradients: from the step, from 0, and the shapes by name to the whole gradients; None: normal numbers. One that
            is left out is no gradient.

    Raises:
        AssertionError: weights differ, or processes that hold copies of the same part hold other bits; it names the
            parameter, the step and by how much. Or the guard has counted something else (`guard_events`).
        ValueError: torch.distributed has not been set up.

    Example:
        >>> def train(rank):  # under `torchrun --nproc-per-node 2`
        ...     dist.init_process_group("gloo")
        ...     assert_same_as_one_process(
        ...         make_model, lambda model: create_optimizer("muon", model), lambda model: fully_shard(model)
        ...     )
    """
    largest = difference_of(
        in_one_process(make_model, make_optimizer, steps=steps, gradients=gradients),
        make_model,
        make_optimizer,
        layout,
        steps=steps,
        gradients=gradients,
    )
    if not largest.size <= tolerance:
        raise AssertionError(
            f"{largest.name}: on rank {largest.rank} a weight differs by {largest.size:.1e} from one process after "
            f"{steps} steps; {tolerance:.1e} is allowed"
        )


class Expected(NamedTuple):
    """What one process makes of a model.

    Attributes:
        weights: by name.
        events: what the guard has counted.
    """

    weights: Mapping[str, Tensor]
    events: Any


class Difference(NamedTuple):
    """The largest difference between a weight and that of one process.

    Attributes:
        size: of it.
        name: of the parameter.
        rank: where it lies.
    """

    size: float
    name: str
    rank: int


def in_one_process(
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    steps: int = 20,
    gradients: GradientsT | None = None,
) -> Expected:
    """What rank 0 makes of the whole model, told to all; it depends on no layout, so it serves for several.

    Raises:
        ValueError: torch.distributed has not been set up.
    """
    if not dist.is_initialized():
        raise ValueError(
            "assert_same_as_one_process compares several processes with one; call it on each of them after "
            "torch.distributed.init_process_group(...), under torchrun for example"
        )
    said: list[Any] = [None, None, ""]
    problem = None
    if dist.get_rank() == 0:
        try:
            wholes, events = _trained(make_model(), make_optimizer, gradients or _normal, steps)
            said = [{name: p.detach().cpu() for name, p in wholes.items()}, events, ""]
        except Exception as error:  # of whatever kind: the others wait
            problem, said[2] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(said)
    weights, events, failure = said
    if failure:
        raise problem or RuntimeError(f"rank 0 could not take the steps of one process: {failure}")
    return Expected(weights, events)


def difference_of(
    expected: Expected,
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    layout: Callable[[nn.Module], nn.Module | None],
    *,
    steps: int = 20,
    gradients: GradientsT | None = None,
) -> Difference:
    """Step a sharded model, and say how far it is from one process.

    Raises:
        AssertionError: processes that hold copies of one part hold other bits, or the guard has counted something else.
    """
    model = make_model()
    parts, events = _trained(layout(model) or model, make_optimizer, gradients or _normal, steps)
    found = _largest(expected.weights, parts)
    if expected.events != events:
        raise AssertionError(
            f"guard_events() is {events} on rank {dist.get_rank()}, and {expected.events} in one process"
        )
    return found


def _trained(
    model: nn.Module, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer], gradients: GradientsT, steps: int
) -> tuple[dict[str, nn.Parameter], Any]:
    """The parameters of a model after some steps, and what the guard has counted."""
    optimizer = make_optimizer(model)
    parameters = dict(model.named_parameters())
    shapes = {name: p.shape for name, p in parameters.items()}
    boxes = {name: _boxes(p) for name, p in parameters.items()}  # asking for them costs more than a step
    for step in range(steps):
        given = gradients(step, shapes)
        for name, p in parameters.items():
            p.grad = _cut(given[name].to(p.dtype), p, boxes[name]) if name in given else None
        optimizer.step()
    return parameters, getattr(optimizer, "guard_events", dict)()


def _normal(step: int, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def part_of(whole: Tensor, p: Tensor) -> Tensor:
    """A whole tensor as it lies where a parameter does; itself for one that is not sharded."""
    return _cut(whole, p, _boxes(p))


def _cut(whole: Tensor, p: Tensor, boxes: tuple[Box, ...]) -> Tensor:
    return as_sharded(cut_out(whole, boxes, local_of(p)), p, whole.shape) if is_dtensor(p) else whole


def _boxes(p: Tensor) -> tuple[Box, ...]:
    """What lies here of a parameter."""
    if is_dtensor(p):
        return spread_of("the parameter", p).boxes(dist.get_rank())
    return (Box((0,) * p.ndim, tuple(p.shape), (0,) * p.ndim),)


def _largest(wholes: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> Difference:
    held = {name: (_boxes(p), local_of(p).detach().cpu()) for name, p in parts.items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, held)
    differences = []
    for name, whole in wholes.items():
        first: dict[tuple[Box, ...], tuple[int, Tensor]] = {}
        for rank, theirs in enumerate(everyone):
            boxes, local = theirs[name]
            seen, bits = first.setdefault(boxes, (rank, local))
            if not torch.equal(bits, local):
                raise AssertionError(f"{name}: ranks {seen} and {rank} hold copies of one part with other bits")
            for box in boxes:
                size = float((local[box.local_slices] - whole[box.slices]).abs().max())
                differences.append(Difference(size if isfinite(size) else inf, name, rank))
    return max(differences)
