"""Optimizers whose update is an orthogonalized momentum.

Layer 3: imports the engine and linalg, never another family of matrix optimizers.
"""

from emerging_optimizers.engine.hooks import HookStateT, NoOpWeightUpdateHook, WeightUpdateHook
from emerging_optimizers.linalg.scaling import muon_scale_factor as get_muon_scale_factor
from emerging_optimizers.linalg.spectral_clipping import spectral_clip, spectral_clipped_weight_decay, spectral_hardcap
from emerging_optimizers.orthogonalized_optimizers.adaptive_muon import AdaptiveMuon
from emerging_optimizers.orthogonalized_optimizers.mop import MOP, polar_via_svd
from emerging_optimizers.orthogonalized_optimizers.muon import Muon
from emerging_optimizers.orthogonalized_optimizers.muon_hyperball import MuonHyperball
from emerging_optimizers.orthogonalized_optimizers.muown import Muown
from emerging_optimizers.orthogonalized_optimizers.orthogonalized_optimizer import OrthogonalizedOptimizer
from emerging_optimizers.orthogonalized_optimizers.polargrad import (
    PolarGrad,
    left_polargrad_orth_fn,
    one_sided_polargrad_orth_fn,
    right_polargrad_orth_fn,
)
from emerging_optimizers.orthogonalized_optimizers.row_norm import row_norm_fn
from emerging_optimizers.orthogonalized_optimizers.scion import Scion
from emerging_optimizers.orthogonalized_optimizers.sinkhorn import Sinkhorn
from emerging_optimizers.orthogonalized_optimizers.sinkhorn_muon import SinkhornMuon
from emerging_optimizers.orthogonalized_optimizers.spectron import Spectron
from emerging_optimizers.orthogonalized_optimizers.spel import Spel

__all__ = [
    "MOP",
    "AdaptiveMuon",
    "HookStateT",
    "Muon",
    "MuonHyperball",
    "Muown",
    "NoOpWeightUpdateHook",
    "OrthogonalizedOptimizer",
    "PolarGrad",
    "Scion",
    "Sinkhorn",
    "SinkhornMuon",
    "Spectron",
    "Spel",
    "WeightUpdateHook",
    "get_muon_scale_factor",
    "left_polargrad_orth_fn",
    "one_sided_polargrad_orth_fn",
    "polar_via_svd",
    "right_polargrad_orth_fn",
    "row_norm_fn",
    "spectral_clip",
    "spectral_clipped_weight_decay",
    "spectral_hardcap",
]
