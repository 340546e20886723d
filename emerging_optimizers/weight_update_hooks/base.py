"""A published path of `weight_update_hooks`."""

from emerging_optimizers.engine.hooks import NoOpWeightUpdateHook, WeightUpdateHook

__all__ = ["NoOpWeightUpdateHook", "WeightUpdateHook"]
