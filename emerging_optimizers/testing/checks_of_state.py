"""Checks of checkpoints, copies, what is set around a step, and resources. An assertion says what users would see."""

import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from emerging_optimizers.testing.subject import (
    Checks,
    DoesNotApplyError,
    Subject,
    copies,
    give,
    gradients,
    same,
    train,
)

_OPTIM = "https://docs.pytorch.org/docs/stable/optim.html"
_STATE = "https://docs.pytorch.org/docs/stable/generated/torch.optim.Optimizer.load_state_dict.html"
_AMP = "https://docs.pytorch.org/docs/stable/amp.html"
_LOAD = "https://docs.pytorch.org/docs/stable/generated/torch.load.html"
_DCP = "https://docs.pytorch.org/docs/stable/distributed.checkpoint.html"
_NOTES = "https://docs.pytorch.org/docs/stable/notes/randomness.html"

CHECKS = Checks()


# ---- what is set around a step ---------------------------------------------------------------------------------------


def _around(subject: Subject, context: Callable[[], AbstractContextManager[Any]], what: str) -> None:
    twins = subject.weights(3)
    parameters, optimizer = subject.fresh()
    for step in range(3):
        give(parameters, step)
        with context():
            optimizer.step()
    assert same(parameters, twins), f"{what} changes the numbers of a step"


@CHECKS.add("default dtype", "https://docs.pytorch.org/docs/stable/generated/torch.set_default_dtype.html")
def _(subject: Subject) -> None:
    for dtype in (torch.float64, torch.bfloat16):

        def step_under(dtype: torch.dtype = dtype) -> AbstractContextManager[Any]:
            torch.set_default_dtype(dtype)
            return nullcontext()

        twins = subject.weights(2)
        parameters, optimizer = subject.fresh()
        for step in range(2):
            give(parameters, step)
            with step_under():
                optimizer.step()
            torch.set_default_dtype(torch.float32)
        assert same(parameters, twins), f"a default dtype of {dtype} changes the numbers of a step"


@CHECKS.add("default device", "https://docs.pytorch.org/docs/stable/generated/torch.set_default_device.html")
def _(subject: Subject) -> None:
    _around(subject, lambda: torch.device("meta"), "a default device")


@CHECKS.add("autocast", _AMP)
def _(subject: Subject) -> None:
    _around(subject, lambda: torch.autocast("cpu", torch.bfloat16), "autocast around a step")


@CHECKS.add("two threads", "https://docs.pytorch.org/docs/stable/notes/multiprocessing.html")
def _(subject: Subject) -> None:
    if subject.layout is not None:
        raise DoesNotApplyError("processes that exchange gradients do so in one order, and threads have none")
    alone = subject.weights(5)
    found: dict[int, list[nn.Parameter]] = {}
    problems: list[BaseException] = []
    before = torch.get_float32_matmul_precision()
    ready = [subject.fresh() for _ in range(2)]

    def work(k: int) -> None:
        try:
            parameters, optimizer = ready[k]
            train(parameters, optimizer, range(5))
            found[k] = parameters
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    assert all(same(parameters, alone) for parameters in found.values()), "two optimizers in two threads disagree"
    assert torch.get_float32_matmul_precision() == before, "threads leave another float32 matmul precision behind"


# ---- state and checkpoints -------------------------------------------------------------------------------------------


def _resumed(subject: Subject, through: Callable[[Any], Any], dtype: torch.dtype = torch.float32) -> None:
    """Three steps, the state through something, three more, against six."""
    whole = subject.weights(6, dtype)
    parameters, optimizer = subject.trained(3, dtype)
    weights = [nn.Parameter(x) for x in copies(parameters)]
    resumed = subject.optimizer(weights)
    resumed.load_state_dict(through(optimizer.state_dict()))
    train(weights, resumed, range(3, 6))
    assert same(weights, whole), "a resumed run is another one, bit for bit"


@CHECKS.add("a checkpoint resumes", _STATE)
def _(subject: Subject) -> None:
    _resumed(subject, copy.deepcopy)


@CHECKS.add("torch.load with weights_only", _LOAD)
def _(subject: Subject) -> None:
    def through(state: Any) -> Any:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    _resumed(subject, through)


@CHECKS.add("a checkpoint of bfloat16 weights resumes", _STATE)
def _(subject: Subject) -> None:
    _resumed(subject, copy.deepcopy, torch.bfloat16)


@CHECKS.add("a flattened checkpoint of DCP", _DCP)
def _(subject: Subject) -> None:
    class Model(nn.Module):
        def __init__(self, weights: Iterable[Tensor]) -> None:
            super().__init__()
            self.weights = nn.ParameterList([nn.Parameter(x) for x in weights])

    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    whole = subject.weights(6)
    model = Model(copies(subject.parameters()))
    optimizer = subject.optimizer([*model.weights])
    train([*model.weights], optimizer, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=flat))
    other = Model(copies(model.weights))
    resumed = subject.optimizer([*other.weights])
    set_optimizer_state_dict(other, resumed, saved, options=flat)
    train([*other.weights], resumed, range(3, 6))
    assert same(other.weights, whole), "a resumed run is another one, bit for bit"


@CHECKS.add("a checkpoint before the first step", _STATE)
def _(subject: Subject) -> None:
    whole = subject.weights(2)
    parameters, optimizer = subject.fresh()
    optimizer.load_state_dict(copy.deepcopy(subject.fresh()[1].state_dict()))
    train(parameters, optimizer, range(2))
    assert same(parameters, whole), "loading a checkpoint from before the first step changes the run"


@CHECKS.add("a checkpoint that does not fit", _STATE)
def _(subject: Subject) -> str:
    parameters, optimizer = subject.trained(2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["params"] = saved["param_groups"][0]["params"][:-1]
    before = [copy.deepcopy(optimizer.state[p]) for p in parameters]
    try:
        optimizer.load_state_dict(saved)
    except (ValueError, KeyError) as refused:
        kept = [{**optimizer.state[p]}.keys() == old.keys() for p, old in zip(parameters, before, strict=True)]
        assert all(kept), "a refused checkpoint leaves another state"
        return f"refused: {' '.join(str(refused).split())[:80]}"
    raise AssertionError("a checkpoint that lacks a parameter is taken without a word")


def _goes_on(subject: Subject, duplicate: Callable[[Any], Any]) -> None:
    whole = subject.weights(4)
    parameters, optimizer = subject.trained(2)
    weights, copied = duplicate((parameters, optimizer))
    assert copied.param_groups[0]["params"][0] is weights[0], "a copy holds other parameters than those copied with it"
    train(weights, copied, range(2, 4))
    assert same(weights, whole), "the copy of an optimizer goes on otherwise"
    train(parameters, optimizer, range(2, 4))
    assert same(parameters, whole), "an optimizer that was copied goes on otherwise"


@CHECKS.add("deepcopy", "https://docs.python.org/3/library/copy.html")
def _(subject: Subject) -> None:
    _goes_on(subject, copy.deepcopy)


@CHECKS.add("pickle", "https://docs.python.org/3/library/pickle.html")
def _(subject: Subject) -> None:
    _goes_on(subject, lambda pair: pickle.loads(pickle.dumps(pair)))


@CHECKS.add("entries of others in the state", _STATE)
def _(subject: Subject) -> None:
    whole = subject.weights(4)
    parameters, optimizer = subject.trained(2)
    optimizer.state[parameters[0]]["of somebody else"] = torch.ones(3)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(parameters, optimizer, range(2, 4))
    assert "of somebody else" in optimizer.state[parameters[0]], "an entry of somebody else is lost"
    assert same(parameters, whole), "an entry of somebody else changes the run"


@CHECKS.add("the same again", _NOTES)
def _(subject: Subject) -> None:
    assert same(subject.trained(5)[0], subject.weights(5)), "two equal runs differ"


# ---- resources -------------------------------------------------------------------------------------------------------


@CHECKS.add("memory over 200 steps", _OPTIM)
def _(subject: Subject) -> None:
    def bytes_alive() -> int:
        gc.collect()
        return sum(x.numel() * x.element_size() for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter))

    others = gc.get_freeze_count()
    gc.freeze()  # what was there before is neither collected nor counted, however much it is
    try:
        parameters, optimizer = subject.trained(20)
        before = bytes_alive()
        train(parameters, optimizer, range(20, 220))
        grown = bytes_alive() - before
    finally:
        if not others:  # whoever has frozen objects keeps them so
            gc.unfreeze()
    assert grown <= 4096, f"tensors of {grown} bytes more are alive after 200 steps"


@CHECKS.add(
    "no waiting for the device", "https://docs.pytorch.org/docs/stable/generated/torch.cuda.set_sync_debug_mode.html"
)
def _(subject: Subject) -> None:
    if not torch.cuda.is_available():
        raise DoesNotApplyError("no CUDA device here, where alone it can be seen")
    parameters = [nn.Parameter(p.detach().cuda()) for p in subject.parameters()]
    optimizer = subject.optimizer(parameters)
    for step in range(6):
        for p, grad in zip(parameters, gradients(parameters, step), strict=True):
            p.grad = grad.cuda()
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
