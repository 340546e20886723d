"""MOSO under the published path."""

from emerging_optimizers.soap.moso import MOSO

__all__ = ["MOSO"]
