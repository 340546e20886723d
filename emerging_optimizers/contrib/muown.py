"""Muown under the published path."""

from emerging_optimizers.orthogonalized_optimizers.muown import Muown

__all__ = ["Muown"]
