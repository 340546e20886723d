"""`capturable`: steps that a CUDA graph can repeat. On the CPU a recording of the operators stands in for the graph."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from emerging_optimizers import SOAP, AdamW, Muon, create_optimizer
from emerging_optimizers.engine import capture
from emerging_optimizers.engine import optimizer as engine
from emerging_optimizers.linalg.kernels import routes
from tests.cases import CASES, SEEDS, OptimizerCase, distance, parameters, run, set_gradients

# These ask the host, and say so.
REFUSED = {
    *("muon_svd", "mop", "mop_spectral", "polargrad_svd", "iso_polar"),
    *("shampoo", "shampoo_square_root", "shampoo_one_sided", "shampoo_no_side"),
    *("soap_eigh", "soap_every_third", "soap_ramp", "soap_overlap_every_third"),
    *("kl_shampoo_eigh", "kl_shampoo_overlap_ramp"),
    *("splus", "splus_iterated"),
    *("rekls", "rekls_every_third", "rekls_overlap", "rekls_v3", "tp_rekls"),
    *("spectron", "spectron_truncated", "spectron_l2"),
}
TABLE = [case for case in CASES if case.name not in REFUSED]
# What waits for the device or copies from the host: reading a number, sizes that depend on values, factorizations whose
# success the host checks, tensors of Python numbers.
HOST = (
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"),
    *("_linalg_eigh", "_linalg_svd", "linalg_inv", "linalg_cholesky", "_linalg_solve", "linalg_lu_factor"),
    *("lift_fresh", "lift", "_pin_memory"),
)
WARM_STEPS = 3


class Recording(TorchDispatchMode):
    """Operators with their arguments, as a CUDA graph keeps kernels: with the memory that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace != "profiler":
            self.calls.append((func, args, kwargs or {}, out))
        return out

    def numbers(self) -> list[Any]:
        """The calls without their tensors' values."""

        def plain(x: Any) -> Any:
            return tree_map_only(Tensor, lambda t: (tuple(t.shape), t.dtype, t.device), x)

        return [(str(func), plain(args), plain(kwargs)) for func, args, kwargs, _ in self.calls]

    @torch.no_grad()
    def replay(self) -> None:
        """The same operators on the same memory."""
        for func, args, kwargs, out in self.calls:
            inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in inputs:  # no view, not in place
                    old.copy_(new)


def gradients(ps: list[torch.nn.Parameter], t: int, missing: Callable[[int, int], bool]) -> None:
    """New gradients in the memory of the old ones, as in a captured training step."""
    buffers = [p.grad for p in ps]
    set_gradients(ps, t, missing)
    for p, buffer in zip(ps, buffers, strict=True):
        if buffer is not None and p.grad is not None:
            p.grad = buffer.copy_(p.grad)


def without_the_second(i: int, t: int) -> bool:
    return i == 1


@pytest.mark.parametrize(
    ("case", "missing"),
    [pytest.param(case, without_the_second, id=f"{case}-some") for case in TABLE]
    + [pytest.param(case, lambda i, t: False, id=f"{case}-all") for case in TABLE if case in SEEDS],
)
def test_a_recorded_step_repeated_is_the_run(case: OptimizerCase, missing: Callable[[int, int], bool]) -> None:
    """No number of the host changes from step to step, and none is read."""
    decay = 0.0 if case.name == "laprop_frob" else 0.1  # where it has no effect, and a warning says so
    options: dict[str, Any] = {"weight_decay": decay, "spike_guard": 5.0}
    start = parameters(case, torch.float64)
    rate = case.kwargs.get("lr", 0.01)

    ps = parameters(case, torch.float64)
    optimizer = case.make(ps, capturable=True, **options)
    recordings: list[Recording] = []
    for t in range(1, 8):
        gradients(ps, t, missing)
        for group in optimizer.param_groups:
            group["lr"].fill_(rate / t)
        if t <= WARM_STEPS:
            optimizer.step()
        elif t <= WARM_STEPS + 2:
            with Recording() as recording:
                optimizer.step()
            recordings.append(recording)
        else:
            recordings[0].replay()

    first, second = (recording.numbers() for recording in recordings)
    assert first == second
    names = {func.overloadpacket.__name__ for func, *_ in recordings[0].calls}
    assert not names & set(HOST)
    plain, _ = run(case, 7, dtype=torch.float64, missing=missing, schedule=lambda t: rate / t, **options)
    assert distance(ps, plain, start) < 1e-7


def test_a_basis_by_cholesky_asks_the_host_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(routes.ORTHONORMALIZERS, "cpu", "cholesky")
    test_a_recorded_step_repeated_is_the_run(next(case for case in CASES if case.name == "soap"), without_the_second)


@pytest.mark.parametrize(
    ("case", "execution"),
    [
        # The options of an optimizer change its law, not how a matrix alone is passed to it.
        pytest.param(
            case, how, id=f"{case}-{how}", marks=[pytest.mark.slow] if how == "per_matrix" and case not in SEEDS else []
        )
        for case in TABLE
        for how in ("stacked", "per_matrix")
    ],
)
def test_it_changes_no_result(case: OptimizerCase, execution: str) -> None:
    """With gradients that come and go."""

    def ragged(i: int, t: int) -> bool:
        return (i + t) % 5 == 0 or (i == 1 and t < 4)

    plain, _ = run(case, 6, dtype=torch.float64, missing=ragged, execution=execution)
    found, optimizer = run(case, 6, dtype=torch.float64, missing=ragged, execution=execution, capturable=True)
    assert distance(found, plain, parameters(case, torch.float64)) < 1e-7
    assert all(group["lr"].dtype == torch.float64 for group in optimizer.param_groups)


@pytest.mark.parametrize("name", ["adamw", "muon", "soap"])
def test_a_gradient_that_is_not_finite_sits_the_step_out(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    ps = parameters(case)
    optimizer = case.make(ps, capturable=True)
    for t in range(1, 4):
        set_gradients(ps, t)
        optimizer.step()
    before = ps[0].detach().clone()
    set_gradients(ps, 4)[0].fill_(torch.nan)
    optimizer.step()
    assert torch.equal(ps[0], before)
    assert optimizer.guard_events() == {"param_groups[0]['params'][0]": (0, 1)}
    if "step" in optimizer.state[ps[0]]:
        assert [int(optimizer.state[p]["step"]) for p in ps[:2]] == [3, 4]


@pytest.mark.parametrize("case", [case for case in CASES if case.name in REFUSED], ids=str)
def test_what_needs_the_host_is_refused(case: OptimizerCase) -> None:
    with pytest.raises(ValueError, match=r"capturable=True is not possible: .*; (give|use) "):
        case.make(parameters(case), capturable=True)


def weight() -> torch.nn.Parameter:
    w = torch.nn.Parameter(torch.ones(3, 2))
    w.grad = torch.ones(3, 2)
    return w


def test_other_options_that_need_the_host_are_named() -> None:
    with pytest.raises(ValueError, match=r"AdamW: param_groups\[0\]: .* nonfinite='raise'"):
        AdamW([weight()], capturable=True, nonfinite="raise")
    with pytest.raises(ValueError, match=r"lr is a tensor on meta and the parameters are on cpu"):
        AdamW([weight()], lr=torch.ones((), device="meta"), capturable=True)
    with pytest.raises(ValueError, match=r"parameters on cpu, meta"):
        AdamW([weight(), torch.nn.Parameter(torch.ones(2, device="meta"))], capturable=True)
    optimizer = SOAP([weight()], lr=0.1, capturable=True)
    optimizer.param_groups[0]["precondition_frequency"] = 10
    with pytest.raises(ValueError, match="a period of 10 steps; give precondition_frequency=1"):
        optimizer.step()


def test_a_rate_is_a_number_or_a_tensor_and_schedulers_fill_it() -> None:
    w = weight()
    optimizer = AdamW([w], lr=0.5, capturable=True)
    rate = optimizer.param_groups[0]["lr"]
    assert (rate.item(), rate.dtype, rate.shape) == (0.5, torch.float64, ())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.25
    optimizer.param_groups[0]["lr"] = 0.125  # taken over by the next step
    optimizer.step()
    assert optimizer.param_groups[0]["lr"].item() == 0.125
    torch.testing.assert_close(w.detach(), torch.full((3, 2), 1 - 0.5 - 0.125), rtol=0, atol=0.02)


def test_a_checkpoint_goes_on_and_a_group_may_join() -> None:
    case = next(case for case in CASES if case.name == "soap")
    ps = parameters(case)
    a = case.make(ps, capturable=True)
    for t in range(1, 4):
        set_gradients(ps, t)
        a.step()
    qs = [torch.nn.Parameter(p.detach().clone()) for p in ps]
    b = case.make(qs)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    assert b.param_groups[0]["capturable"] is True
    for t in range(4, 6):
        set_gradients(ps, t)
        for p, q in zip(ps, qs, strict=True):
            q.grad = p.grad
        a.step()
        b.step()
    assert all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))


def test_create_optimizer_passes_it_on() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    optimizer = create_optimizer("muon", model, lr=0.1, capturable=True)
    assert all(group["capturable"] and torch.is_tensor(group["lr"]) for group in optimizer.param_groups)


def test_a_capture_before_its_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, w = Muon([weight()]), weight()
    optimizer = SOAP([w], lr=0.1, capturable=True)
    capturing = False
    for module in (engine, capture):
        monkeypatch.setattr(module, "is_capturing", lambda: capturing)
    for count in range(4):
        capturing = True
        before = w.detach().clone()
        if count < 2:
            with pytest.raises(ValueError, match=rf"its {count + 1}\., differs from the later ones.*take three steps"):
                optimizer.step()
            assert torch.equal(w, before)
        else:
            optimizer.step()
        with pytest.raises(ValueError, match=r"param_groups\[0\] has capturable=False"):
            plain.step()
        capturing = False
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.2
    capturing = True
    with pytest.raises(ValueError, match=r"lr=0\.2 is a number, which the CUDA graph .* would keep"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.2)
    optimizer.param_groups[0]["spike_guard"] = 2.0
    with pytest.raises(ValueError, match="makes state"):
        optimizer.step()


@pytest.mark.gpu
@pytest.mark.parametrize("execution", ["stacked", "compiled"])
@pytest.mark.parametrize("case", TABLE, ids=str)
def test_a_cuda_graph_repeats_the_step(case: OptimizerCase, execution: str) -> None:
    if execution == "compiled" and case.name not in ("adamw", "muon", "soap"):
        pytest.skip("three of the table are enough to compile")
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.float64}
    rate, missing = case.kwargs.get("lr", 0.01), without_the_second
    ps = parameters(case, torch.float64, "cuda")
    optimizer = case.make(ps, capturable=True, execution=execution)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    for t in range(1, 9):
        gradients(ps, t, missing)
        for group in optimizer.param_groups:
            group["lr"].fill_(rate / t)
        torch.cuda.synchronize()
        if t <= WARM_STEPS:
            with torch.cuda.stream(stream):
                optimizer.step()
        elif t == WARM_STEPS + 1:
            with torch.cuda.graph(graph, stream=stream):
                optimizer.step()
            graph.replay()
        else:
            graph.replay()
        torch.cuda.synchronize()
    plain, _ = run(case, 8, missing=missing, schedule=lambda t: rate / t, **options)
    assert distance(ps, plain, parameters(case, torch.float64, "cuda")) < 1e-6
