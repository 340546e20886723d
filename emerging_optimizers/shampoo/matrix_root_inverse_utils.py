"""The published path of inverse roots by matrix products, and their names there; see `linalg.inverse_root`."""

from emerging_optimizers.linalg.inverse_root import inverse_fourth_root_cans as mat_4th_root_inv_via_scaled_cans
from emerging_optimizers.linalg.inverse_root import inverse_sqrt_cans as mat_root_inv_via_scaled_cans

__all__ = ["mat_4th_root_inv_via_scaled_cans", "mat_root_inv_via_scaled_cans"]
