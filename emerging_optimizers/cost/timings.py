"""How long operations take on the device, each timed by itself."""

import statistics
import time
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from emerging_optimizers.cost.meter import ALIGNED, WARM_STEPS, Like, Meter, Operation
from emerging_optimizers.routing import create_optimizer

COLD_BYTES = 64 * 2**20  # no less than caches hold
LEAST_CALLS, MOST_CALLS = 3, 21


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
        return max(0.0, step - self.total(meter.operations)) / count

    def _time(self, operation: Operation) -> float:
        """Median of a few calls, after one that is not counted."""
        likes = operation.tensors()
        device = likes[0].device if likes else torch.device("cpu")
        cold = [x for x in likes if x.cold and x.nbytes and x.dtype.is_floating_point]
        # As in a step, which walks through weights and state: each call's part lies behind that of the call before.
        region = COLD_BYTES // max(1, len(cold)) // ALIGNED * ALIGNED
        walks = sum(x.nbytes for x in cold) >= 2**16 and all(x.nbytes * LEAST_CALLS < region for x in cold)
        made = [None if walks and x in cold else x.make() for x in likes]
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
            if call > LEAST_CALLS and sum(taken) > 0.01:
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
