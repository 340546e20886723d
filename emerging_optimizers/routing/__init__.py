"""Which parameter gets which optimizer, and why; and one optimizer that does it.

Layer 4: imports everything below it; the registry names the optimizers.
"""

from emerging_optimizers.routing.create import create_optimizer
from emerging_optimizers.routing.plan import Route, RoutePlan, plan_parameters
from emerging_optimizers.routing.routed import RoutedOptimizer

__all__ = ["Route", "RoutePlan", "RoutedOptimizer", "create_optimizer", "plan_parameters"]
