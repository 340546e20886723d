"""How long operations take on the device, each timed by itself."""

import statistics
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from emerging_optimizers.cost.meter import ALIGNED, WARM_STEPS, Like, Meter, Operation
from emerging_optimizers.routing import create_optimizer

COLD_BYTES = 64 * 2**20  # no less than caches hold
LEAST_CALLS, MOST_CALLS = 3, 21
LONG_S = 0.2  # of calls so long one is enough, behind one that is not counted
# What is timed at most, in bytes and operations of a call: more is not faster for each of them, and an estimate holds
# nothing as large as the model. On accelerators small calls say nothing of large ones.
MOST_WORK = {"cpu": (2**26, 2**32), "cuda": (2**30, 2**40)}
SHORTEST_SIDE = 64


class Timings:
    """Seconds of operations, each measured once."""

    def __init__(self) -> None:
        self._known: dict[Operation, float] = {}
        self._memory: dict[torch.device, Tensor] = {}

    def total(self, operations: Mapping[Operation, int]) -> float:
        """Of all of them."""
        return sum(count * self._seconds(operation) for operation, count in operations.items())

    def _seconds(self, operation: Operation) -> float:
        if operation not in self._known:
            with _disable_current_modes():
                self._known[operation] = self._time(operation)
        return self._known[operation]

    @cached_property
    def parameter(self) -> float:
        """What Python does for a parameter: a step on many of one element, less its operations."""
        count, taken = 256, []
        with _disable_current_modes(), torch.no_grad():
            ps = [nn.Parameter(torch.zeros(1)) for _ in range(count)]
            optimizer = create_optimizer("adamw", ps, lr=1e-3)
            for p in ps:
                p.grad = torch.ones(1)
            for _ in range(WARM_STEPS + 9):
                begun = time.perf_counter()
                optimizer.step()
                taken.append(time.perf_counter() - begun)
            with Meter(()) as meter:
                optimizer.step()
        step = statistics.median(taken[WARM_STEPS:])
        return max(0.0, step - self.total(meter.counts.operations)) / count

    def _time(self, operation: Operation) -> float:
        """Of a call; of a large one, those of a smaller one times what it has more of work."""
        refuses = (RuntimeError, TypeError, IndexError)  # it reads values, or its sizes belong together in hidden ways
        with suppress(*refuses):
            flops, moved = operation.work()
            timed = _small_enough(operation, flops, moved)
            if timed is operation:
                return self._measured(operation)
            less_flops, less_moved = timed.work()
            more = flops / less_flops if less_flops else moved / max(1, less_moved)
            return more * self._measured(timed)
        size = sum(x.nbytes for x in operation.tensors())
        if size <= MOST_WORK["cpu"][0]:
            with suppress(*refuses):
                return self._measured(operation)
        copied = COLD_BYTES // 4
        like = Like((copied // 4,), (1,), torch.float32, operation.tensors()[0].device, False)
        return size / copied * self._measured(Operation(torch.ops.aten.clone.default, (like,), ()))

    def _measured(self, operation: Operation) -> float:
        """Median of a few calls, after one that is not counted."""
        likes = operation.tensors()
        if operation.func.is_view:  # which touches nothing, and is as quick without data
            likes = [replace(x, device=torch.device("meta"), cold=False) for x in likes]
        device = likes[0].device if likes else torch.device("cpu")
        cold = [x for x in likes if x.cold and x.nbytes and x.dtype.is_floating_point]
        # As in a step, which walks through weights and state: each call's part lies behind that of the call before.
        region = COLD_BYTES // max(1, len(cold)) // ALIGNED * ALIGNED
        walks = sum(x.nbytes for x in cold) >= 2**16 and all(x.nbytes * LEAST_CALLS < region for x in cold)
        made = [None if walks and x in cold else x.empty() if operation.func.is_view else x.make() for x in likes]
        calls = min(region // x.nbytes for x in cold) if walks else MOST_CALLS
        memory = self._refilled(device) if walks else None

        def arguments(call: int) -> tuple[list[Any], dict[str, Any]]:
            starts = iter(range(0, COLD_BYTES, region))
            kept = iter(made)

            def take(like: Like) -> Tensor:
                if (x := next(kept)) is not None:
                    return x
                assert memory is not None
                start = next(starts) + call * like.nbytes // ALIGNED * ALIGNED
                return memory[start : start + like.nbytes].view(like.dtype).as_strided(like.shape, like.stride)

            return operation.make(take)

        def wait() -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        taken: list[float] = []
        for call in range(min(calls, MOST_CALLS)):
            if sum(taken) > (0.01 if call > LEAST_CALLS else LONG_S) and call > 1:
                break
            args, kwargs = arguments(call)
            wait()
            begun = time.perf_counter()
            operation.func(*args, **kwargs)
            wait()
            taken.append(time.perf_counter() - begun)
        return statistics.median(taken[1:])

    def _refilled(self, device: torch.device) -> Tensor:
        """Bytes that read as positive numbers of any dtype; writing them has pushed all else out of the caches."""
        if device not in self._memory:
            self._memory[device] = torch.empty(COLD_BYTES // 4, dtype=torch.int32, device=device)
        return self._memory[device].fill_(0x3F403F40).view(torch.uint8)


def _small_enough(operation: Operation, flops: float, moved: int) -> Operation:
    """The call itself, or a smaller one that is no more than what is timed."""
    likes = operation.tensors()
    most_moved, most_flops = MOST_WORK["cuda" if any(x.device.type == "cuda" for x in likes) else "cpu"]
    side = max((size for x in likes for size in x.shape), default=2**26)
    while (flops > most_flops or moved > most_moved) and side > SHORTEST_SIDE:
        side = max(SHORTEST_SIDE, int(side / 1.5))
        smaller = operation.capped(side)
        flops, moved = smaller.work()
        if flops <= most_flops and moved <= most_moved:
            return smaller
    return operation
