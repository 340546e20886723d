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

from typing import Annotated, Unpack

from emerging_optimizers.engine.options import (
    Betas,
    CorrectBias,
    LearningRate,
    MatrixParams,
    MaxUpdateRms,
    Nesterov,
    ShampooBeta,
    WeightDecay,
    WeightDecayMethod,
    given,
)
from emerging_optimizers.soap.options import (
    CorrectFactorBias,
    FactorEps,
    PowerIterSteps,
    ProductPrecision,
    RefreshPrecision,
    SOAPOptions,
    UseEigh,
    UseKLShampoo,
)
from emerging_optimizers.soap.soap import SOAP

StackedSoapParams = Annotated[
    MatrixParams,
    "tensors of two or more dimensions, (name, tensor) pairs, or groups. 3-D: a stack of matrices, joined "
    "along their shorter side.",
]


class StackedSoap(SOAP):
    """`SOAP` with two other defaults: `matrix_view="joined"` and `use_kl_shampoo=True`.

    Update: `soap` with KL factors, of a 3-D parameter's matrices side by side
    When to use it: a stack of a few long matrices, which share the long side's factor
    When not to use it: b matrices with sides S < T where T² < b S²: SOAP then keeps less

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

    preset = {"matrix_view": "joined"}

    def __init__(
        self,
        params: StackedSoapParams,
        lr: LearningRate,
        betas: Betas = (0.9, 0.95),
        shampoo_beta: ShampooBeta = 0.95,
        eps: FactorEps = 1e-8,
        weight_decay: WeightDecay = 0.01,
        *,
        weight_decay_method: WeightDecayMethod = "decoupled",
        nesterov: Annotated[Nesterov, "Adam with Nesterov momentum."] = False,
        correct_bias: Annotated[CorrectBias, "divide Adam's moments by 1 - beta^t."] = True,
        fp32_matmul_prec: ProductPrecision = "highest",
        use_eigh: UseEigh = False,
        qr_fp32_matmul_prec: RefreshPrecision = "high",
        power_iter_steps: PowerIterSteps = 1,
        max_update_rms: MaxUpdateRms = 0.0,
        use_kl_shampoo: UseKLShampoo = True,
        correct_shampoo_beta_bias: CorrectFactorBias = None,
        **engine: Unpack[SOAPOptions],
    ) -> None:
        super().__init__(**given(locals()))
