"""The published path of what `published.psgd` has for the Procrustes step."""

from emerging_optimizers.published.psgd import procrustes_step

__all__ = ["procrustes_step"]
