"""Element-wise optimizers, and their rules as functions (`functions.py`).

Layer 2: imports the engine and linalg. The element-wise steps that matrix optimizers share live here too.
"""

from emerging_optimizers.scalar_optimizers.adamw import AdamW
from emerging_optimizers.scalar_optimizers.ademamix import AdEMAMix
from emerging_optimizers.scalar_optimizers.base import SingleMomentumOptimizer, TwoMomentsOptimizer
from emerging_optimizers.scalar_optimizers.functions import (
    calculate_adam_update,
    calculate_ademamix_update,
    calculate_laprop_update,
    calculate_lion_update,
    calculate_madam_update,
    calculate_rmsprop_update,
    calculate_signum_update,
    calculate_sim_ademamix_update,
)
from emerging_optimizers.scalar_optimizers.laprop import LaProp
from emerging_optimizers.scalar_optimizers.lion import Lion
from emerging_optimizers.scalar_optimizers.madam import MAdam
from emerging_optimizers.scalar_optimizers.rmsprop import RMSProp
from emerging_optimizers.scalar_optimizers.signum import Signum
from emerging_optimizers.scalar_optimizers.sim_ademamix import SimplifiedAdEMAMix

__all__ = [
    "AdEMAMix",
    "AdamW",
    "LaProp",
    "Lion",
    "MAdam",
    "RMSProp",
    "Signum",
    "SimplifiedAdEMAMix",
    "SingleMomentumOptimizer",
    "TwoMomentsOptimizer",
    "calculate_adam_update",
    "calculate_ademamix_update",
    "calculate_laprop_update",
    "calculate_lion_update",
    "calculate_madam_update",
    "calculate_rmsprop_update",
    "calculate_signum_update",
    "calculate_sim_ademamix_update",
]
