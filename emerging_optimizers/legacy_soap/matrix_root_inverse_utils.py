"""The published import path of the inverse square roots, and their names there; see `linalg.inverse_root`."""

from emerging_optimizers.linalg.inverse_root import inverse_sqrt_cans as mat_root_inv_via_scaled_cans
from emerging_optimizers.linalg.inverse_root import inverse_sqrt_eigh as inv_root_via_eigh

__all__ = ["inv_root_via_eigh", "mat_root_inv_via_scaled_cans"]
