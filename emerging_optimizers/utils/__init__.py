"""Published helpers under their published paths."""

from emerging_optimizers.linalg.precision import FP32MatmulPrecT, fp32_matmul_precision

__all__ = ["FP32MatmulPrecT", "fp32_matmul_precision"]
