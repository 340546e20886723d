"""The published path of the mixin of `engine.weight_decay`."""

from emerging_optimizers.engine.weight_decay import WeightDecayMixin, WeightDecayT

__all__ = ["WeightDecayMixin", "WeightDecayT"]
