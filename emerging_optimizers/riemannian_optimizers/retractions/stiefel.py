"""The published path of `published.retractions`."""

from emerging_optimizers.published.retractions import (
    RetractionT,
    cayley_retraction,
    newton_schulz_retraction,
    polar_retraction,
    qr_retraction,
)

__all__ = ["RetractionT", "cayley_retraction", "newton_schulz_retraction", "polar_retraction", "qr_retraction"]
