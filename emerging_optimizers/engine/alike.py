"""Deciding alike: the processes that share parameters compare what they are about to do before anything moves."""

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from emerging_optimizers.distributed.dtensor import is_dtensor
from emerging_optimizers.distributed.groups import Peers
from emerging_optimizers.engine.transit import Transit
from emerging_optimizers.engine.validate import place
from emerging_optimizers.linalg.precision import VARIABLE, reduced_dtype

MISSING = "missing"
# Options that are numbers or words, and steer what a step does.
_PLAIN = (bool, int, float, str, tuple, type(None))


def facts_of(groups: Sequence[Mapping[str, Any]], shared: Iterable[Tensor]) -> dict[str, Any]:
    """What has to be the same on every process of those that share some parameters, in words."""
    among = {*map(id, shared)}
    facts: dict[str, Any] = {}
    for index, group in enumerate(groups):
        members = [(i, p) for i, p in enumerate(group["params"]) if id(p) in among]
        if not members:
            continue
        for key, value in group.items():
            if isinstance(value, _PLAIN):
                facts[f"param_groups[{index}][{key!r}]"] = value
        if group.get("fp32_matmul_prec") == "medium":
            facts[f"what 'medium' means ({VARIABLE} sets it)"] = reduced_dtype(members[0][1].device)
        for i, p in members:
            name = place(group, index, i)
            if is_dtensor(p):  # plain shards may have any
                facts[f"the shape of {name}"] = tuple(p.shape)
            facts[f"the gradient of {name}"] = MISSING if p.grad is None else p.grad.dtype
    return facts


class Agreement:
    """What processes compare, once a step: one small exchange.

    On a CPU a difference is an error in the same step. The host does not wait for an accelerator: there it is one in
    the next step.
    """

    def __init__(self, peers: Peers, device: torch.device) -> None:
        self.peers, self._device = peers, device
        self._mail: tuple[Transit, Any] | None = None

    def check(self, owner: str, facts: Mapping[str, Any], problem: Exception | None = None) -> None:
        """Raise ValueError on every process where one has a problem, or other facts than another.

        Args:
            owner: the class that messages name.
            facts: of this process.
            problem: why this process cannot take the step.
        """
        digest = int.from_bytes(blake2b(repr(facts).encode(), digest_size=7).digest())
        ours = torch.tensor([problem is not None, digest, -digest], device=self._device)
        mail = Transit.send(self.peers.largest(ours))
        before, self._mail = self._mail, (mail, facts)
        if self._device.type != "cpu":
            if before is None or problem is not None:
                return
            mail, facts = before
        failed, most, least = mail.read().tolist()
        if not failed and most == -least:
            return
        self._mail = None
        explained = self._explain(facts, problem)
        raise problem or ValueError(f"{owner}: {explained}")

    def _explain(self, facts: Mapping[str, Any], problem: Exception | None) -> str:
        everyone = self.peers.everyone((facts, None if problem is None else f"{type(problem).__name__}: {problem}"))
        problems = {rank: said[1] for rank, said in zip(self.peers.ranks, everyone, strict=True) if said[1]}
        if problems:
            rank, what = next(iter(problems.items()))
            return f"rank {rank} cannot take this step, and nothing has moved on any: {what}"
        first = everyone[0][0]
        for rank, (theirs, _) in zip(self.peers.ranks, everyone, strict=True):
            for key in (*first, *theirs):
                if first.get(key, "absent") != theirs.get(key, "absent"):
                    return _difference(key, self.peers.ranks[0], first.get(key), rank, theirs.get(key))
        return "the processes disagree about what to do; make the same optimizer on each"


def _difference(key: str, rank: int, ours: Any, other: int, theirs: Any) -> str:
    if MISSING in (ours, theirs):
        rank, other = (rank, other) if theirs == MISSING else (other, rank)
        return (
            f"{key} is there on rank {rank} and missing on rank {other}; nothing has moved. Every process needs a "
            "gradient of the same parameters: let the loss depend on all of them everywhere, times 0 if need be"
        )
    return f"{key} is {ours!r} on rank {rank} and {theirs!r} on rank {other}; it has to be the same. Nothing has moved"
