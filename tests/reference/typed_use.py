"""What users write, for mypy (`make types`): `create_optimizer` makes what has every method here."""

from torch import nn

from emerging_optimizers import create_optimizer


def skipped(model: nn.Module) -> int:
    """How many gradients have been skipped."""
    optimizer = create_optimizer("muon", model, lr=0.02)
    events: dict[str, tuple[int, int]] = optimizer.guard_events()
    optimizer.zero_grad(set_to_none=True)
    return sum(skipped for _, skipped in events.values())
