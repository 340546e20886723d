"""Shampoo: gradients whitened by the inverse roots of two Kronecker factors.

Layer 3: imports the engine and linalg, never another family of matrix optimizers.
"""

from emerging_optimizers.shampoo.shampoo import Shampoo

__all__ = ["Shampoo"]
