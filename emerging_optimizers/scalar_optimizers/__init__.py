"""Element-wise optimizers: AdamW, LaProp, Lion.

Layer 2: imports the engine and linalg. The element-wise steps that matrix optimizers share live here too.
"""

from emerging_optimizers.scalar_optimizers.adamw import AdamW
from emerging_optimizers.scalar_optimizers.laprop import LaProp
from emerging_optimizers.scalar_optimizers.lion import Lion

__all__ = ["AdamW", "LaProp", "Lion"]
