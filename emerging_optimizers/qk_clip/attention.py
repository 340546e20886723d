r"""One attention module: which rows of its parameters belong to which head, and by how much they are scaled.

With S_h the largest logit of query head h and :math:`\tau` the threshold, its logits are to become
:math:`\gamma_h = \min(1, \tau / S_h)` times as large. Of the heads H(g) that share the key head g

.. math:: k_g = \Big(\max_{h \in H(g)} \gamma_h\Big)^{1 - \alpha}, \qquad q_h = \gamma_h / k_g

are the factors of keys and queries. With a key head for each query head that is :math:`\gamma^{1 - \alpha}` and
:math:`\gamma^\alpha`, as published. A shared key takes what all of its heads can bear: one head that is not clipped
leaves the key as it is, and the others' queries take all. So no factor is above 1, and a head that is not clipped keeps
its weights bit for bit. A key that all heads share, latent attention's rotary one, is left as it is by the same
reasoning, and the rotary part of the queries takes :math:`\gamma_h`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from emerging_optimizers.distributed.dtensor import is_dtensor, local_of, piece_of, spread_of
from emerging_optimizers.linalg.rounding import join_bfloat16_, split_bfloat16_

QUERY, KEY, ROTARY = "query", "key", "rotary"


class Span(NamedTuple):
    """Where the rows of heads lie: in each of `periods` equal parts of a parameter `heads` of them, one below another.

    Attributes:
        part: QUERY, KEY or ROTARY, the queries' part that meets a key which all heads share.
        offset: the first row of the first one within a period.
        size: rows of a head.
    """

    part: str
    periods: int
    offset: int
    heads: int
    size: int


def called(path: str) -> str:
    """How messages name the module at a path."""
    return path or "the model itself"


@dataclass
class Rows:
    """A parameter of which rows belong to heads.

    Attributes:
        name: as in `model.named_parameters()`.
        module: whose parameter it is; asked anew in each step, since FSDP2 puts another parameter in its place.
        own: what the module calls it.
        axis: along which its rows lie.
        factor_R: for each row, the place of its factor in `Attention.factors`.
    """

    name: str
    module: nn.Module
    own: str
    axis: int
    factor_R: Tensor
    _here: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    @property
    def parameter(self) -> Tensor:
        """The parameter as it is now.

        Raises:
            ValueError: it has not as many rows as it had.
        """
        p: Tensor = getattr(self.module, self.own)
        if p.ndim <= self.axis or p.shape[self.axis] != len(self.factor_R):
            raise ValueError(
                f"QKClip: {self.name} has shape {tuple(p.shape)}, and {len(self.factor_R)} rows when QKClip was made; "
                "make QKClip again after such a change. Of what shards parameters, FSDP2 and DTensor are known"
            )
        return p

    def scale(self, factors_F: Tensor, states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Multiply each row by its factor, in float32 at least, rounded once.

        Args:
            factors_F: `Attention.factors`.
            states: an optimizer's, in which the same rows are scaled of what goes on being a part of the weight: the
                bits that it lacks to float32, and the average of `ScheduleFree`, which follows with the rest.
        """
        p = self.parameter
        if self._here is None or self._here[0] is not p:
            self._here = p, self._factors_here(p).to(p.device)
        local, index = local_of(p.detach()), self._here[1]
        if not local.numel():
            return
        shape, state = [1] * local.ndim, states.get(p, {})
        shape[self.axis] = -1
        factors = factors_F.to(local.device)[index].view(shape)
        if "weight_bits" in state:
            bits = local_of(state["weight_bits"])
            wide = torch.empty(local.shape, dtype=torch.float32, device=local.device)
            join_bfloat16_(wide, local, bits)
            split_bfloat16_(local, bits, wide.mul_(factors))
        else:
            local.copy_(local * factors)
        if "z" in state:
            local_of(state["average"]).mul_(factors)

    def _factors_here(self, p: Tensor) -> Tensor:
        """`factor_R` of the rows that lie on this process."""
        if not is_dtensor(p):
            return self.factor_R
        here = torch.zeros(local_of(p).shape[self.axis] if local_of(p).numel() else 0, dtype=torch.long)
        for box in spread_of(self.name, p).boxes(dist.get_rank()):
            here[box.local_slices[self.axis]] = self.factor_R[box.slices[self.axis]]
        return here


@dataclass
class Attention:
    """An attention module, what was seen of its logits, and how often its heads were clipped.

    Attributes:
        name: its path in the model, without wrappers.
        module: itself.
        heads: H, how many query heads it has.
        key_heads: G, how many key heads; H is a multiple of it.
        head_dim: the length of a query.
        rows: its parameters; the first is the query projection's weight.
        seen: the largest logits of the heads that this process works on, since the last step; None: nothing yet.
        latest_H: those of the last step, of all processes.
        clips_H: how often each head was clipped.
        looks: how often its attention was seen since the module was last called.
    """

    name: str
    module: nn.Module
    heads: int
    key_heads: int
    head_dim: int
    rows: list[Rows] = field(default_factory=list)
    seen: Tensor | None = None
    latest_H: Tensor = field(init=False)
    clips_H: Tensor = field(init=False)
    looks: int = 0

    def __post_init__(self) -> None:
        self.latest_H = torch.full((self.heads,), -torch.inf)
        self.clips_H = torch.zeros(self.heads, dtype=torch.long)

    def add(self, name: str, module: nn.Module, own: str, axis: int, spans: Sequence[Span]) -> None:
        """Take in a parameter, with what its rows are."""
        factor_R = torch.zeros(getattr(module, own).shape[axis], dtype=torch.long)
        first = {QUERY: 1, KEY: 1 + self.heads, ROTARY: 1 + self.heads + self.key_heads}
        for part, periods, offset, heads, size in spans:
            place = first[part] + torch.arange(periods * heads).view(periods, heads)
            factor_R.view(periods, -1)[:, offset : offset + heads * size] = place.repeat_interleave(size, dim=1)
        self.rows.append(Rows(f"{name}.{own}".lstrip("."), module, own, axis, factor_R))

    @property
    def called(self) -> str:
        """How messages name it."""
        return called(self.name)

    @property
    def device(self) -> torch.device:
        """Of its query projection."""
        return self.rows[0].parameter.device

    def record(self, maxima: Tensor) -> None:
        """Take in largest logits; those of several forward passes count together.

        Raises:
            ValueError: they are of a number of heads that this process does not work on.
        """
        maxima = maxima.detach().to(self.device, torch.float32)
        if maxima.numel() != self.heads:
            self._first_head(maxima.numel())
        if self.seen is not None and self.seen.shape != maxima.shape:
            raise ValueError(
                f"QKClip: {self.called} had {self.seen.numel()} heads in one forward pass, {maxima.numel()} in another"
            )
        self.seen = maxima if self.seen is None else torch.maximum(self.seen, maxima)

    def whole(self) -> Tensor:
        """What was seen, for all heads; -inf for those of which this process has seen nothing."""
        if self.seen is None:
            return torch.full((self.heads,), -torch.inf, device=self.device)
        if self.seen.numel() == self.heads:
            return self.seen
        first, found_H = self._first_head(self.seen.numel()), self.seen.new_full((self.heads,), -torch.inf)
        found_H[first : first + self.seen.numel()] = self.seen
        return found_H

    def _first_head(self, number: int) -> int:
        """Which heads so many are, where tensor parallelism gives each process its own."""
        p = self.rows[0].parameter
        parts, index = piece_of(p, self.rows[0].axis) if is_dtensor(p) else (1, 0)
        if number * parts != self.heads:
            raise ValueError(
                f"QKClip: the logits of {number} heads of {self.called} were seen or given, and it has {self.heads}, "
                f"cut into {parts} by tensor parallelism; give what is wrong to QKClip as heads= or projections=, or "
                "use measure=False and give the largest logit of each head with observe()"
            )
        return number * index

    def clip(
        self, maxima_H: Tensor, threshold: float, alpha: float, states: Mapping[Tensor, Mapping[str, Any]]
    ) -> None:
        """Scale the rows of those heads whose largest logit is above the threshold; `states` as in `Rows.scale`."""
        clipped_H = torch.isfinite(maxima_H) & (maxima_H > threshold)
        self.latest_H, self.clips_H = maxima_H.clone(), self.clips_H.to(maxima_H.device) + clipped_H
        if maxima_H.device.type == "cpu" and not clipped_H.any():
            return  # an accelerator is not asked: that would wait for it
        gamma_H = (threshold / maxima_H).clamp_min(torch.finfo(maxima_H.dtype).tiny)  # at 0 the rest would be 0 / 0
        factors_F = self.factors(torch.where(clipped_H, gamma_H, 1.0), alpha)
        for rows in self.rows:
            rows.scale(factors_F, states)

    def factors(self, gamma_H: Tensor, alpha: float) -> Tensor:
        """1 for rows that stay, then those of queries, of keys, and of the rotary parts of queries."""
        key_G = gamma_H.view(self.key_heads, -1).amax(1) ** (1 - alpha)
        query_H = gamma_H / key_G.repeat_interleave(self.heads // self.key_heads)
        return torch.cat([gamma_H.new_ones(1), query_H, key_G, gamma_H])
