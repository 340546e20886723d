"""What is measured of the parameters of one step, stack by stack."""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emerging_optimizers.distributed.dtensor import is_dtensor
from emerging_optimizers.engine import Phase, RuleOptimizer
from emerging_optimizers.engine.buckets import Bucket
from emerging_optimizers.engine.matrix_view import Block
from emerging_optimizers.engine.packing import CODES, SCALES, named, widened
from emerging_optimizers.engine.parts import Decay, Part, parts_of
from emerging_optimizers.engine.weight_decay import keep_factor
from emerging_optimizers.linalg.kronecker import conjugate_diagonal, project_in
from emerging_optimizers.linalg.precision import fp32_matmul_precision
from emerging_optimizers.watch import stacks

# Columns whose rotation is measured: they carry most of a decaying spectrum, and a copy of them costs little.
LEADING = 8
# Where the group sets no `relative_floor`, eigenvalues below this share of their mean count as it: in training the
# smallest are rounding noise, and nothing divides by them.
FLOOR = 1e-2
# The options by which a group says that its update is orthogonalized: this library's, and torch.optim.Muon's.
NEWTON_SCHULZ = {"num_ns_steps", "ns_steps"}
# Averages of gradients in the state of torch's optimizers, by the class or a base of it.
TORCHS: Mapping[str, tuple[str, Part]] = {
    "Adam": ("exp_avg", Part(averages=Decay("betas", 0))),
    "AdamW": ("exp_avg", Part(averages=Decay("betas", 0))),
    "Muon": ("momentum_buffer", Part(averages=Decay("momentum"))),
    "SGD": ("momentum_buffer", Part(averages=Decay("dampening"))),
}


class Member(NamedTuple):
    """A block of a parameter in an observed step, nearly always all of it.

    `limit` is the norm above which the spike guard scaled its gradient down.
    """

    name: str
    group: int
    p: Tensor
    block: Block
    before: Tensor
    limit: Tensor | None

    @property
    def grad(self) -> Tensor:
        assert self.p.grad is not None
        return self.block.of(self.p.grad)


class Measures:
    """Measures the blocks of an optimizer's parameters; keeps the leading eigenvectors of the last time."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._leading: dict[tuple[str, str], Tensor] = {}

    def every(self, members: Sequence[Member]) -> tuple[list[tuple[str, str]], list[Tensor]]:
        """Everything that is measured of these blocks, shape by shape: names and measures, and their values."""
        alike: dict[Any, list[Member]] = {}
        for m in members:
            kept = frozenset(key for key, x in self._state(m).items() if x is not None)
            alike.setdefault((m.group, m.before.shape, m.block.item, m.p.dtype, m.p.device, kept), []).append(m)
        keys: list[tuple[str, str]] = []
        values: list[Tensor] = []
        with fp32_matmul_precision("highest"):
            for (*_, kept), stack in alike.items():
                for measure, value_P in self.of(stack, kept).items():
                    keys += [(m.name, measure) for m in stack]
                    values.append(value_P)
        return keys, values

    def _state(self, m: Member) -> Mapping[str, Any]:
        state, end = self.optimizer.state.get(m.p, {}), m.block.key
        return {key.removesuffix(end): x for key, x in state.items() if key.endswith(end)}

    def of(self, stack: Sequence[Member], kept: Container[str]) -> dict[str, Tensor]:
        """The measures of P blocks of one group, shape and dtype, each (P,); `kept` are their states' keys."""
        p, group = stack[0].p, self.optimizer.param_groups[stack[0].group]
        wide = stacks.wide(p.dtype)
        # P b M N for matrices, P n for vectors
        item = stack[0].block.item

        def stacked(tensors: Iterable[Tensor]) -> Tensor:
            return torch.stack([x.to(wide) for x in tensors]).reshape(len(stack), -1, *item)

        def states(key: str) -> Tensor:
            return torch.stack([self._state(m)[key] for m in stack]).to(p.device)

        grad = stacked(m.grad for m in stack)
        update = self._update(group, stacked(m.before for m in stack), stacked(m.block.of(m.p) for m in stack))
        grad_norm, update_norm = stacks.norm(grad), stacks.norm(update)
        lr = torch.as_tensor(group["lr"], dtype=wide, device=p.device).reshape(())
        found = {
            "grad_norm": grad_norm,
            "update_rms": stacks.ratio(update_norm, lr * grad[0].numel() ** 0.5),
            "alignment": stacks.ratio(stacks.dot(update, grad), update_norm * grad_norm),
        }
        bases = {key: states(key).reshape(len(stack), -1, n, n)
                 for key, n in zip(("Q_L", "Q_R"), item, strict=False)
                 if key in kept and self._state(stack[0])[key].shape[-2:] == (n, n)}  # fmt: skip
        found |= self._share(stack, kept, grad, bases)
        if item:
            unit = stacks.ratio(update, torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True))
            found["stable_rank"] = stacks.stable_rank(unit).amin(dim=1)
            if group.keys() & NEWTON_SCHULZ and wide == p.dtype:
                found["ns_residual"] = stacks.ns_residual(unit).amax(dim=1)
        sides = [self._side(stack, key, states(key[-1]), basis) for key, basis in bases.items()]
        for measure in {measure for side in sides for measure in side}:
            found[measure] = torch.stack([side[measure] for side in sides if measure in side]).amax(dim=0)
        if isinstance(self.optimizer, RuleOptimizer):
            homes = [self._home(m) for m in stack]
            for measure in ("scaled", "skipped") if not homes[0][0].elsewhere else ():
                counts = [bucket.unit_view(row, getattr(bucket, measure)).sum() for bucket, row in homes]
                found[f"guard_{measure}"] = torch.stack(counts)
        return found

    def _update(self, group: Mapping[str, Any], before: Tensor, after: Tensor) -> Tensor:
        """By how much weights have moved, but for decay."""
        if not isinstance(self.optimizer, RuleOptimizer):
            return before - after
        update = before * keep_factor(group["weight_decay_method"], group["lr"], group["weight_decay"]) - after
        if group["weight_decay_method"] != "cautious":
            return update
        return torch.where(update * before >= 0, update, before - after)

    def _share(
        self, stack: Sequence[Member], kept: Container[str], grad: Tensor, bases: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Which part of the momentum the newest gradients are, where the state has an average of them."""
        key, part = self._average(stack[0])
        if part.averages is None or not (key in kept or (key and named(key, CODES) in kept)):
            return {}
        kept_here = [self._kept(m, key) for m in stack]
        if kept_here[0].numel() != grad[0].numel():  # a shard, whose state is that of the whole matrix, or elsewhere
            return {}
        states = [m.block.restack(x) for m, x in zip(stack, kept_here, strict=True)]
        heard = stacks.guarded(grad, [m.limit for m in stack])
        if part.rotated:
            heard = project_in(heard, bases.get("Q_L"), bases.get("Q_R"))
        momentum = torch.stack([x.to(grad) for x in states]).reshape(grad.shape)
        weight = part.averages.weight(self.optimizer.param_groups[stack[0].group])
        share = stacks.ratio(stacks.dot(heard, momentum), stacks.dot(momentum, momentum))
        return {"momentum_share": weight * share}

    def _side(self, stack: Sequence[Member], key: str, factor: Tensor, basis: Tensor) -> dict[str, Tensor]:
        """What is measured of one Kronecker factor and its basis, (P, b, N, N) each."""
        values = conjugate_diagonal(factor.reshape(basis.shape), basis)
        asked = self.optimizer.param_groups[stack[0].group].get("relative_floor")
        floor = (FLOOR if asked is None else asked) * values.mean(dim=-1)
        largest, smallest = values.amax(dim=-1), torch.maximum(values.amin(dim=-1), floor)
        smallest = torch.maximum(smallest, largest * torch.finfo(values.dtype).eps)
        found = {"factor_condition": stacks.ratio(largest, smallest).amax(dim=1)}
        k = max(1, min(LEADING, basis.size(-1) // 2))
        leading = basis[..., :k].clone()
        last = [self._leading.get((m.name, key)) for m in stack]
        if all(x is not None and x.shape == leading.shape[1:] for x in last):
            overlap = torch.stack([x for x in last if x is not None]).mT @ leading
            cosine = torch.linalg.vector_norm(overlap, dim=(-2, -1)) / k**0.5
            found["basis_rotation"] = cosine.clamp(max=1).arccos().rad2deg().amax(dim=1)
        self._leading.update({(m.name, key): x for m, x in zip(stack, leading, strict=True)})
        return found

    def _kept(self, m: Member, key: str) -> Tensor:
        """A part of its state; numbers, where it is in 8 bits, and none, where that is spread over processes."""
        state = self._state(m)
        if key in state:
            kept: Tensor = state[key]
            return kept
        codes, scales = state[named(key, CODES)], state[named(key, SCALES)]
        return codes.new_empty(0) if is_dtensor(m.p) else widened(m.block, codes, scales, m.p)

    def _average(self, m: Member) -> tuple[str, Part]:
        """The part of its state that is an average of gradients, with its key; one that averages nothing: none is."""
        if isinstance(self.optimizer, RuleOptimizer):
            bucket, _ = self._home(m)
            parts = parts_of(type(bucket.state))
            return next(((key, part) for key, part in parts.items() if part.averages is not None), ("", Part()))
        names = (cls.__name__ for cls in type(self.optimizer).__mro__)
        return next((TORCHS[name] for name in names if name in TORCHS), ("", Part()))

    def _home(self, m: Member) -> tuple[Bucket, int]:
        """Where the engine keeps a member."""
        assert isinstance(self.optimizer, RuleOptimizer)
        return next(home for home in self.optimizer._places.homes[m.p] if home[0].blocks[home[1]].key == m.block.key)

    def basis_age(self, m: Member) -> dict[str, float]:
        """Steps since the last refresh of a block that has bases."""
        if not (isinstance(self.optimizer, RuleOptimizer) and self._state(m).keys() & {"Q_L", "Q_R"}):
            return {}
        (bucket, row), rule = self._home(m), self.optimizer._checked_rule(m.group)
        count, turn, phase = bucket.counts[row], bucket.turns[row], rule.schedule.phase
        return {"basis_age": next((k for k in range(count) if phase(count - k, turn) is not Phase.REUSE), count)}
