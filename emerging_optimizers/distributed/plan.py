"""Which parts of a tensor each process holds: integers only.

Every process computes the same from shapes and placements, so nothing has to be agreed on by messages. A mesh
is its shape, a process its coordinate there; whoever has a mesh knows the ranks.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise, product
from math import prod
from typing import NamedTuple

Run = tuple[int, int]  # half open
Cut = tuple[int, int, int]  # parts, which of them, split factor


class Shard(NamedTuple):
    """A dimension is cut over a dimension of the mesh. Where nothing is cut, copies lie, and None stands there.

    Attributes:
        dim: of the tensor, from 0.
        split_factor: 1: the i-th process holds the i-th piece of `torch.chunk`. More: it holds the i-th piece of each
            of so many pieces. FSDP2 makes such shards of what tensor parallelism has cut along the same dimension.
    """

    dim: int
    split_factor: int = 1


class Box(NamedTuple):
    """A part of a tensor that is one slice in each dimension.

    Attributes:
        starts: where it begins in the whole.
        stops: behind its end there.
        local: where it begins in the local tensor.
    """

    starts: tuple[int, ...]
    stops: tuple[int, ...]
    local: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its lengths."""
        return tuple(stop - start for start, stop in zip(self.starts, self.stops, strict=True))

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """`whole[box.slices]` is the box."""
        return tuple(map(slice, self.starts, self.stops))

    @property
    def local_slices(self) -> tuple[slice, ...]:
        """`local[box.local_slices]` is the box."""
        return tuple(slice(a, a + size) for a, size in zip(self.local, self.shape, strict=True))


class Sharding(NamedTuple):
    """How a tensor lies on a mesh.

    Attributes:
        shape: of the whole tensor.
        mesh: the shape of the mesh.
        placements: for each dimension of the mesh a `Shard`, or None where copies lie.

    Example:
        >>> rows = Sharding((5, 4), (2, 2), (None, Shard(0)))
        >>> rows.boxes((1, 1))
        (Box(starts=(3, 0), stops=(5, 4), local=(0, 0)),)
        >>> rows.copies((1, 1)), rows.replica((1, 1))
        (((0, 1), (1, 1)), ((1, 0), (1, 1)))
    """

    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    placements: tuple[Shard | None, ...]

    def boxes(self, coordinate: tuple[int, ...]) -> tuple[Box, ...]:
        """What the process at a coordinate holds, in the order of its local tensor; boxes are never empty."""
        return _boxes(self._runs(coordinate))

    def local_shape(self, coordinate: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the local tensor there."""
        return tuple(map(_length, self._runs(coordinate)))

    def copies(self, coordinate: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Who holds the same boxes, in the order of the mesh."""
        return self._where(coordinate, varying=None)

    def replica(self, coordinate: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Who holds the whole tensor once, together with this coordinate, in the order of the mesh."""
        return self._where(coordinate, varying=Shard)

    def check(self, name: str) -> None:
        """Refuse what is no sharding, and one whose placements may name other elements than a process holds.

        The boxes of a replica tile the whole whatever the placements are. But FSDP2 cuts what tensor parallelism has
        cut before, and the placements describe that as if it had come first. Both are the same where the dimension
        is divisible by the degree of tensor parallelism; else sometimes, and then this says so.

        Args:
            name: of the parameter.

        Raises:
            ValueError: the placements do not fit the shape or the mesh, or the two orders differ.

        Example:
            >>> Sharding((7, 4), (3, 2), (Shard(0, 2), Shard(0))).check("layer.weight")
            Traceback (most recent call last):
                ...
            ValueError: layer.weight: FSDP2 over 3 processes has cut dimension 0 of (7, 4), which tensor parallelism \
had cut in 2 unequal pieces, and torch's placements then do not say which rows a process holds; make its size 7 \
divisible by 2, or let fully_shard cut another dimension (shard_placement_fn)
        """
        if len(self.mesh) != len(self.placements):
            raise ValueError(f"{name}: {len(self.placements)} placements for a mesh of {len(self.mesh)} dimensions")
        for shard in filter(None, self.placements):
            if not 0 <= shard.dim < len(self.shape) or shard.split_factor < 1:
                raise ValueError(
                    f"{name}: {shard} does not fit shape {self.shape}; its dim must be from 0 to "
                    f"{len(self.shape) - 1}, and its split factor at least 1"
                )
        for dim, size in enumerate(self.shape):
            if (differ := self._order_matters(dim)) is not None:
                fully, tensor = differ
                raise ValueError(
                    f"{name}: FSDP2 over {fully} processes has cut dimension {dim} of {self.shape}, which tensor "
                    f"parallelism had cut in {tensor} unequal pieces, and torch's placements then do not say which "
                    f"rows a process holds; make its size {size} divisible by {tensor}, or let fully_shard cut another "
                    "dimension (shard_placement_fn)"
                )

    def _runs(self, coordinate: tuple[int, ...]) -> tuple[tuple[Run, ...], ...]:
        """Which indices are held, for each dimension."""
        cuts: list[tuple[Cut, ...]] = [()] * len(self.shape)
        for parts, i, shard in zip(self.mesh, coordinate, self.placements, strict=True):
            if shard is not None:
                cuts[shard.dim] += ((parts, i, shard.split_factor),)
        return tuple(map(_runs, self.shape, cuts))

    def _where(self, coordinate: tuple[int, ...], varying: type[Shard] | None) -> tuple[tuple[int, ...], ...]:
        sides = zip(self.mesh, coordinate, self.placements, strict=True)
        return tuple(product(*(range(n) if (s is None) == (varying is None) else (i,) for n, i, s in sides)))

    def _order_matters(self, dim: int) -> tuple[int, int] | None:
        """Over how many processes FSDP2 and tensor parallelism have cut a dimension, where their order matters."""
        cuts = [(n, s.split_factor) for n, s in zip(self.mesh, self.placements, strict=True) if s and s.dim == dim]
        behind = [prod(parts for parts, _ in cuts[i + 1 :]) for i in range(len(cuts))]
        strided = [i for i, (_, factor) in enumerate(cuts) if factor > 1]
        first = [i for i in range(len(cuts)) if i not in strided]
        pieces = prod(cuts[i][0] for i in first)
        if not strided or self.shape[dim] % pieces == 0 or any(cuts[i][1] != behind[i] for i in strided):
            return None  # or no shards of FSDP2: then the placements are how they were made
        order = first + strided[::-1]
        for place in product(*(range(parts) for parts, _ in cuts)):
            said = _runs(self.shape[dim], tuple((n, i, f) for (n, f), i in zip(cuts, place, strict=True)))
            if said != _runs(self.shape[dim], tuple((cuts[k][0], place[k], 1) for k in order)):
                return prod(cuts[i][0] for i in strided), pieces
        return None


def coordinates(mesh: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All of a mesh, in the order of its ranks.

    Example:
        >>> list(coordinates((2, 2)))
        [(0, 0), (0, 1), (1, 0), (1, 1)]
    """
    return product(*map(range, mesh))


@lru_cache(maxsize=2**16)  # layers are alike, and a plan asks for every process
def _runs(size: int, cuts: tuple[Cut, ...]) -> tuple[Run, ...]:
    """Which indices of a dimension are left after it has been cut, in the order of the local tensor."""
    if not cuts:
        return ((0, size),) if size else ()
    runs, (parts, i, factor) = _runs(size, cuts[:-1]), cuts[-1]
    total = _length(runs)
    kept: list[Run] = []
    for j in range(factor):
        begin, end = _piece(total, factor, j)
        a, b = _piece(end - begin, parts, i)
        kept += _between(runs, begin + a, begin + b)
    return _merged(kept)


def _piece(length: int, parts: int, i: int) -> Run:
    """The i-th of the pieces that `torch.chunk` makes; it may be empty."""
    size = -(-length // parts)
    return min(i * size, length), min((i + 1) * size, length)


def _between(runs: Sequence[Run], begin: int, end: int) -> Iterator[Run]:
    """What lies from `begin` to `end` where runs follow each other."""
    for start, stop in runs:
        a, b = start + max(begin, 0), min(start + end, stop)
        if a < b:
            yield a, b
        begin, end = begin - (stop - start), end - (stop - start)


def _merged(runs: Sequence[Run]) -> tuple[Run, ...]:
    """The same indices in the same order, in as few runs as possible."""
    breaks = [0, *(k + 1 for k, (a, b) in enumerate(pairwise(runs)) if a[1] != b[0]), len(runs)]
    return tuple((runs[a][0], runs[b - 1][1]) for a, b in pairwise(breaks) if a < b)


def _length(runs: Sequence[Run]) -> int:
    return sum(stop - start for start, stop in runs)


@lru_cache(maxsize=2**16)
def _boxes(runs: tuple[tuple[Run, ...], ...]) -> tuple[Box, ...]:
    """Every choice of a run in each dimension."""
    placed = [
        [(a, b, local) for (a, b), local in zip(some, accumulate((b - a for a, b in some), initial=0), strict=False)]
        for some in runs
    ]
    return tuple(
        Box(tuple(a for a, _, _ in sides), tuple(b for _, b, _ in sides), tuple(at for _, _, at in sides))
        for sides in product(*placed)
    )
