"""`row_norm_fn` under the published path."""

from emerging_optimizers.orthogonalized_optimizers.row_norm import row_norm_fn

__all__ = ["row_norm_fn"]
