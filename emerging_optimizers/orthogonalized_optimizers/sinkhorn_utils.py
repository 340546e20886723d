"""The published path of `published.sinkhorn_balance`."""

from emerging_optimizers.published.sinkhorn_balance import sinkhorn_balance

__all__ = ["sinkhorn_balance"]
