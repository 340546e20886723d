"""A published path of `update_functions`."""

from emerging_optimizers.scalar_optimizers.functions import calculate_rmsprop_update

__all__ = ["calculate_rmsprop_update"]
