"""The published path of what `published.psgd` has for norms and balance."""

from emerging_optimizers.published.psgd import norm_lower_bound_skew, norm_lower_bound_spd, uniformize_q_in_place

__all__ = ["norm_lower_bound_skew", "norm_lower_bound_spd", "uniformize_q_in_place"]
