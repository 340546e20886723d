"""The published path of the weight decay names."""

from emerging_optimizers.engine.weight_decay import WeightDecayT

__all__ = ["WeightDecayT"]
