"""Shampoo: gradients whitened by the inverse roots of two Kronecker factors.

Layer 3: imports the engine and linalg, never another family of matrix optimizers.
"""

from importlib import import_module
from typing import Any

from emerging_optimizers.shampoo.shampoo import (
    KlShampoo,
    KlShampooPreconditioner,
    Shampoo,
    ShampooBase,
    ShampooPreconditioner,
    ShampooScaleT,
    get_shampoo_scale_factor,
)

__all__ = [
    "KlShampoo",
    "KlShampooPreconditioner",
    "Shampoo",
    "ShampooBase",
    "ShampooPreconditioner",
    "ShampooScaleT",
    "get_shampoo_scale_factor",
]

PUBLISHED = ("KlMSoap", "KlSoapV3", "ReklsV3")  # here too, of another family


def __getattr__(name: str) -> Any:
    if name not in PUBLISHED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("emerging_optimizers.shampoo.soap_v3"), name)
