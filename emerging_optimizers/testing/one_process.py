"""Whether an optimizer does to a sharded model what it does to the same model in one process."""

from collections.abc import Callable, Mapping
from typing import Any

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
    if not dist.is_initialized():
        raise ValueError(
            "assert_same_as_one_process compares several processes with one; call it on each of them after "
            "torch.distributed.init_process_group(...), under torchrun for example"
        )
    given = gradients or _normal
    said: list[Any] = [None, None, ""]
    problem = None
    if dist.get_rank() == 0:
        try:
            wholes, counted = _trained(make_model(), make_optimizer, given, steps)
            said = [{name: p.detach().cpu() for name, p in wholes.items()}, counted, ""]
        except Exception as error:  # of whatever kind: the others wait
            problem, said[2] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(said)
    weights, expected, failure = said
    if failure:
        raise problem or RuntimeError(f"rank 0 could not take the steps of one process: {failure}")
    model = make_model()
    parts, counted = _trained(layout(model) or model, make_optimizer, given, steps)
    _compare(weights, parts, steps, tolerance)
    if expected != counted:
        raise AssertionError(f"guard_events() is {counted} on rank {dist.get_rank()}, and {expected} in one process")


def _trained(
    model: nn.Module, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer], gradients: GradientsT, steps: int
) -> tuple[dict[str, nn.Parameter], Any]:
    """The parameters of a model after some steps, and what the guard has counted."""
    optimizer = make_optimizer(model)
    parameters = dict(model.named_parameters())
    shapes = {name: p.shape for name, p in parameters.items()}
    for step in range(steps):
        given = gradients(step, shapes)
        for name, p in parameters.items():
            p.grad = part_of(given[name].to(p.dtype), p) if name in given else None
        optimizer.step()
    return parameters, getattr(optimizer, "guard_events", dict)()


def _normal(step: int, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def part_of(whole: Tensor, p: Tensor) -> Tensor:
    """A whole tensor as it lies where a parameter does; itself for one that is not sharded."""
    if not is_dtensor(p):
        return whole
    boxes = spread_of("the parameter", p).boxes(dist.get_rank())
    return as_sharded(cut_out(whole, boxes, local_of(p)), p, whole.shape)


def _compare(wholes: Mapping[str, Tensor], parts: Mapping[str, Tensor], steps: int, tolerance: float) -> None:
    held = {name: _held(p) for name, p in parts.items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, held)
    for name, whole in wholes.items():
        first: dict[tuple[Box, ...], tuple[int, Tensor]] = {}
        for rank, theirs in enumerate(everyone):
            boxes, local = theirs[name]
            seen, bits = first.setdefault(boxes, (rank, local))
            if not torch.equal(bits, local):
                raise AssertionError(f"{name}: ranks {seen} and {rank} hold copies of one part with other bits")
            for box in boxes:
                difference = (local[box.local_slices] - whole[box.slices]).abs().max()
                if not difference <= tolerance:
                    raise AssertionError(
                        f"{name}: on rank {rank} a weight differs by {float(difference):.1e} from one process after "
                        f"{steps} steps; {tolerance:.1e} is allowed"
                    )


def _held(p: Tensor) -> tuple[tuple[Box, ...], Tensor]:
    if is_dtensor(p):
        return spread_of("the parameter", p).boxes(dist.get_rank()), local_of(p).detach().cpu()
    return (Box((0,) * p.ndim, tuple(p.shape), (0,) * p.ndim),), p.detach().cpu()
