r"""REKLS: Rotated Eigenbasis KL-Shampoo, SOAP with KL factors and a fresh eigh at every refresh.

The equations are those of `soap.soap` with `use_kl_shampoo=True` and `use_eigh=True`. A basis that is computed anew
does not lag behind its factor, which matters most after a gradient spike; it costs about twice an orthogonal
iteration.

References:
    Lin et al. 2025, Understanding and Improving Shampoo and SOAP via Kullback-Leibler Minimization, arXiv 2509.03378.
"""

from typing import Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from emerging_optimizers.engine import EngineOptions
from emerging_optimizers.engine.weight_decay import WeightDecayT
from emerging_optimizers.linalg.precision import FP32MatmulPrecT
from emerging_optimizers.soap.soap import SOAP, FirstStepT


class REKLS(SOAP):
    """SOAP with KL factors and eigh; every other option of `SOAP` is here too, with its default.

    Args:
        params: tensors of two or more dimensions, (name, tensor) pairs, or groups.
        lr: learning rate, >= 0.
        betas: decay of Adam's moments, each in [0, 1).
        shampoo_beta: decay of the factors, in [0, 1).
        eps: added to the root of the second moment, and the floor of the eigenvalues; > 0.
        weight_decay: >= 0.
        weight_decay_method: "decoupled", "independent", "l2" or "palm".
        nesterov: Adam with Nesterov momentum.
        correct_bias: divide Adam's moments by 1 - beta^t.
        fp32_matmul_prec: float32 matmul precision of factors and projections.
        qr_fp32_matmul_prec: float32 matmul precision of the refresh.
        max_update_rms: scale an update down whose RMS is larger; 0: never.
        correct_shampoo_beta_bias: bias-correct the factors; None: as `correct_bias`.
        first_step: "adam", or "eigenbasis" for the published start.
        precondition_frequency: steps from one refresh of the bases to the next, >= 1.
        refresh_ramp: with `precondition_frequency` above 1, the steps after the first basis in which it is refreshed in
            each, before that thins out to the frequency, >= 0; half of the learning rate's warm-up is a good choice.
        max_precond_dim: a side that is longer is not preconditioned; None: no limit.
        relative_floor: eigenvalues below this share of their mean count as it, in [0, 1). None: 0.01, or 0 with the
            published start.
        overlap: refresh the bases at the end of a step instead of in it: on CUDA on a stream of its own, beside the
            model. An update is then taken in bases that have not seen its gradient, which may cost loss
            (docs/performance.md).
        **engine: see `EngineOptions`.

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
        qr_fp32_matmul_prec: FP32MatmulPrecT = "high",
        max_update_rms: float = 0.0,
        correct_shampoo_beta_bias: bool | None = None,
        first_step: FirstStepT = "adam",
        precondition_frequency: int = 1,
        refresh_ramp: int = 0,
        max_precond_dim: int | None = 10000,
        relative_floor: float | None = None,
        overlap: bool = False,
        **engine: Unpack[EngineOptions],
    ) -> None:
        for fixed in ("use_eigh", "use_kl_shampoo"):
            if fixed in engine:
                raise TypeError(f"REKLS has no argument {fixed!r}: it is SOAP with {fixed}=True; use SOAP to choose")
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
            use_eigh=True,
            qr_fp32_matmul_prec=qr_fp32_matmul_prec,
            max_update_rms=max_update_rms,
            use_kl_shampoo=True,
            correct_shampoo_beta_bias=correct_shampoo_beta_bias,
            first_step=first_step,
            precondition_frequency=precondition_frequency,
            refresh_ramp=refresh_ramp,
            max_precond_dim=max_precond_dim,
            relative_floor=relative_floor,
            overlap=overlap,
            **engine,
        )
