"""torch.optim plumbing, once: grouping, state, dtypes, decay, checkpoints, execution.

Layer 1: imports linalg and torch; knows the contract of a rule (`engine/rule.py`) and no rule.
"""

from emerging_optimizers.engine.optimizer import RuleOptimizer
from emerging_optimizers.engine.options import EngineOptions
from emerging_optimizers.engine.rule import Rule, Scalars, Step
from emerging_optimizers.engine.scalars import debias, lerp
from emerging_optimizers.engine.schedule import Phase, Schedule

__all__ = [
    "EngineOptions",
    "Phase",
    "Rule",
    "RuleOptimizer",
    "Scalars",
    "Schedule",
    "Step",
    "debias",
    "lerp",
]
