"""Rows that a rule picks out of matrices, and works on as matrices of their own; wherever they lie.

In one process a matrix is here, and picking is `gather` and `scatter`. Of a matrix that processes have cut, each has a
part, and only what is picked travels: norms are summed up, so that all pick the same; the owner of a matrix puts its
picked rows together and hands out what becomes of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from emerging_optimizers.distributed.pickings import Picking
from emerging_optimizers.distributed.shares import CutMatrix, Total
from emerging_optimizers.linalg.factorizations import note, noting

# What an owner says of a matrix: it has failed, or could not be factorized; 0: neither.
FAILED, UNSOUND = -1.0, 1.0


class Picked(ABC):
    """Some rows of each matrix of a stack."""

    @abstractmethod
    def take(self, x_BMN: Tensor) -> Tensor:
        """Those rows of a stack, or what lies here of them: (..., N)."""

    @abstractmethod
    def put(self, x_BMN: Tensor, rows: Tensor) -> Tensor:
        """The stack with others in their place."""

    @abstractmethod
    def whole(self, function: Callable[..., Sequence[Tensor]], *rows: Tensor) -> Sequence[Tensor]:
        """A function of picked rows as whole matrices, (B, K, N) each; it returns as many of the same shapes."""


class Rows:
    """The rows of whole matrices."""

    def shape(self, x_BMN: Tensor) -> tuple[int, int]:
        """Of the matrices of which a stack has parts: all of them."""
        return x_BMN.size(-2), x_BMN.size(-1)

    def longest(self, x_BMN: Tensor, count: int, *, turned: bool = False) -> Picked:
        """Pick those with the largest sums of absolute values.

        Args:
            x_BMN: the matrices, or what lies here of them.
            count: how many of each.
            turned: rows are columns of the parameters.
        """
        return _PickedHere(self._lengths(x_BMN).topk(count, dim=-1).indices)

    @staticmethod
    def _lengths(x_BMN: Tensor) -> Tensor:
        """In float64, where the order in which processes add them up decides between no two rows."""
        return x_BMN.abs().sum(dim=-1, dtype=torch.float64)


ROWS = Rows()


class _PickedHere(Picked):
    def __init__(self, index_BK: Tensor) -> None:
        self._index_BK1 = index_BK.unsqueeze(-1)

    def take(self, x_BMN: Tensor) -> Tensor:
        return x_BMN.gather(-2, self._over(x_BMN))

    def put(self, x_BMN: Tensor, rows: Tensor) -> Tensor:
        return x_BMN.scatter(-2, self._over(x_BMN), rows)

    def whole(self, function: Callable[..., Sequence[Tensor]], *rows: Tensor) -> Sequence[Tensor]:
        return function(*rows)

    def _over(self, x_BMN: Tensor) -> Tensor:
        return self._index_BK1.expand(-1, -1, x_BMN.size(-1))


class CutRows(Rows):
    """The rows of matrices that processes have cut, all of them in the same way.

    Args:
        shares: of the matrices of a stack.
        name: of a parameter, for errors.
    """

    def __init__(self, shares: Sequence[CutMatrix], name: Callable[[Tensor], str] = str) -> None:
        self._shares, self._name = shares, name
        self._spread, self._peers = shares[0].spread, shares[0].peers

    def shape(self, x_BMN: Tensor) -> tuple[int, int]:
        """As of any; what is given has parts of them."""
        return self._spread.shape[0], self._spread.shape[1]

    def longest(self, x_BMN: Tensor, count: int, *, turned: bool = False) -> Picked:
        """As of any; the processes ask at the same time, and pick the same."""
        axis = int(turned)
        parts_BS = self._nothing(x_BMN)
        parts_BS[:, self._spread.indices(self._peers.rank, axis).to(x_BMN.device)] = self._lengths(x_BMN)
        lengths_BM = self._summed(parts_BS)[:, : self._spread.shape[axis]]
        return _PickedFromAll(Picking(self._shares, lengths_BM.topk(count, dim=-1).indices, axis), self._raise)

    @contextmanager
    def telling(self, like_BMN: Tensor) -> Iterator[None]:
        """Have the others hear of an error inside, as long as they wait for what this process says of lengths."""
        self._others_wait = True
        try:
            yield
        except Exception:  # of whatever kind
            if self._others_wait:
                self._summed(self._nothing(like_BMN), failed=True)
            raise

    def _nothing(self, like_BMN: Tensor) -> Tensor:
        """Of each matrix room for the lengths of its rows or columns, and behind it for a process that has failed."""
        return like_BMN.new_zeros((len(like_BMN), max(self._spread.shape) + 1), dtype=torch.float64)

    def _summed(self, parts_BS: Tensor, failed: bool = False) -> Tensor:
        parts_BS[:, -1] = failed
        sums_BS = Total(self._peers, self._spread.copies)(parts_BS)
        self._others_wait = False
        if not failed and bool(sums_BS[0, -1]):
            names = ", ".join(self._name(share.source) for share in self._shares)
            raise RuntimeError(
                f"another process could not work on its part of {names}; its own error says why. Those have not moved"
            )
        return sums_BS

    def _raise(self, failed: Sequence[int]) -> None:
        owner = self._shares[failed[0]].owner
        names = ", ".join(self._name(self._shares[i].source) for i in failed if self._shares[i].owner == owner)
        raise RuntimeError(
            f"rank {owner} could not work on the rows that it owns, of {names}; its own error says why. Those have not "
            "moved"
        )


class _PickedFromAll(Picked):
    def __init__(self, picking: Picking, fail: Callable[[Sequence[int]], Any]) -> None:
        self._picking, self._fail = picking, fail

    def take(self, x_BMN: Tensor) -> Tensor:
        return x_BMN[self._picking.here]

    def put(self, x_BMN: Tensor, rows: Tensor) -> Tensor:
        return x_BMN.index_put(self._picking.here, rows)

    def whole(self, function: Callable[..., Sequence[Tensor]], *rows: Tensor) -> Sequence[Tensor]:
        picking = self._picking
        widths = [x.size(-1) for x in rows]
        stack = picking.fetch(torch.cat(rows, dim=-1))
        words = stack.new_zeros(len(stack))
        problem: Exception | None = None
        if len(stack):  # something of this process's own
            parts = torch.split(stack, [stack.size(-1) - sum(widths[1:]), *widths[1:]], dim=-1)
            try:
                with noting() as failures:
                    stack = torch.cat([*function(*parts)], dim=-1)
                if (unsound := failures.mask(len(stack), stack.device)) is not None:
                    words = words.masked_fill(unsound, UNSOUND)
            except Exception as error:  # of whatever kind: the others wait for what is owned here
                problem, words = error, words.fill_(FAILED)
        found, said = picking.deliver(stack, words)
        if problem is not None:
            raise problem
        if failed := [i for i, word in enumerate(said) if word == FAILED]:
            self._fail(failed)
        note(i for i, word in enumerate(said) if word == UNSOUND)
        return torch.split(found, widths, dim=-1)
