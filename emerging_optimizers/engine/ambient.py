"""What is set around a call and would change what it computes."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any, TypeVar

import torch

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
_AUTOCAST = ("cpu", "cuda", "xpu", "mps")
# The smallest number; where subnormal numbers count as zero (`torch.set_flush_denormal`), it is zero times one.
_SMALLEST, _ONE = 5e-324, 1.0


def undisturbed(function: FunctionT) -> FunctionT:
    """Run a function without autocast, outside of inference mode, whose tensors nobody could write later, and with
    subnormal numbers.

    Those are a setting of each thread: threads of torch's pool that began under `torch.set_flush_denormal(True)` go on
    so. The default dtype and device are not changed, since other threads have the same: whatever makes a tensor says
    which.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        cast = [device for device in _AUTOCAST if torch.is_autocast_enabled(device)]
        flushes = _SMALLEST * _ONE == 0
        if not (cast or flushes or torch.is_inference_mode_enabled()):
            return function(*args, **kwargs)
        with ExitStack() as settings:
            if flushes:
                torch.set_flush_denormal(False)
                settings.callback(torch.set_flush_denormal, True)
            for device in cast:
                settings.enter_context(torch.autocast(device, enabled=False))
            if torch.is_inference_mode_enabled():
                settings.enter_context(torch.inference_mode(False))
                settings.enter_context(torch.no_grad())  # which has gone with inference mode
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]  # of the same signature


def eager(function: FunctionT) -> FunctionT:
    """Keep a function out of a graph that the user compiles around it; the engine compiles rules itself.

    As torch.optim does it: `torch.compiler.disable` would import dynamo with this module, a second or more.
    """
    return torch._disable_dynamo(function)  # type: ignore[attr-defined, return-value]  # torch.optim's own, untyped
