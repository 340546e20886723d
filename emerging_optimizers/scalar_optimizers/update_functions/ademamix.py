"""A published path of `update_functions`."""

from emerging_optimizers.scalar_optimizers.functions import (
    calculate_ademamix_update,
    calculate_sim_ademamix_update,
)

__all__ = ["calculate_ademamix_update", "calculate_sim_ademamix_update"]
