"""The published path of `published.modules`."""

from emerging_optimizers.published.modules import Conv1dFlatWeights

__all__ = ["Conv1dFlatWeights"]
