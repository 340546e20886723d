"""Optimizers whose weights stay on a manifold: columns of one norm (oblique), or fixed singular values.

Layer 3: imports the engine, linalg and scalar_optimizers; never another family.
"""

from emerging_optimizers.riemannian_optimizers.isospectral import Iso
from emerging_optimizers.riemannian_optimizers.normalized_optimizer import (
    ObliqueAdam,
    ObliqueScaleT,
    ObliqueSGD,
    ObliqueSteepestAdam,
    ObliqueSteepestSGD,
)

__all__ = ["Iso", "ObliqueAdam", "ObliqueSGD", "ObliqueScaleT", "ObliqueSteepestAdam", "ObliqueSteepestSGD"]
