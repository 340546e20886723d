r"""KL-SOAP under the names of the August 2026 release: with orthogonal iteration, with eigh, and with MAdam inside.

The equations are those of `soap.soap` with `use_kl_shampoo=True`. `KlSoapV3` is SOAP with that switch and `ReklsV3` is
REKLS; both have these names so that configurations that carry them run. `KlMSoap` has MAdam in place of Adam in the
eigenbasis: no epsilon shortens the update of small gradients,

.. math::
    U_t = Q_L \, \hat M_t / \sqrt{\hat V_t} \, Q_R^\top

and :math:`V` is kept times :math:`2^{16}`, so that squares of small numbers do not vanish; `eps` is the floor of the
factors' eigenvalues alone. It is for models whose gradients are near 1e-8, where Adam's epsilon decides.

State for an M x N matrix: 2 MN + 2 M^2 + 2 N^2 + M + N numbers.

References:
    Lin et al. 2025, Understanding and Improving Shampoo and SOAP via Kullback-Leibler Minimization, arXiv 2509.03378.
    Vyas et al. 2024, SOAP: Improving and Stabilizing Shampoo using Adam, arXiv 2409.11321.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Unpack

import torch
from torch import Tensor

from emerging_optimizers.engine import EngineOptions, Rule, Scalars
from emerging_optimizers.engine.options import (
    Betas,
    LearningRate,
    MatrixParams,
    ShampooBeta,
    WeightDecay,
    WeightDecayMethod,
    given,
)
from emerging_optimizers.engine.rule import Where, rule_of
from emerging_optimizers.engine.validate import checked_update
from emerging_optimizers.scalar_optimizers.adamw import AdamState
from emerging_optimizers.scalar_optimizers.functions import calculate_adam_update, calculate_madam_update
from emerging_optimizers.scalar_optimizers.madam import MAdamState, madam_direction, madam_largest_norm
from emerging_optimizers.soap.options import FactorEps, StreamList
from emerging_optimizers.soap.preconditioners import (
    KlSoapPreconditioner,
    ReklsPreconditioner,
    SoapPreconditionerProtocol,
    SoapPreconditionerRule,
)
from emerging_optimizers.soap.soap import SOAP, SOAPRule


@dataclass(frozen=True, kw_only=True)
class ScalarUpdateRule(SOAPRule):
    """SOAP with a function of one matrix and its moments in the eigenbasis."""

    reads = (*SOAPRule.reads, "parameters")  # matrix by matrix
    function: Callable[..., Tensor]

    def obstacle(self, where: Where) -> str | None:
        """The step count that the function is given."""
        if not where.capturable:
            return super().obstacle(where)
        return "_scalar_update gets the step count as a number; override SOAPRule.inner, which gets a tensor"

    def inner(self, rotated_BMN: Tensor, moments: AdamState, t: Scalars) -> tuple[Tensor, AdamState]:
        """The function, which writes the moments."""
        new = AdamState(*(x.clone() for x in moments))
        name = self.function.__qualname__
        updates = [
            checked_update(name, self.function(grad, m, v, betas=t.betas, step=int(step)), grad)
            for grad, m, v, step in zip(rotated_BMN, *new, t.step.flatten(), strict=True)
        ]
        return torch.stack(updates), new


class SoapBase(SOAP):
    """The base of KL-SOAP with an element-wise step of your own in the eigenbasis: override `_scalar_update`.

    A subclass may also set `PreconditionerCls`, and keep factors and bases otherwise (`soap.preconditioners`).

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.
        NotImplementedError: `_scalar_update` is not overridden.

    Example:
        >>> class SignSoap(SoapBase):
        ...     def _scalar_update(self, grad, exp_avg, exp_avg_sq, *, betas, step):
        ...         exp_avg_sq.lerp_(grad.square(), 1 - betas[1])  # by which the start knows that a gradient was seen
        ...         return exp_avg.lerp_(grad, 1 - betas[0]).sign()
        >>> w = torch.nn.Parameter(torch.zeros(4, 2))
        >>> w.grad = torch.ones(4, 2)
        >>> SignSoap([w], lr=0.1).step()
        >>> w[0]
        tensor([-0.1000, -0.1000], grad_fn=<SelectBackward0>)
    """

    fixed = {"use_kl_shampoo": True}
    overridable = ("_scalar_update",)
    PreconditionerCls: ClassVar[type[SoapPreconditionerProtocol]] = KlSoapPreconditioner

    def __init__(
        self,
        params: Annotated[MatrixParams, "as in `KlSoapV3`."],
        lr: LearningRate,
        betas: Annotated[Betas, "what `_scalar_update` gets, each in [0, 1)."] = (0.9, 0.95),
        shampoo_beta: ShampooBeta = 0.95,
        eps: FactorEps = 1e-8,
        weight_decay: WeightDecay = 0.01,
        *,
        weight_decay_method: WeightDecayMethod = "decoupled",
        stream_list: StreamList = None,
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(use_eigh=self.PreconditionerCls is ReklsPreconditioner, **given(locals()))

    def _make_rule(self, group: Mapping[str, Any]) -> Rule:
        if self.PreconditionerCls not in (KlSoapPreconditioner, ReklsPreconditioner):
            if group["overlap"]:
                raise ValueError(
                    f"{self._name}: overlap=True is not possible with the PreconditionerCls "
                    f"{self.PreconditionerCls.__name__}, which refreshes its bases in its own step; give overlap=False"
                )
            return SoapPreconditionerRule(cls=self.PreconditionerCls, function=self._scalar_update)
        owner = next(cls for cls in type(self).__mro__ if "_scalar_update" in vars(cls))
        if owner in (KlSoapV3, KlMSoap):
            return super()._make_rule(group)
        if owner is SoapBase:
            raise NotImplementedError(f"{self._name} has no _scalar_update; override it, or use KlSoapV3")
        return rule_of(ScalarUpdateRule, {**group, **self.fixed, "function": self._scalar_update})

    def _scalar_update(
        self, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, betas: tuple[float, float], step: int
    ) -> Tensor:
        """The update of one matrix in the eigenbasis; writes both moments, which are carried from basis to basis.

        Args:
            grad: (M, N), float32, rotated into the eigenbasis.
            exp_avg: the first moment, changed in place.
            exp_avg_sq: the second moment, >= 0, changed in place.
            betas: the group's.
            step: counts from 1.
        """
        raise NotImplementedError  # the user's part


class KlSoapV3(SoapBase):
    """SOAP with KL factors; `SOAP` has the other options.

    Update: `soap` with `use_kl_shampoo=True`
    When to use it: configurations that carry this name
    When not to use it: new code, which can say `soap` with `use_kl_shampoo=True`

    Args:
        params: tensors of two or more dimensions, (name, tensor) pairs, or groups. 3-D: a batch of matrices;
            convolutions are flattened to (out, rest).
        lr: learning rate, >= 0.
        betas: decay of Adam's moments, each in [0, 1).
        shampoo_beta: decay of the factors, in [0, 1).
        eps: added to the root of the second moment, and the floor of the eigenvalues; > 0.
        weight_decay: >= 0.
        weight_decay_method: "decoupled", "independent", "l2" or "palm".
        stream_list: has no effect, and a warning says so.
        **engine: see `EngineOptions`.

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(4, 2))
        >>> optimizer = KlSoapV3([w], lr=0.1)
        >>> w.grad = torch.ones(4, 2)
        >>> optimizer.step()
        >>> w[0]
        tensor([-0.1000, -0.1000], grad_fn=<SelectBackward0>)
    """

    def _scalar_update(
        self, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, betas: tuple[float, float], step: int
    ) -> Tensor:
        """Adam, for overrides that build on it; the optimizer itself works on stacks."""
        return calculate_adam_update(
            grad,
            exp_avg,
            exp_avg_sq,
            betas=betas,
            eps=self.defaults["eps"],
            correct_bias=True,
            nesterov=False,
            step=step,
        )


class ReklsV3(KlSoapV3):
    """SOAP with KL factors and a fresh eigh at every step; `REKLS` has the other options.

    Update: `rekls`
    When to use it: configurations that carry this name
    When not to use it: new code, which can say `rekls`

    Args:
        params: as in `KlSoapV3`.
        lr: learning rate, >= 0.
        betas: decay of Adam's moments, each in [0, 1).
        shampoo_beta: decay of the factors, in [0, 1).
        eps: added to the root of the second moment, and the floor of the eigenvalues; > 0.
        weight_decay: >= 0.
        weight_decay_method: "decoupled", "independent", "l2" or "palm".
        stream_list: has no effect, and a warning says so.
        **engine: see `EngineOptions`.

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(4, 2))
        >>> ReklsV3([w], lr=0.1).param_groups[0]["use_eigh"]
        True
    """

    PreconditionerCls = ReklsPreconditioner


@dataclass(frozen=True, kw_only=True)
class KlMSoapRule(SOAPRule):
    """SOAP with MAdam in the eigenbasis."""

    scale_log2: ClassVar[int] = 16  # published, and fixed there too

    def largest_norm(self, dtype: torch.dtype) -> float:
        """The square is kept scaled."""
        return madam_largest_norm(super().largest_norm(dtype), self.scale_log2)

    def inner(self, rotated_BMN: Tensor, moments: AdamState, t: Scalars) -> tuple[Tensor, AdamState]:
        """MAdam."""
        direction, new = madam_direction(
            rotated_BMN, MAdamState(*moments), t, correct_bias=self.correct_bias, scale_log2=self.scale_log2
        )
        return direction, AdamState(*new)


class KlMSoap(SoapBase):
    """SOAP with KL factors and MAdam in the eigenbasis; the equations are in this module's docstring.

    Update: as `kl_soap`, with MAdam
    When to use it: gradients near 1e-8, where Adam's ε decides
    When not to use it: gradients of ordinary size: it ended at 1.654 on the demo and `kl_soap` at 1.651

    Args:
        params: as in `KlSoapV3`.
        lr: learning rate, >= 0.
        betas: decay of MAdam's moments, each in [0, 1).
        shampoo_beta: decay of the factors, in [0, 1).
        eps: the floor of the eigenvalues; > 0.
        weight_decay: >= 0.
        weight_decay_method: "decoupled", "independent", "l2" or "palm".
        stream_list: has no effect, and a warning says so.
        **engine: see `EngineOptions`.

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(4, 2))
        >>> optimizer = KlMSoap([w], lr=0.1)
        >>> w.grad = torch.full((4, 2), 1e-12)
        >>> optimizer.step()
        >>> w[0]
        tensor([-0.1000, -0.1000], grad_fn=<SelectBackward0>)
    """

    rule = KlMSoapRule

    def _scalar_update(
        self, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, betas: tuple[float, float], step: int
    ) -> Tensor:
        """MAdam, for overrides that build on it; the optimizer itself works on stacks."""
        return calculate_madam_update(
            grad, exp_avg, exp_avg_sq, betas=betas, correct_bias=True, step=step, scale_log2=KlMSoapRule.scale_log2
        )
