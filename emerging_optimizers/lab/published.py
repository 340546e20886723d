r"""SOAP's KL update as published, kept so that what it does in a gradient spike can be repeated.

The update, for an M x N matrix, with the eigenvalues floored at eps alone, as the published start has them:

.. math::
    L_t = \beta'_s L_{t-1} + \frac{1 - \beta'_s}{N} G_t (Q_R \Lambda_R^{-1} Q_R^\top) G_t^\top, \qquad
    R_t = \beta'_s R_{t-1} + \frac{1 - \beta'_s}{M} G_t^\top (Q_L \Lambda_L^{-1} Q_L^\top) G_t

In exact arithmetic that is the library's own update. Rounded, it need not be symmetric or positive.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from emerging_optimizers.engine import Scalars, debias, lerp
from emerging_optimizers.lab.forms import published_update
from emerging_optimizers.linalg.kronecker import conjugate_diagonal
from emerging_optimizers.soap.soap import SOAP, SOAPRule, SOAPState


@dataclass(frozen=True, kw_only=True)
class PublishedRule(SOAPRule):
    """The library's rule with the published factors."""

    def accumulate(self, grad: Tensor, state: Any, t: Scalars) -> Any:
        """The factors, as published."""
        s: SOAPState = state
        assert s.L is not None
        assert s.R is not None
        assert s.Q_L is not None
        assert s.Q_R is not None
        share = (1 - t.shampoo_beta) / debias(t.shampoo_beta, t.step, grad)
        left = published_update(grad, s.Q_R, _eigenvalues(s.R, s.Q_R, t.eps))
        right = published_update(grad.mT, s.Q_L, _eigenvalues(s.L, s.Q_L, t.eps))
        return s._replace(L=lerp(s.L, left, share), R=lerp(s.R, right, share))


def _eigenvalues(factor: Tensor, basis: Tensor, eps: Tensor) -> Tensor:
    return conjugate_diagonal(factor, basis).clamp_min(eps)


class PublishedSOAP(SOAP):
    """SOAP for matrices whose two sides are both preconditioned; use it with KL factors and the published start."""

    rule = PublishedRule
