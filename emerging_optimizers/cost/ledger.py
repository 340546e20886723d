"""What each process of a mesh has of a model's optimizer, sends and receives.

The shards are those of FSDP2 and Megatron's tensor parallelism, cut by `distributed.plan`; operations and state are
those of the optimizer's own rules on tensors without data. No process is started and nothing is allocated.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from emerging_optimizers.cost.models import Weight
from emerging_optimizers.distributed.dtensor import Spread
from emerging_optimizers.distributed.layout import WITH_OWNERS, WorkT, bytes_each, job_of, work_of
from emerging_optimizers.distributed.owners import Job, Span, share_out
from emerging_optimizers.distributed.plan import Shard, Sharding, coordinates
from emerging_optimizers.engine.filling import needs
from emerging_optimizers.engine.rule import Rule
from emerging_optimizers.registry import entry


class Mesh(NamedTuple):
    """How many processes there are in each dimension; HSDP has several replicas."""

    replicas: int
    shards: int
    tensor: int


def sharding_of_weight(weight: Weight, mesh: Mesh, expert_parallel: int) -> Sharding:
    """FSDP2, or HSDP, over what tensor or expert parallelism leaves."""
    replicas, shards, tensor = mesh
    sharding = _of_one_replica(weight, shards, tensor, expert_parallel)
    if replicas == 1:
        return sharding
    return Sharding(weight.shape, (replicas, *sharding.mesh), (None, *sharding.placements))


def _of_one_replica(weight: Weight, shards: int, tensor: int, expert_parallel: int) -> Sharding:
    if len(weight.shape) == 3 and expert_parallel > 1:
        ranks = shards * tensor
        spread = ranks // expert_parallel
        between = ranks <= weight.shape[0]
        first = Shard(0, expert_parallel) if between else Shard(1)
        return Sharding(weight.shape, (spread, expert_parallel), (first, Shard(0)))
    if weight.cut is None or tensor == 1:
        return Sharding(weight.shape, (shards, tensor), (Shard(0), None))
    return Sharding(weight.shape, (shards, tensor), (Shard(0, tensor if weight.cut == 0 else 1), Shard(weight.cut)))


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
        self.needs = needs(self._rule, self._group)

    def flops(self, shape: tuple[int, ...]) -> float:
        """Of one parameter's step."""
        return 0.0 if self.elementwise else self.needs.cost(shape)

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        """Of one parameter's state."""
        flat = (prod(shape),) if self.elementwise else (prod(shape[:-2]), *shape[-2:])
        state = self._rule.init(flat, torch.float32, torch.device("meta"))
        counts = 4 * (1 if self.elementwise else flat[0]) if "step" in self._rule.reads else 0
        return counts + sum(x.numel() * x.element_size() for x in tree_leaves(tuple(state)) if isinstance(x, Tensor))


class Place(NamedTuple):
    """Parameters that are alike, on a mesh.

    Attributes:
        weight: what they are.
        update: of them.
        spread: how each of them lies.
        work: what is done with them, see `work_of`.
        held: who has how much of each.
    """

    weight: Weight
    update: Update
    spread: Spread
    work: WorkT
    held: Held

    @classmethod
    def of(cls, weight: Weight, update: Update, sharding: Sharding) -> "Place":
        """On the processes from 0 on."""
        sharding.check(weight.name)
        spread = Spread(sharding, range(prod(sharding.mesh)))
        return cls(weight, update, spread, work_of(spread, update.needs), held_of(sharding))

    @property
    def job(self) -> Job:
        """Of one of them."""
        return job_of(self.weight.shape, len(self.spread.ranks), self.update.needs)


def owners_of(places: Sequence[Place]) -> list[list[list[Span]]]:
    """The owners of each of the parameters of each place, as the engine shares them out; where there are none, []."""
    jobs = [[place.job] * place.weight.number if place.work in WITH_OWNERS else [] for place in places]
    ranks = len(places[0].spread.ranks) if places else 1
    found = iter(share_out([job for some in jobs for job in some], dict.fromkeys(range(ranks), 0)))
    return [[next(found) for _ in some] for some in jobs]


class Ledger:
    """What each process has, sends and receives; state and traffic in bytes, of parameters of a dtype."""

    def __init__(self, ranks: int, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.state = torch.zeros(ranks, dtype=torch.int64)
        self.fetch_out, self.fetch_in, self.back_out, self.back_in, self.flops, self.owned = (
            torch.zeros(ranks, dtype=torch.float64) for _ in range(6)
        )
        self.pieces: list[int] = []  # operations of what is owned

    def add(self, place: Place, owners: Sequence[Sequence[Span]]) -> None:
        """All parameters of a place, with the owners of each."""
        if place.work == "elements":
            self._add_elements(place)
        elif owners:
            for spans in owners:
                self._add_owned(place, spans)
        else:
            self._add_local(place)

    def _add_elements(self, place: Place) -> None:
        """State as sharded as the parameter."""
        sizes = place.held.elements.sum(0)
        for size in set(sizes.tolist()):
            if size:
                self.state[sizes == size] += place.weight.number * place.update.state_bytes((size,))

    def _add_local(self, place: Place) -> None:
        """Whole matrices where they lie."""
        one = (1, *place.weight.shape[-2:])
        matrices = (place.held.elements > 0).sum(0)
        self.state += place.weight.number * matrices * place.update.state_bytes(one)
        self.flops += place.weight.number * matrices * place.update.flops(one)

    def _add_owned(self, place: Place, spans: Sequence[Span]) -> None:
        (elements, copy), job = place.held, place.job
        matrices = len(elements)  # one, or those of a stack
        owners = torch.tensor([rank for rank, start, stop in spans for _ in range(min(matrices, stop - start))])
        one = (1, *place.weight.shape[-2:])
        for operations in (self.flops, self.owned):
            operations.index_add_(0, owners, torch.full((matrices,), job.cost / matrices, dtype=torch.float64))
        state = place.update.state_bytes(one)
        if place.work == "rows":  # it lies with the parts
            self.state += state * elements.sum(0) // prod(one)
        else:
            self.state.index_add_(0, owners, torch.full((matrices,), state))
        self.pieces += job.pieces
        mine = elements[torch.arange(matrices), owners]
        # Each box is fetched once, from the owner's own copy of the whole; it is delivered to all copies.
        near = elements if int(copy.max()) == 0 else elements * (copy[owners].unsqueeze(1) == copy)
        there, back = bytes_each(place.work, place.update.needs, place.weight.shape, self._dtype)
        ways = ((near, self.fetch_out, self.fetch_in, there), (elements, self.back_in, self.back_out, back))
        for part, others, owner, each in ways:
            part, held = part.double() * each, mine.double() * each
            others += part.sum(0)
            others.index_add_(0, owners, -held)
            owner.index_add_(0, owners, part.sum(1) - held)
