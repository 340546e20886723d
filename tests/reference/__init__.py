"""A second opinion on every optimizer: one matrix, float64, written slowly from the paper.

A reference takes the library's hyper-parameters by name, with the library's defaults, and has one method:
``step(weight, grad)`` returns the new weight. Its state stands in attributes that are named like the
optimizer's checkpoint keys; ``t`` is the number of steps taken (the checkpoint's ``step``).
"""

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol

from torch import Tensor


class Reference(Protocol):
    """What every reference offers."""

    t: int

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        ...


# Those that have the reference of another, and the one whose class has a longer name.
OTHERS = {
    "rekls_v3": "rekls",
    "sim_ademamix": "simplified_ademamix",
    "stacked_soap": "kl_soap",  # of a 2-D parameter
    "tp_rekls": "rekls",
}


def _found() -> dict[str, Callable[..., Reference]]:
    """Every class of this folder by its name without `Reference`, in small letters."""
    modules = [module.name for module in iter_modules(__path__) if not module.name.startswith("test_")]
    return {
        name.removeprefix("Reference").lower(): kind
        for module in modules
        for name, kind in vars(import_module(f"{__name__}.{module}")).items()
        if name.startswith("Reference")
    }


REFERENCES = _found()


def make_reference(name: str, **hyperparameters: Any) -> Reference:
    """The reference of the optimizer ``name``: `ReferenceSOAPMuon` is that of soap_muon, whatever its file."""
    return REFERENCES[OTHERS.get(name, name).replace("_", "")](**hyperparameters)


__all__ = ["OTHERS", "REFERENCES", "Reference", "make_reference"]
