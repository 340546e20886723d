"""The published path of `published.sinkhorn_mapper`."""

from emerging_optimizers.published.sinkhorn_mapper import SinkhornMapper

__all__ = ["SinkhornMapper"]
