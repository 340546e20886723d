"""The published path of `scalar_optimizers.functions`."""

from emerging_optimizers.scalar_optimizers.functions import (
    calculate_adam_update,
    calculate_ademamix_update,
    calculate_laprop_update,
    calculate_lion_update,
    calculate_madam_update,
    calculate_rmsprop_update,
    calculate_signum_update,
    calculate_sim_ademamix_update,
)

__all__ = [
    "calculate_adam_update",
    "calculate_ademamix_update",
    "calculate_laprop_update",
    "calculate_lion_update",
    "calculate_madam_update",
    "calculate_rmsprop_update",
    "calculate_signum_update",
    "calculate_sim_ademamix_update",
]
