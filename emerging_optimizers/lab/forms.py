r"""The KL update of a factor in two forms, equal in exact arithmetic, for an M x N gradient G:

.. math::
    \text{published: } \tfrac{1}{N} G (Q \Lambda^{-1} Q^\top) G^\top, \qquad
    \text{whitened: } X X^\top, \quad X = G Q \Lambda^{-1/2} / \sqrt{N}

Nothing here imports torch.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def published_update(grad_BMN: "Tensor", Q_BNN: "Tensor", eigenvalues_BN: "Tensor") -> "Tensor":
    r"""The KL update as published: :math:`G (Q \Lambda^{-1} Q^\top) G^\top / N`, (B, M, M)."""
    inverse = (Q_BNN / eigenvalues_BN.unsqueeze(-2)) @ Q_BNN.mT
    return grad_BMN @ inverse @ grad_BMN.mT / grad_BMN.size(-1)


def whitened_update(grad_BMN: "Tensor", Q_BNN: "Tensor", eigenvalues_BN: "Tensor") -> "Tensor":
    r"""The library's KL update: :math:`X X^\top` with :math:`X = G Q \Lambda^{-1/2} / \sqrt{N}`, (B, M, M)."""
    x_BMN = (grad_BMN @ Q_BNN) * eigenvalues_BN.rsqrt().unsqueeze(-2) * grad_BMN.size(-1) ** -0.5
    return x_BMN @ x_BMN.mT


FORMS: dict[str, "Callable[[Tensor, Tensor, Tensor], Tensor]"] = {
    "published": published_update,
    "whitened": whitened_update,
}


def ways(precision: str) -> tuple[tuple[str, str, str], ...]:
    """The ways to form an update at a precision: that, the eigenvalues' own precision, the form.

    Example:
        >>> ways("high")[2:]
        (('high', 'high', 'whitened'), ('high', 'highest', 'whitened'))
    """
    return tuple((precision, own, form) for form in FORMS for own in dict.fromkeys((precision, "highest")))
