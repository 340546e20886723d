"""Laws by which a weight moves, under the published path; `engine.hooks` has the equations."""

from emerging_optimizers.engine.hooks import (
    HyperballHook,
    NoOpWeightUpdateHook,
    RadialBrakeHook,
    RelativeUpdateHook,
    RowUpdateFloorHook,
    SpectralClipHook,
    SpectralWeightDecayHook,
    UpdateFloorHook,
    WeightUpdateHook,
)

__all__ = [
    "HyperballHook",
    "NoOpWeightUpdateHook",
    "RadialBrakeHook",
    "RelativeUpdateHook",
    "RowUpdateFloorHook",
    "SpectralClipHook",
    "SpectralWeightDecayHook",
    "UpdateFloorHook",
    "WeightUpdateHook",
]
