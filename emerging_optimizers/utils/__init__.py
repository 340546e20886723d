"""Published helpers under their published paths."""

from emerging_optimizers.distributed.groups import get_pg_rank, get_pg_size
from emerging_optimizers.linalg.precision import FP32MatmulPrecT, fp32_matmul_precision
from emerging_optimizers.published.eig import conjugate, eigh_with_fallback, orthogonal_iteration, power_iteration
from emerging_optimizers.published.sinkhorn_mapper import SinkhornMapper

__all__ = [
    "FP32MatmulPrecT",
    "SinkhornMapper",
    "conjugate",
    "eigh_with_fallback",
    "fp32_matmul_precision",
    "get_pg_rank",
    "get_pg_size",
    "orthogonal_iteration",
    "power_iteration",
]
