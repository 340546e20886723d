"""The published path of `published.eig`."""

from emerging_optimizers.published.eig import conjugate, eigh_with_fallback, orthogonal_iteration, power_iteration

__all__ = ["conjugate", "eigh_with_fallback", "orthogonal_iteration", "power_iteration"]
