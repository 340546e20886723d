"""The published path of what `published.psgd` has for contractions."""

from emerging_optimizers.published.psgd import apply_kronecker_factors, apply_preconditioner, partial_contraction

__all__ = ["apply_kronecker_factors", "apply_preconditioner", "partial_contraction"]
