"""Published helpers under their published paths."""

from emerging_optimizers.linalg.precision import FP32MatmulPrecT, fp32_matmul_precision
from emerging_optimizers.utils.sinkhorn_mapper import SinkhornMapper

__all__ = ["FP32MatmulPrecT", "SinkhornMapper", "fp32_matmul_precision"]
