"""What travels of matrices of which rows are picked: those rows alone, to the owners of the matrices and back."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from emerging_optimizers.distributed.shares import CutMatrix


class Picking:
    """Rows that are picked of a stack of matrices which processes have cut in the same way; each makes the same one.

    The host waits for the device, once: it has to know how much travels.

    Args:
        shares: of the matrices.
        index_BK: which rows of each, the same on every process.
        axis: of the parameters along which rows are counted; 1: they are columns.
    """

    def __init__(self, shares: Sequence[CutMatrix], index_BK: Tensor, axis: int) -> None:
        self.peers, self._spread, self._axis = shares[0].peers, shares[0].spread, axis
        self._device, self._count = index_BK.device, index_BK.size(1)
        index_BK = index_BK.cpu()
        ranks = self.peers.ranks
        owners = torch.tensor([ranks.index(share.owner) for share in shares])
        self._by_owner = torch.argsort(owners, stable=True)  # the matrices in the order in which they travel
        local_BK = self._local(self.peers.rank, index_BK)[self._by_owner]
        place, k = (local_BK >= 0).nonzero(as_tuple=True)
        batch = self._by_owner[place]
        # For each picked row that lies here its matrix and its place in what lies here, by owners.
        self.here = (batch.to(self._device), local_BK[place, k].to(self._device))
        self._to_owners = torch.bincount(owners[batch], minlength=len(ranks)).tolist()
        self._owned = torch.bincount(owners, minlength=len(ranks)).tolist()
        mine_BK = index_BK[owners == ranks.index(self.peers.rank)]
        self._mine = len(mine_BK)
        # Which rows of those of this process's own matrices, one after the other, lie on each process.
        held = ((self._local(rank, mine_BK) >= 0).flatten().nonzero().flatten() for rank in ranks)
        self._from = [at.to(self._device) for at in held]

    def _local(self, rank: int, index_BK: Tensor) -> Tensor:
        """Where rows lie in what a process has; -1: elsewhere."""
        indices = self._spread.indices(rank, self._axis)
        local = torch.full((self._spread.shape[self._axis],), -1)
        local[indices] = torch.arange(len(indices))
        return local[index_BK]

    @cached_property
    def _near(self) -> list[bool]:
        """Of each process whether it has a part of the same copy of the whole as this one."""
        mine = self._spread.copy_of(self.peers.rank)
        return [self._spread.copy_of(rank) == mine for rank in self.peers.ranks]

    def _columns(self, rank: int, beside: int) -> Tensor:
        """Which numbers of a whole row a process has; it has all of the `beside` that stand behind them."""
        length = self._spread.shape[1 - self._axis]
        columns = self._spread.indices(rank, 1 - self._axis)
        return torch.cat([columns, torch.arange(length, length + beside)]).to(self._device)

    def fetch(self, rows: Tensor) -> Tensor:
        """Send the picked rows that lie here, in the order of `here`, to the owners of their matrices.

        Args:
            rows: (picked here, n); behind what lies here of a row may stand other numbers of it.

        Returns:
            (own matrices, picked, N) of this process.
        """
        beside = rows.size(1) - len(self._spread.indices(self.peers.rank, 1 - self._axis))
        columns = [self._columns(rank, beside) for rank in self.peers.ranks]
        # Where in this process's own rows, one after the other, stands what each process has of them.
        self._places = [(at[:, None], some) for at, some in zip(self._from, columns, strict=True)]
        pieces = [
            piece if near else piece[:0]
            for piece, near in zip(torch.split(rows, self._to_owners), self._near, strict=True)
        ]
        counts = [len(at) * len(some) * near for (at, some), near in zip(self._places, self._near, strict=True)]
        arrived = self.peers.exchange([piece.flatten() for piece in pieces], counts)
        width = self._spread.shape[1 - self._axis] + beside
        whole = rows.new_empty(self._mine * self._count, width)
        for (at, some), near, piece in zip(self._places, self._near, arrived, strict=True):
            if near:
                whole[at, some] = piece.view(len(at), len(some))
        return whole.view(self._mine, self._count, width)

    def deliver(self, whole: Tensor, words: Tensor) -> tuple[Tensor, list[float]]:
        """Send rows of this process's own matrices back to where they lie, with a word of each matrix to everyone.

        After `fetch`, whose places they go back to.

        Args:
            whole: as `fetch` returns it.
            words: (own matrices,).

        Returns:
            The rows that lie here, in the order of `here`, and what is said of each matrix of the stack.
        """
        rows = whole.flatten(0, 1)
        pieces = [torch.cat([words, rows[place].flatten()]) for place in self._places]
        width = len(self._places[self.peers.ranks.index(self.peers.rank)][1])
        counts = [own + count * width for own, count in zip(self._owned, self._to_owners, strict=True)]
        arrived = self.peers.exchange(pieces, counts)
        said = torch.cat([piece[:own] for piece, own in zip(arrived, self._owned, strict=True)]).tolist()
        found = torch.cat([piece[own:] for piece, own in zip(arrived, self._owned, strict=True)]).view(-1, width)
        return found, [word for _, word in sorted(zip(self._by_owner.tolist(), said, strict=True))]
