r"""TpRekls: REKLS on matrices whose rows or columns lie on several processes.

The equations are those of `soap.soap` with `use_kl_shampoo=True` and `use_eigh=True`, on the whole matrix. Each process
of a tensor-parallel group has a shard of the weight and of its gradient. It gathers the gradient, forms the whole
update as every other process does, and moves its own shard. Factors and bases are kept by rows, 1 / P of them on each
of P processes, and gathered too: a step moves the matrix once and M^2 + N^2 numbers twice.

The result is that of `REKLS` on the whole matrix. The guard sees the norm of the whole gradient, so that every process
skips a matrix, or none does.

State of an M x N matrix on each process: 2 MN + 2 (M^2 + N^2) / P + M + N numbers.

References:
    Lin et al. 2025, Understanding and Improving Shampoo and SOAP via Kullback-Leibler Minimization, arXiv 2509.03378.
    NVIDIA 2026, Emerging-Optimizers, tensor-parallel REKLS.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, NamedTuple, Unpack

import torch
import torch.distributed as dist
from torch import Tensor

from emerging_optimizers.distributed.groups import gather, get_pg_rank, get_pg_size
from emerging_optimizers.engine import EngineOptions, Rule, RuleOptimizer, Scalars, Step
from emerging_optimizers.engine.guard import TotalT
from emerging_optimizers.engine.options import (
    Betas,
    LearningRate,
    MatrixParams,
    ShampooBeta,
    WeightDecay,
    WeightDecayMethod,
    given,
    one_of,
)
from emerging_optimizers.engine.rule import rule_of
from emerging_optimizers.linalg.eigh import eigh_descending
from emerging_optimizers.linalg.precision import FP32MatmulPrecT
from emerging_optimizers.soap.options import FactorEps, ProductPrecision
from emerging_optimizers.soap.soap import SOAP, SOAPRule, SOAPState


class _Whole(NamedTuple):
    """The state of a whole matrix within a step, and its gradient."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    L: Tensor | None
    R: Tensor | None
    Q_L: Tensor | None
    Q_R: Tensor | None
    eigvals_L: Tensor | None
    eigvals_R: Tensor | None
    grad: Tensor


@dataclass(frozen=True, kw_only=True)
class TpReklsRule(SOAPRule):
    """REKLS on the whole of what this process has a shard of."""

    use_eigh: bool = True
    use_kl_shampoo: bool = True
    fp32_matmul_prec: FP32MatmulPrecT = "high"
    partition_dim: int | None = None
    tp_group: Any = None

    @property
    def processes(self) -> int:
        """Over how many processes a matrix is spread."""
        return 1 if self.partition_dim is None else get_pg_size(self.tp_group)

    def total(self, x: Tensor) -> Tensor:
        """A sum over those processes."""
        total = x.clone()
        dist.all_reduce(total, group=self.tp_group)
        return total

    def whole(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The matrix of which a shard ends in `shape`."""
        M, N = shape[-2:]
        return M * (self.processes if self.partition_dim == 0 else 1), N * (
            self.processes if self.partition_dim == 1 else 1
        )

    def init(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> SOAPState:
        """Moments of the whole matrix; of factors and bases this process's rows."""
        return _sides(super().init((shape[0], *self.whole(shape)), dtype, device), self._rows)

    def accumulate(self, grad: Tensor, state: Any, t: Scalars) -> Any:
        """The state of the whole matrix, with the whole gradient, which is gathered once."""
        grad = grad if t.l2 is None else grad + t.l2  # before the shards are gathered, as published
        if self.processes > 1:
            assert self.partition_dim is not None
            grad = gather(grad, self.partition_dim - 2, self.tp_group)
        whole = super().accumulate(grad, _sides(state, self.whole_side), t)
        return _Whole(**whole._asdict(), grad=grad)

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """The step of the whole matrix, of which this process takes its shard and its rows."""
        out = super().update(state.grad, state, t._replace(l2=None))
        kept = SOAPState(*out.state[:-1])
        if self.processes == 1:
            return Step(out.direction, kept)
        assert self.partition_dim is not None
        shard = out.direction.chunk(self.processes, self.partition_dim - 2)[get_pg_rank(self.tp_group)]
        return Step(shard, _sides(kept, self._rows))

    def translate(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        """The published state has no bases: they are made of the factors again, by all processes at once."""
        saved = dict(super().translate(saved))
        if saved.keys() & {"Q_L", "Q_R"}:
            return saved
        for side in ("L", "R"):
            if side in saved:
                factor = self.whole_side(saved[side])  # of one matrix, or of each of a batch
                values, basis = eigh_descending(factor.reshape(-1, *factor.shape[-2:]))
                saved[f"eigvals_{side}"] = values.view(factor.shape[:-1])
                saved[f"Q_{side}"] = self._rows(basis.view(factor.shape))
        return saved

    def whole_side(self, x: Any) -> Any:
        """All rows."""
        return x if x is None or self.processes == 1 else gather(x, -2, self.tp_group)

    def _rows(self, x: Tensor | None) -> Tensor | None:
        if x is None or self.processes == 1:
            return x
        count = x.size(-2) // self.processes
        return x.narrow(-2, get_pg_rank(self.tp_group) * count, count).contiguous()


def _sides(s: SOAPState, change: Callable[[Any], Any]) -> SOAPState:
    return s._replace(L=change(s.L), R=change(s.R), Q_L=change(s.Q_L), Q_R=change(s.Q_R))


TpReklsParams = Annotated[
    MatrixParams,
    "tensors of two or more dimensions, (name, tensor) pairs, or groups. A group's `partition_dim` says "
    "along which axis of a matrix its parameters are sharded, 0 or 1; None, the default: not sharded. "
    "Groups may also set the options of `REKLS` that have no argument here, but `overlap`.",
]


ProcessGroupOption = Annotated[
    dist.ProcessGroup | None,
    "the processes among which the shards lie, in order; None: this process alone. Each makes the same optimizer, "
    "steps and loads checkpoints at the same time, and has a gradient for the same parameters.",
]


class TpRekls(RuleOptimizer):
    """REKLS over a tensor-parallel group; the equations are in this module's docstring.

    Raises:
        ValueError: a value out of its range, a parameter with fewer than two dimensions, or a sharded matrix with a
            side that is no multiple of the number of processes.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(4, 2))
        >>> optimizer = TpRekls([{"params": [w], "partition_dim": 0}], lr=0.1, tp_group=None)
        >>> w.grad = torch.ones(4, 2)
        >>> optimizer.step()
        >>> w[0]
        tensor([-0.1000, -0.1000], grad_fn=<SelectBackward0>)
    """

    rule = TpReklsRule
    # A refresh moves factors between the processes, which a stream of its own would do out of their common order.
    ranges = {**SOAP.ranges, "partition_dim": one_of(None, 0, 1), "overlap": one_of(False)}
    preset = {field.name: field.default for field in fields(TpReklsRule) if field.name != "tp_group"}
    _kept = ("execution", "tp_group")

    def __init__(
        self,
        params: TpReklsParams,
        lr: LearningRate,
        betas: Betas = (0.9, 0.95),
        shampoo_beta: ShampooBeta = 0.95,
        eps: FactorEps = 1e-8,
        weight_decay: WeightDecay = 0.01,
        *,
        weight_decay_method: WeightDecayMethod = "decoupled",
        tp_group: ProcessGroupOption = None,
        fp32_matmul_prec: ProductPrecision = "high",
        **engine: Unpack[EngineOptions],
    ) -> None:
        options = given(locals())
        self.tp_group = options.pop("tp_group")
        super().__init__(**options)

    @classmethod
    def _rule(cls, group: Mapping[str, Any]) -> Rule:
        return rule_of(TpReklsRule, {"tp_group": None, **group})

    def _make_rule(self, group: Mapping[str, Any]) -> Rule:
        rule = rule_of(TpReklsRule, {**group, "tp_group": self.tp_group})
        refused = {"execution": self.execution == "compiled", "nonfinite": group["nonfinite"] == "raise"}
        for name, asked in refused.items():
            if asked and rule.processes > 1:
                value = self.execution if name == "execution" else group[name]
                raise ValueError(
                    f"TpRekls: {name}={value!r} is not possible with partition_dim={rule.partition_dim} over "
                    f"{rule.processes} processes: it would leave them waiting for one another; leave {name!r} out"
                )
        return rule

    def _total(self, rule: Rule) -> TotalT | None:
        assert isinstance(rule, TpReklsRule)
        return None if rule.processes == 1 else rule.total

    @staticmethod
    def _check_parameter(p: Tensor, rule: Rule, label: str, owner: str) -> None:
        RuleOptimizer._check_parameter(p, rule, label, owner)
        assert isinstance(rule, TpReklsRule)
        rows = p.shape[-2] if p.ndim == 3 else p.shape[0]
        whole = rule.whole((rows, p.numel() // max(1, rows) // (p.shape[0] if p.ndim == 3 else 1)))
        if any(size % rule.processes for size in whole):
            raise ValueError(
                f"{owner}: {label} is a shard of a {whole[0]} x {whole[1]} matrix, whose factors are kept by rows: "
                f"both sides have to be multiples of the {rule.processes} processes of tp_group. Give such parameters "
                "to an element-wise optimizer, or replicate them (partition_dim=None)"
            )
