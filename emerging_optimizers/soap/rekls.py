r"""REKLS: Rotated Eigenbasis KL-Shampoo, SOAP with KL factors and a fresh eigh at every refresh.

The equations are those of `soap.soap` with `use_kl_shampoo=True` and `use_eigh=True`. A basis that is computed anew
does not lag behind its factor, which matters most after a gradient spike; it costs about twice an orthogonal
iteration.

References:
    Lin et al. 2025, Understanding and Improving Shampoo and SOAP via Kullback-Leibler Minimization, arXiv 2509.03378.
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
    ProductPrecision,
    RefreshPrecision,
    SOAPOptions,
)
from emerging_optimizers.soap.soap import SOAP


class REKLS(SOAP):
    """SOAP with KL factors and eigh; every other option of `SOAP` is here too, with its default.

    Update: as `soap`, factors as for `kl_shampoo`, bases by eigh
    When to use it: bases that do not lag, after spikes above all
    When not to use it: where a step must be fast: eigh is more than half of it on a CPU

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(4, 2))
        >>> optimizer = REKLS([w], lr=0.1)
        >>> w.grad = torch.ones(4, 2)
        >>> optimizer.step()
        >>> w[0]
        tensor([-0.1000, -0.1000], grad_fn=<SelectBackward0>)
    """

    fixed = {"use_eigh": True, "use_kl_shampoo": True}

    def __init__(
        self,
        params: Annotated[MatrixParams, "tensors of two or more dimensions, (name, tensor) pairs, or groups."],
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
        qr_fp32_matmul_prec: RefreshPrecision = "high",
        max_update_rms: MaxUpdateRms = 0.0,
        correct_shampoo_beta_bias: CorrectFactorBias = None,
        **engine: Unpack[SOAPOptions],
    ) -> None:
        super().__init__(**given(locals()))
