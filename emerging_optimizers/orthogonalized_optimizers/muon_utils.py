"""The published path of `published.muon_utils`."""

from emerging_optimizers.published.muon_utils import (
    CoeffIterMode,
    MuonScaleT,
    NSCoeffT,
    batched_newton_schulz_step,
    batched_newton_schulz_step_tsyrk,
    distributed_normalize_p2,
    get_coefficient_iterator,
    get_muon_scale_factor,
    newton_schulz,
    newton_schulz_step,
    newton_schulz_step_tsyrk,
    newton_schulz_tp,
)

__all__ = [
    "CoeffIterMode",
    "MuonScaleT",
    "NSCoeffT",
    "batched_newton_schulz_step",
    "batched_newton_schulz_step_tsyrk",
    "distributed_normalize_p2",
    "get_coefficient_iterator",
    "get_muon_scale_factor",
    "newton_schulz",
    "newton_schulz_step",
    "newton_schulz_step_tsyrk",
    "newton_schulz_tp",
]
