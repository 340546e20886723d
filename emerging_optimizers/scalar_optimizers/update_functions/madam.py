"""A published path of `update_functions`."""

from emerging_optimizers.scalar_optimizers.functions import calculate_madam_update

__all__ = ["calculate_madam_update"]
