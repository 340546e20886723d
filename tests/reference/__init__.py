"""A second opinion on every optimizer: one matrix, float64, written slowly from the paper.

A reference takes the library's hyper-parameters by name, with the library's defaults, and has one method:
``step(weight, grad)`` returns the new weight. Its state stands in attributes that are named like the
optimizer's checkpoint keys; ``t`` is the number of steps taken (the checkpoint's ``step``).
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from .adamw import ReferenceAdamW
from .laprop import ReferenceLaProp
from .lion import ReferenceLion
from .muon import ReferenceMuon
from .rekls import ReferenceREKLS
from .soap import ReferenceSOAP


class Reference(Protocol):
    """What every reference offers."""

    t: int

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        ...


REFERENCES: dict[str, Callable[..., Reference]] = {
    "adamw": ReferenceAdamW,
    "laprop": ReferenceLaProp,
    "lion": ReferenceLion,
    "muon": ReferenceMuon,
    "rekls": ReferenceREKLS,
    "soap": ReferenceSOAP,
}


def make_reference(name: str, **hyperparameters: Any) -> Reference:
    """The reference of the optimizer ``name``."""
    return REFERENCES[name](**hyperparameters)


__all__ = [
    "REFERENCES",
    "Reference",
    "ReferenceAdamW",
    "ReferenceLaProp",
    "ReferenceLion",
    "ReferenceMuon",
    "ReferenceREKLS",
    "ReferenceSOAP",
    "make_reference",
]
