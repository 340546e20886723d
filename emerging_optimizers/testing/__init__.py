"""Checks that users run on their own models and optimizers."""

from emerging_optimizers.testing.conformance import check_optimizer
from emerging_optimizers.testing.one_process import assert_same_as_one_process

__all__ = ["assert_same_as_one_process", "check_optimizer"]
