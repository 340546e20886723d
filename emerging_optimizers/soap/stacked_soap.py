r"""StackedSoap: SOAP on a stack of matrices as one, so that the stack shares its factors.

The equations are those of `soap.soap`, with `use_kl_shampoo=True`, on the matrix that a parameter (b, R, C) makes when
its matrices are joined along their shorter side:

.. math::
    W = \begin{cases} [W_1 \; W_2 \cdots W_b] \in \mathbb R^{R \times bC} & R \ge C \\
    [W_1;\, W_2;\, \ldots;\, W_b] \in \mathbb R^{bR \times C} & R < C \end{cases}

The factor of the longer side is one for the whole stack, instead of one for each matrix; that of the joined side also
knows what the matrices have in common. It is the view `matrix_view="joined"`; a 2-D parameter is SOAP's.

State, with S and T the shorter and the longer of R and C: 2 bRC + 2 T^2 + 2 (bS)^2 numbers, against SOAP's 2 bRC +
2 b (S^2 + T^2); it is the smaller one where T^2 > b S^2, that is for a few long matrices: fused heads, a handful of
experts. With many matrices in a stack, `SOAP`, or `max_precond_dim` smaller than bS, which then has no factor.

References:
    Vyas et al. 2024, SOAP: Improving and Stabilizing Shampoo using Adam, arXiv 2409.11321.
    NVIDIA 2026, Emerging-Optimizers, stacked SOAP for grouped linear layers.
"""

from typing import Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from emerging_optimizers.engine import EngineOptions
from emerging_optimizers.engine.weight_decay import WeightDecayT
from emerging_optimizers.linalg.precision import FP32MatmulPrecT
from emerging_optimizers.soap.soap import SOAP, FirstStepT


class StackedSoap(SOAP):
    """`SOAP` with two other defaults: `matrix_view="joined"` and `use_kl_shampoo=True`.

    Args:
        params: tensors of two or more dimensions, (name, tensor) pairs, or groups. 3-D: a stack of matrices, joined
            along their shorter side.
        lr: learning rate, >= 0.
        betas: decay of Adam's moments, each in [0, 1).
        shampoo_beta: decay of the factors, in [0, 1).
        eps: added to the root of the second moment, and the floor of the eigenvalues with KL; > 0.
        weight_decay: >= 0.
        weight_decay_method: "decoupled", "independent", "l2" or "palm".
        nesterov: Adam with Nesterov momentum.
        correct_bias: divide Adam's moments by 1 - beta^t.
        fp32_matmul_prec: float32 matmul precision of factors and projections.
        use_eigh: take the bases from eigh at every refresh instead of one orthogonal iteration.
        qr_fp32_matmul_prec: float32 matmul precision of the refresh.
        power_iter_steps: orthogonal iterations a refresh, >= 1.
        max_update_rms: scale an update down whose RMS is larger; 0: never.
        use_kl_shampoo: the factors of KL-Shampoo.
        correct_shampoo_beta_bias: bias-correct the factors; None: as `correct_bias`.
        first_step: "adam", or "eigenbasis" for the published start.
        precondition_frequency: steps from one refresh of the bases to the next, >= 1.
        refresh_ramp: with `precondition_frequency` above 1, the steps after the first basis in which it is refreshed in
            each, before that thins out to the frequency, >= 0; half of the learning rate's warm-up is a good choice.
        max_precond_dim: a side of the joined matrix that is longer is not preconditioned; None: no limit.
        relative_floor: with KL, eigenvalues below this share of their mean count as it, in [0, 1). None: 0.01, or 0
            with the published start.
        overlap: refresh the bases at the end of a step instead of in it: on CUDA on a stream of its own, beside the
            model. An update is then taken in bases that have not seen its gradient, which may cost loss
            (docs/performance.md).
        **engine: see `EngineOptions`. Another `matrix_view`, of the optimizer or of a group, takes the place of
            "joined" there.

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> import torch
        >>> experts = torch.nn.Parameter(torch.zeros(3, 8, 2))
        >>> optimizer = StackedSoap([experts], lr=0.1)
        >>> experts.grad = torch.ones(3, 8, 2)
        >>> optimizer.step()
        >>> [tuple(optimizer.state[experts][key].shape) for key in ("exp_avg", "L", "R")]
        [(8, 6), (8, 8), (6, 6)]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.95),
        shampoo_beta: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        weight_decay_method: WeightDecayT = "decoupled",
        nesterov: bool = False,
        correct_bias: bool = True,
        fp32_matmul_prec: FP32MatmulPrecT = "highest",
        use_eigh: bool = False,
        qr_fp32_matmul_prec: FP32MatmulPrecT = "high",
        power_iter_steps: int = 1,
        max_update_rms: float = 0.0,
        use_kl_shampoo: bool = True,
        correct_shampoo_beta_bias: bool | None = None,
        first_step: FirstStepT = "adam",
        precondition_frequency: int = 1,
        refresh_ramp: int = 0,
        max_precond_dim: int | None = 10000,
        relative_floor: float | None = None,
        overlap: bool = False,
        **engine: Unpack[EngineOptions],
    ) -> None:
        engine.setdefault("matrix_view", "joined")
        super().__init__(
            params,
            lr,
            betas,
            shampoo_beta,
            eps,
            weight_decay,
            weight_decay_method=weight_decay_method,
            nesterov=nesterov,
            correct_bias=correct_bias,
            fp32_matmul_prec=fp32_matmul_prec,
            use_eigh=use_eigh,
            qr_fp32_matmul_prec=qr_fp32_matmul_prec,
            power_iter_steps=power_iter_steps,
            max_update_rms=max_update_rms,
            use_kl_shampoo=use_kl_shampoo,
            correct_shampoo_beta_bias=correct_shampoo_beta_bias,
            first_step=first_step,
            precondition_frequency=precondition_frequency,
            refresh_ramp=refresh_ramp,
            max_precond_dim=max_precond_dim,
            relative_floor=relative_floor,
            overlap=overlap,
            **engine,
        )
