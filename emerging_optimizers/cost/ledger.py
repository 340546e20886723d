"""What each process of a mesh has of a model's optimizer, sends and receives.

The shards are those of FSDP2 and Megatron's tensor parallelism, cut by `distributed.plan`; operations and state are
those of the optimizer's own rules on tensors without data. No process is started and nothing is allocated.
"""

from collections.abc import Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from emerging_optimizers.cost.models import Weight
from emerging_optimizers.distributed.plan import Shard, Sharding, coordinates
from emerging_optimizers.engine.flops import step_flops
from emerging_optimizers.engine.rule import Rule, StartsFromWeight
from emerging_optimizers.registry import entry


def sharding_of_weight(weight: Weight, shards: int, tensor: int, expert_parallel: int) -> Sharding:
    """FSDP2 over what tensor or expert parallelism leaves."""
    if len(weight.shape) == 3 and expert_parallel > 1:
        ranks = shards * tensor
        spread = ranks // expert_parallel
        between = ranks <= weight.shape[0]
        first = Shard(0, expert_parallel) if between else Shard(1)
        return Sharding(weight.shape, (spread, expert_parallel), (first, Shard(0)))
    if weight.cut is None or tensor == 1:
        return Sharding(weight.shape, (shards, tensor), (Shard(0), None))
    return Sharding(weight.shape, (shards, tensor), (Shard(0, tensor if weight.cut == 0 else 1), Shard(weight.cut)))


def is_local(weight: Weight, sharding: Sharding) -> bool:
    """Whether every process can work on what it has: nothing is cut, or a stack between its matrices."""
    sides = zip(sharding.mesh, sharding.placements, strict=True)
    axes = {shard.dim for size, shard in sides if shard is not None and size > 1}
    return not axes or (len(weight.shape) == 3 and axes == {0})


class Held(NamedTuple):
    """Who has how many elements of each matrix; one, or those of a stack.

    Attributes:
        elements: (matrices, ranks).
        copy: (ranks,), of which copy of the whole a process has a part.
    """

    elements: Tensor
    copy: Tensor


@lru_cache(maxsize=16)  # layers are alike; one of 256 experts on 4,096 processes takes 8 MiB
def held_of(sharding: Sharding) -> Held:
    """Counted from the boxes of every process."""
    stack = len(sharding.shape) == 3
    everyone = [*coordinates(sharding.mesh)]
    elements = torch.zeros(sharding.shape[0] if stack else 1, len(everyone), dtype=torch.int64)
    copies: dict[tuple[int, ...], int] = {}
    copy = []
    for rank, coordinate in enumerate(everyone):
        for box in sharding.boxes(coordinate):
            where = slice(box.starts[0], box.stops[0]) if stack else slice(None)
            elements[where, rank] += box.numel // (box.shape[0] if stack else 1)
        sides = zip(coordinate, sharding.placements, strict=True)
        which = tuple(i for i, shard in sides if shard is None)
        copy.append(copies.setdefault(which, len(copies)))
    return Held(elements, torch.tensor(copy))


# --- what the optimizer does with them --------------------------------------------------------------------------------


class Update:
    """An optimizer with its defaults: operations and state of each shape."""

    def __init__(self, name: str) -> None:
        known = entry(name)
        made = known.load()([nn.Parameter(torch.ones(2, 2))], lr=1e-3 if known.start is None else known.start)
        self._group: dict[str, Any] = made.param_groups[0]
        self._rule: Rule = made._checked_rule(0)
        self.elementwise = self._rule.elementwise
        reads = {"weight", "parameters"} & {*self._rule.reads}
        self.reads_weights = bool(
            self._rule.weight_law is not None or reads or isinstance(self._rule, StartsFromWeight)
        )

    def flops(self, shape: tuple[int, ...]) -> float:
        """Of one parameter's step."""
        if self.elementwise:
            return 0.0
        *stack, M, N = shape
        return prod(stack) * step_flops(self._rule, (M, N), self._group)

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        """Of one parameter's state."""
        flat = (prod(shape),) if self.elementwise else (prod(shape[:-2]), *shape[-2:])
        state = self._rule.init(flat, torch.float32, torch.device("meta"))
        counts = 4 * (1 if self.elementwise else flat[0]) if "step" in self._rule.reads else 0
        return counts + sum(x.numel() * x.element_size() for x in tree_leaves(tuple(state)) if isinstance(x, Tensor))


class Job(NamedTuple):
    """A parameter that is owned."""

    cost: float
    held: Held
    weight: Weight

    def each(self, ranks: int) -> int:
        """How many of its matrices an owner has at most."""
        return -(-len(self.held.elements) // ranks)

    def piece(self, ranks: int) -> float:
        """The operations of an owner."""
        return self.cost * self.each(ranks) / len(self.held.elements)


class Ledger:
    """What each process has, sends and receives."""

    def __init__(self, ranks: int) -> None:
        self.state, self.fetch_out, self.fetch_in, self.back_out, self.back_in = (
            torch.zeros(ranks, dtype=torch.int64) for _ in range(5)
        )
        self.flops = torch.zeros(ranks, dtype=torch.float64)
        self.largest = 0.0

    def add_elements(self, held: Held, update: Update, weight: Weight) -> None:
        """State as sharded as the parameter."""
        sizes = held.elements.sum(0)
        for size in set(sizes.tolist()):
            if size:
                self.state[sizes == size] += weight.number * update.state_bytes((size,))

    def add_local(self, held: Held, update: Update, weight: Weight) -> None:
        """Whole matrices where they lie."""
        one = (1, *weight.shape[-2:])
        matrices = (held.elements > 0).sum(0)
        self.state += weight.number * matrices * update.state_bytes(one)
        self.flops += weight.number * matrices * update.flops(one)
        self.largest = max(self.largest, update.flops(one))

    def add_owned(self, jobs: Sequence[Job], update: Update) -> None:
        """Matrices by owners: the largest piece first, and to the process that has least; a stack has many owners."""
        ranks = len(self.flops)
        heap = [(0.0, rank) for rank in range(ranks)]
        heapify(heap)
        # Not the largest stack: large single matrices would come behind many small pieces, on top of an even load.
        for job in sorted(jobs, key=lambda job: -job.piece(ranks)):
            each, matrices = job.each(ranks), len(job.held.elements)
            owners: list[int] = []
            for load, rank in [heappop(heap) for _ in range(-(-matrices // each))]:
                some = min(each, matrices - len(owners))
                owners += [rank] * some
                heappush(heap, (load + job.cost * some / matrices, rank))
            self._own(job, torch.tensor(owners), update)

    def _own(self, job: Job, owners: Tensor, update: Update) -> None:
        elements, copy = job.held
        matrices = len(owners)
        one = (1, *job.weight.shape[-2:])
        self.flops.index_add_(0, owners, torch.full((matrices,), job.cost / matrices, dtype=torch.float64))
        self.state.index_add_(0, owners, torch.full((matrices,), update.state_bytes(one)))
        self.largest = max(self.largest, job.cost / matrices)
        mine = elements[torch.arange(matrices), owners]
        # Each box is fetched once, from the owner's own copy of the whole; it is delivered to all copies.
        near = elements if int(copy.max()) == 0 else elements * (copy[owners].unsqueeze(1) == copy)
        for part, out, back in ((near, self.fetch_out, self.fetch_in), (elements, self.back_in, self.back_out)):
            out += part.sum(0)
            out.index_add_(0, owners, -mine)
            back.index_add_(0, owners, part.sum(1) - mine)
