"""A published path of `update_functions`."""

from emerging_optimizers.scalar_optimizers.functions import calculate_adam_update

__all__ = ["calculate_adam_update"]
