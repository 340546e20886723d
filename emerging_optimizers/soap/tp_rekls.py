r"""TpRekls: REKLS on matrices whose rows or columns lie on several processes, as plain tensors.

The equations are those of `soap.soap` with `use_kl_shampoo=True` and `use_eigh=True`, on the whole matrix. Each process
of a tensor-parallel group has a shard of the weight and of its gradient; the shards may differ in length. One of the
processes owns the matrix: it puts the gradient together, takes the step of `REKLS`, and hands out the direction, by
which each process moves its shard. So the guard sees the whole gradient, and the owners share the work. It is what
every optimizer does with a DTensor (`distributed/`).

State of an M x N matrix on its owner: 2 MN + 2 M^2 + 2 N^2 + M + N numbers; on the others none. `state` and checkpoints
have whole tensors on the owner, and tensors without elements elsewhere. The processes load at the same time, each what
it has written, or what the published class or an earlier release has: rows of factors are put together again.

References:
    Lin et al. 2025, Understanding and Improving Shampoo and SOAP via Kullback-Leibler Minimization, arXiv 2509.03378.
    NVIDIA 2026, Emerging-Optimizers, tensor-parallel REKLS.
"""

from typing import Annotated, Unpack

import torch.distributed as dist

from emerging_optimizers.distributed.groups import Peers
from emerging_optimizers.distributed.layout import Layout
from emerging_optimizers.distributed.tensor_parallel import TensorParallel
from emerging_optimizers.engine import EngineOptions
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
from emerging_optimizers.soap.options import FactorEps, ProductPrecision
from emerging_optimizers.soap.rekls import REKLS

TpReklsParams = Annotated[
    MatrixParams,
    "tensors of two or more dimensions, (name, tensor) pairs, or groups. A group's `partition_dim` says "
    "along which axis of a matrix its parameters are sharded, 0 or 1, as they are stored; of three dimensions without "
    "the first. None, the default: not sharded. Groups may also set the options of `REKLS` that have no argument "
    "here.",
]


ProcessGroupOption = Annotated[
    dist.ProcessGroup | None,
    "the processes among which the shards lie, in order; None: this process alone. Each makes the same optimizer, "
    "steps and loads checkpoints at the same time, and has a gradient for the same parameters.",
]


class TpRekls(REKLS):
    """REKLS over a tensor-parallel group; where what lies is in this module's docstring.

    Update: `rekls` on the whole of a matrix of which each process has a shard
    When to use it: tensor-parallel weights that are plain tensors
    When not to use it: DTensors and whole weights, which `rekls` takes

    Raises:
        ValueError: a value out of its range, a parameter with fewer than two dimensions, or tensors that are no shards
            of one matrix.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(4, 2))
        >>> optimizer = TpRekls([{"params": [w], "partition_dim": 0}], lr=0.1, tp_group=None)
        >>> w.grad = torch.ones(4, 2)
        >>> optimizer.step()
        >>> w[0]
        tensor([-0.1000, -0.1000], grad_fn=<SelectBackward0>)
    """

    ranges = {"partition_dim": one_of(None, 0, 1)}
    preset = {"partition_dim": None}
    _kept = ("execution", "_peers")
    _peers: Peers | None = None

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
        group = options.pop("tp_group")
        self._peers = None if group is None else Peers(group)
        super().__init__(**options)

    @property
    def tp_group(self) -> dist.ProcessGroup | None:
        """See the class. A copy has the same; a pickle is loaded on the same processes at the same time."""
        return None if self._peers is None else self._peers.group

    def _layout(self) -> Layout:
        return TensorParallel(self.tp_group, by_rows=("L", "R", "Q_L", "Q_R"))
