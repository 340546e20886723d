"""The published path of `published.mixin`."""

from emerging_optimizers.published.mixin import WeightDecayMixin, WeightDecayT

__all__ = ["WeightDecayMixin", "WeightDecayT"]
