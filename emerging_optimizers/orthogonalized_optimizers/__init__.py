"""Optimizers whose update is an orthogonalized momentum.

Layer 3: imports the engine and linalg, never another family of matrix optimizers.
"""

from emerging_optimizers.orthogonalized_optimizers.muon import Muon
from emerging_optimizers.orthogonalized_optimizers.muon_utils import get_muon_scale_factor
from emerging_optimizers.orthogonalized_optimizers.orthogonalized_optimizer import OrthogonalizedOptimizer

__all__ = ["Muon", "OrthogonalizedOptimizer", "get_muon_scale_factor"]
