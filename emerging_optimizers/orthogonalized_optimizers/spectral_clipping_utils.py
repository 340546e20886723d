"""Bounds on singular values under the published names; `linalg.spectral_clipping` has the equations."""

from emerging_optimizers.linalg.spectral_clipping import spectral_clip, spectral_clipped_weight_decay, spectral_hardcap

__all__ = ["spectral_clip", "spectral_clipped_weight_decay", "spectral_hardcap"]
