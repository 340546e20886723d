"""What users write, for mypy (`make types`) and pyright (`make release-check`): both find methods and their types."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from emerging_optimizers import (
    SOAP,
    AdamW,
    Muon,
    QKClip,
    ScheduleFree,
    SpikeWatch,
    WeightAverage,
    clip_gradients,
    convert_state_dict,
    create_optimizer,
    plan_parameters,
)
from emerging_optimizers.testing import check_optimizer


def skipped(model: nn.Module) -> int:
    """How many gradients have been skipped."""
    optimizer = create_optimizer("muon", model, lr=0.02)
    events: dict[str, tuple[int, int]] = optimizer.guard_events()
    optimizer.zero_grad(set_to_none=True)
    return sum(skipped for _, skipped in events.values())


def trained(model: nn.Module, batch: Tensor) -> Mapping[str, object]:
    """A loop with what may stand around it."""
    optimizer = SOAP(model.named_parameters(), lr=3e-3, betas=(0.9, 0.95), precondition_frequency=10)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    average = WeightAverage(optimizer, decay=0.99)
    clip = QKClip(model, threshold=100.0)
    clip.attach(optimizer)
    watch = SpikeWatch(optimizer)
    model(batch).square().mean().backward()
    norms: dict[str, Tensor] = clip_gradients(optimizer, 1.0)
    optimizer.step()
    scheduler.step()
    average.eval()
    average.train()
    return {"norms": norms, "alarms": watch, "clipped": clip.events(), "state": optimizer.state_dict()}


def several(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Arguments as torch's optimizers take them, and a closure."""
    hidden = [p for p in model.parameters() if p.ndim == 2]
    muon = Muon([{"params": hidden, "lr": 0.01}], lr=0.02, momentum=0.95, nesterov=True, spike_guard=2.0)
    adamw = AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    ScheduleFree(adamw)
    loss = muon.step(lambda: model(torch.ones(1, 4)).sum())
    assert loss is None or loss >= 0
    adamw.load_state_dict(convert_state_dict(torch.optim.AdamW(model.parameters()).state_dict(), adamw))
    return [muon, adamw]


def looked_at(model: nn.Module) -> str:
    """The plan, and the checks."""
    report = check_optimizer(lambda params: SOAP(params, lr=3e-3), raises=False)
    return f"{plan_parameters(model, 'muon')}\n{[row.name for row in report.failures]}\n{report[0]}"
