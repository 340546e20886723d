"""Steps that a CUDA graph records (`capturable`): what has to hold before, and what is refused."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from emerging_optimizers.distributed.dtensor import is_dtensor
from emerging_optimizers.engine.buckets import Bucket
from emerging_optimizers.engine.rule import Rule, Where, reason
from emerging_optimizers.engine.validate import label


def is_capturing() -> bool:
    """Whether a CUDA graph is being recorded."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def make_capturable(rule: Rule, group: dict[str, Any], owner: str) -> None:
    """Put the learning rate of a group where a graph finds it, or raise ValueError."""
    if obstacle := reason(rule, Where(torch.float32, torch.device("cpu")), capturable=True):
        raise ValueError(f"{owner}: capturable=True is not possible: {obstacle}")
    if group["offload"] is not None:
        raise ValueError(
            f"{owner}: capturable=True is not possible with offload={group['offload']!r}, for which the host steers "
            "copies; leave one of them out"
        )
    if group["nonfinite"] == "raise":
        raise ValueError(
            f"{owner}: capturable=True is not possible with nonfinite='raise', which reads the gradients on the "
            "host; give nonfinite='skip'"
        )
    if any(map(is_dtensor, group["params"])):
        raise ValueError(
            f"{owner}: capturable=True is not possible for sharded parameters: their processes compare on the "
            "host what they are about to do; leave it out"
        )
    devices = {p.device for p in group["params"] if p.numel()}
    if len(devices) > 1:
        raise ValueError(
            f"{owner} has parameters on {', '.join(sorted(map(str, devices)))}, and with capturable=True the "
            "learning rate is on one device; make a group for each"
        )
    for device in devices:
        group["lr"] = _on(device, group["lr"], owner)


def _on(device: torch.device, lr: Any, owner: str) -> Tensor:
    """A learning rate where the parameters are."""
    if isinstance(lr, Tensor):
        if lr.device != device:
            raise ValueError(
                f"{owner}: lr is a tensor on {lr.device} and the parameters are on {device}, and with "
                "capturable=True nothing is copied between them in a step; give lr.to(device), or a number"
            )
        return lr
    if is_capturing():
        raise ValueError(
            f"{owner}: lr={lr!r} is a number, which the CUDA graph that is recorded would keep for ever; it "
            "was set after the last step. Take a step before the capture, or fill the tensor in place: "
            "group['lr'].fill_(...)"
        )
    return torch.full((), lr, dtype=torch.float64, device=device)  # in float64, so that it is the number


def check_capture(
    owner: str,
    groups: Sequence[Mapping[str, Any]],
    rules: Sequence[Rule],
    homes: Mapping[Tensor, Sequence[tuple[Bucket, int]]],
) -> None:
    """Raise for a step that is recorded in a CUDA graph and that those which repeat it would not equal."""
    where = f"{owner}: this step is recorded in a CUDA graph, and "
    for index, (group, rule) in enumerate(zip(groups, rules, strict=True)):
        if not group["capturable"]:
            raise ValueError(f"{where}param_groups[{index}] has capturable=False; make the optimizer with True")
        for i, p in enumerate(group["params"]):
            home = homes.get(p, ())
            count = min((bucket.counts[row] for bucket, row in home), default=0)
            guarded = group["spike_guard"] is None or all(bucket.guard for bucket, _ in home)
            if p.grad is not None and p.numel() and not (guarded and _is_settled(rule, count)):
                raise ValueError(
                    f"{where}the next step of {label(group, i, p)}, its {count + 1}., differs from the later "
                    "ones, as it makes state; take three steps outside of a graph first"
                )


def _is_settled(rule: Rule, count: int) -> bool:
    """Whether the step after `count` is like those that follow."""
    phase, behind = rule.schedule.phase, rule.schedule.behind
    settled = count > 0 and phase(count + 1) is phase(count + 2)
    # The graph and handles of what stands behind a step come with its first time.
    return settled and (not behind or phase(count) is phase(count + 1))
