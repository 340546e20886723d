"""A published path of `weight_update_hooks`."""

from emerging_optimizers.engine.hooks import HookStateT, NoOpWeightUpdateHook, WeightUpdateHook

__all__ = ["HookStateT", "NoOpWeightUpdateHook", "WeightUpdateHook"]
