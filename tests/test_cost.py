"""What an estimate counts is what a step does: state to the byte, products by hand, peaks by the same count."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from emerging_optimizers import create_optimizer, estimate
from emerging_optimizers.cost.meter import Like, Meter
from emerging_optimizers.cost.repeats import _OnceEach
from emerging_optimizers.cost.timings import Timings
from emerging_optimizers.engine import chunks
from emerging_optimizers.engine.run import BucketStep
from emerging_optimizers.lab.__main__ import main
from emerging_optimizers.linalg.precision import reduced_precision
from emerging_optimizers.orthogonalized_optimizers import Muon
from emerging_optimizers.registry import OPTIMIZERS, entry

READS_WEIGHTS = ("muon_hyperball", "spectron")


@pytest.fixture(scope="module", autouse=True)
def _no_call_on_real_tensors() -> Iterator[None]:
    """As torch makes, of any size, where an operator has no fake kernel; its cache would hide the second one."""

    def refuse(mode: Any, func: Any, *_: Any) -> Any:
        raise AssertionError(f"{func} was run on real tensors")

    FakeTensorMode.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_tensor, "run_fallback_kernel", refuse)
        yield


def matrix(M: int, N: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(M, N, device="meta"))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in READS_WEIGHTS])
def test_the_state_has_the_bytes_that_were_said(name: str) -> None:

    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 12, bias=False))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cost = estimate(model, name, seconds=False)
    optimizer = create_optimizer(name, model, lr=1e-3 if OPTIMIZERS[name].in_adams_unit else None)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    kept = {
        name: sum(x.numel() * x.element_size() for x in optimizer.state[p].values())
        for name, p in model.named_parameters()
    }
    assert {n: cost.state_bytes for n, cost in cost.by_parameter.items()} == kept
    assert cost.state_bytes == sum(kept.values())
    assert cost.elements == sum(p.numel() for p in model.parameters())
    assert before.keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", READS_WEIGHTS)
def test_an_optimizer_that_reads_its_weights_says_so(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' looks at values of the weights"):
        estimate([matrix(8, 8)], name, seconds=False)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in READS_WEIGHTS])
def test_nothing_grows_with_the_square_of_a_long_side(name: str) -> None:
    """A vocabulary's factor would take 9.4 GiB; allowed are a few numbers for each of the weight."""
    for shape in ((50304, 96), (96, 50304)):
        cost = estimate([matrix(*shape)], name, seconds=False)
        assert cost.state_bytes <= 3.1 * 4 * cost.elements
        assert cost.peak_bytes <= 9 * 4 * cost.elements


@pytest.mark.parametrize("name", ["shampoo", "psgd_pro"])
def test_a_side_of_the_limit_has_its_factor_and_without_a_limit_every_side(name: str) -> None:
    for size, options in ((10_000, {}), (10_001, {"max_precond_dim": None})):
        cost = estimate([matrix(size, 8)], name, seconds=False, **options)
        assert cost.state_bytes == pytest.approx(4 * (size**2 + size * 8 + 8**2), abs=16)
    assert estimate([matrix(10_001, 8)], name, seconds=False).state_bytes < 4 * 10_001 * 10


def test_the_products_of_muon_by_hand() -> None:
    M, N = 16, 24
    cost = estimate([matrix(M, N)], Muon, seconds=False)
    assert cost.flops == 5 * (2 * M * M * N + 2 * M**3 + 2 * M * M * N)


def test_a_refresh_every_tenth_step_is_a_tenth_of_the_refreshes() -> None:
    def flops(frequency: int) -> float:
        matrices = [matrix(20, 12) for _ in range(4)]
        return estimate(matrices, "soap", seconds=False, precondition_frequency=frequency).flops

    never = (10 * flops(10) - flops(1)) / 9
    assert flops(1) > 2 * never
    assert flops(5) == pytest.approx(never + (flops(1) - never) / 5)


def test_the_peak_is_that_of_real_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    ps = [nn.Parameter(torch.randn(64, 96)) for _ in range(6)]
    optimizer = create_optimizer("soap", ps, lr=1e-3, nonfinite="propagate")
    for p in ps:
        p.grad = torch.randn_like(p)
    for _ in range(3):
        optimizer.step()
    there = [*ps, *(p.grad for p in ps), *(x for s in optimizer.state.values() for x in s.values())]
    with torch.no_grad(), Meter(there) as meter:
        optimizer.step()
    whole = estimate(ps, "soap", seconds=False).peak_bytes
    assert whole == pytest.approx(meter.peak, rel=0.05)
    monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", 64 * 96 * 4)
    assert estimate(ps, "soap", seconds=False).peak_bytes < 0.25 * whole


@pytest.mark.parametrize(
    ("name", "options", "times"),
    [("muon", {}, 2.5), ("muon", {"fp32_matmul_prec": "highest"}, 4), ("soap", {}, 11), ("rekls", {}, 11)],
)
def test_a_long_matrix_is_not_held_more_often_than_needed(name: str, options: dict[str, str], times: float) -> None:
    """The new state stands beside the old one until it is written together with the weight."""
    side = 1024
    with reduced_precision("bfloat16"):
        cost = estimate([matrix(side, side)], name, seconds=False, **options)
    assert cost.peak_bytes <= 1.01 * times * 4 * side**2


def test_what_a_step_touches_first_comes_from_memory() -> None:
    weight, other = torch.zeros(4, 6), torch.zeros(6)
    with Meter([weight]) as meter:
        row = weight.view(-1)[6:12]  # views read nothing
        row.add_(other)
        row.add_(other)
        meter.touched.clear()
        weight[1].add_(other)
    adds = {op.args[0].cold: count for op, count in meter.counts.operations.items() if "add_" in str(op.func)}
    assert adds == {True: 2, False: 1}
    assert not any(x.cold for op in meter.counts.operations if op.func.is_view for x in op.args if isinstance(x, Like))
    assert not any(op.args[1].cold for op in meter.counts.operations if "add_" in str(op.func))


def test_seconds_count_python_and_the_look_at_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Timings, "_time", lambda self, operation: 1.0 if "dot" in str(operation.func) else 0.0)
    monkeypatch.setattr(Timings, "parameter", 1e-3)
    vectors = [nn.Parameter(torch.zeros(2**14)) for _ in range(3)]
    assert estimate(vectors, "adamw").seconds == pytest.approx(3 + 3e-3)
    assert estimate(vectors, "adamw", nonfinite="propagate").seconds == pytest.approx(3e-3)
    assert estimate(vectors, lambda ps: torch.optim.SGD(ps, lr=1.0)).seconds == 0


def test_python_takes_microseconds_for_a_parameter() -> None:
    assert 0 <= Timings().parameter < 1e-3


def test_seconds_and_the_table() -> None:
    cost = estimate([("w", matrix(32, 32))], "muon")
    assert cost.seconds is not None
    assert 0 < cost.seconds < 10
    assert str(cost).splitlines()[1].split()[:3] == ["1", "x", "32x32"]


@pytest.mark.parametrize("name", ["laprop", "rmsprop"])
def test_steps_and_estimates_may_follow_each_other(name: str) -> None:
    """Both have a kernel that writes into memory which nobody needs and which is kept from step to step."""
    p = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = entry(name).load()([p], lr=0.1)
    for _ in range(2):
        before = p.detach().clone()
        assert estimate([p], name).state_bytes > 0
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert (p < before).all()


def test_options_belong_to_a_name() -> None:
    with pytest.raises(TypeError, match="'momentum' belongs to a name"):
        estimate([matrix(2, 2)], Muon, momentum=0.9)


def test_what_makes_no_optimizer_is_named() -> None:
    p = matrix(2, 2)
    with pytest.raises(TypeError, match=r"optimizer is a Muon; give a name .* lambda params: AdamW"):
        estimate([p], Muon([p], lr=0.1))


@pytest.mark.parametrize("name", ["adamw", "soap"])
def test_a_compiled_step_cannot_be_counted(name: str) -> None:
    with pytest.raises(ValueError, match=r"execution='compiled' .* leave it out"):
        estimate([matrix(2, 2)], name, execution="compiled")


@pytest.mark.parametrize(
    "options",
    [
        {"cautious": True},
        {"capturable": True},
        {"lr": torch.tensor(1e-3)},
        {"offload": "cpu"},
        {"state_dtype": "int8"},
        {"state_dtype": torch.bfloat16},
        {"weight_rounding": "stochastic"},
        {"weight_rounding": "compensated"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_seconds_whatever_the_options(name: str, options: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if "weight_rounding" in options else torch.float32
    parameters = [nn.Parameter(torch.empty(shape, dtype=dtype)) for shape in ((72, 80), (72, 80), (64, 64))]
    assert (estimate(parameters, name, **options).seconds or 0) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_device_that_is_not_there_is_named_before_anything_runs() -> None:
    with pytest.raises(ValueError, match=r"device='cuda:0' is not there .* give device='cpu'"):
        estimate([matrix(2, 2)], "muon", "cuda:0", seconds=False)
    with pytest.raises(SystemExit, match="device='cuda' is not there"):
        main(["estimate", "muon", "--device", "cuda"])


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["estimate", "muon", "--shapes", "2*8x4,4x4", "--no-seconds"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["count", "2", "1", "all", "temporaries", "Newton-Schulz"]
    with pytest.raises(SystemExit, match="lion2"):
        main(["estimate", "lion2"])


def test_a_large_call_is_timed_by_a_smaller_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many sides are cut as there are, and the time grows by the work."""
    timed = []
    monkeypatch.setattr(Timings, "_measured", lambda self, operation: timed.append(operation) or 1.0)
    with FakeTensorMode(), Meter(()) as meter:
        a, b = torch.empty(40_000, 50_000), torch.empty(50_000, 40_000).mT.contiguous().mT
        _ = a @ b
        _ = a.add(a)
    seconds = {str(op.func): Timings()._time(op) for op in meter.counts.operations}
    mm, add = (next(op for op in timed if name in str(op.func)) for name in ("mm", "add"))
    left, right = mm.tensors()
    assert left.shape[1] == right.shape[0]
    assert right.stride[0] == 1
    assert 2 * left.shape[0] * left.shape[1] * right.shape[1] <= 2**32
    assert seconds["aten.mm.default"] == 40_000 * 40_000 * 50_000 / (left.shape[0] * left.shape[1] * right.shape[1])
    assert sum(x.nbytes for x in add.tensors()) <= 2**26
    assert seconds["aten.add.Tensor"] == 40_000 * 50_000 / (add.tensors()[0].shape[0] * add.tensors()[0].shape[1])


def test_an_estimate_makes_nothing_as_large_as_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """One matrix of 256 MiB; what is made to be timed has a quarter of that in all of its operands."""
    made = []
    monkeypatch.setattr(Timings, "_measured", lambda self, operation: made.append(operation) or 1e-6)
    cost = estimate([matrix(8192, 8192)], "muon")
    assert cost.seconds is not None
    assert max(sum(x.nbytes for x in operation.tensors()) for operation in made if not operation.func.is_view) <= 2**26


_HUGE = """
import resource, sys, time, torch
from emerging_optimizers import estimate
resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
for name in sys.argv[1:]:
    cost = estimate([torch.nn.Parameter(torch.empty(100_000, 100_000, device="meta"))], name, seconds=False)
    print(name, cost.state_bytes // 10**10, f"{cost.flops:.3g}", time.process_time() < 60)
"""


def test_a_matrix_of_40_gigabytes_takes_neither_memory_nor_time() -> None:
    """Chunks that are alike and the blocks of a product are counted once; nothing is made for want of a fake kernel."""
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{_HUGE}", "adamw", "muon", "soap", "madam"],
        capture_output=True,
        text=True,
        timeout=250,
    )
    lines = found.stdout.splitlines()
    assert lines == ["adamw 8 0 True", "muon 4 2e+16 True", "soap 8 0 True", "madam 8 0 True"], found.stderr[-2000:]


@pytest.mark.parametrize("name", ["adamw", "muon", "soap", "lion"])
def test_what_is_passed_over_counts_as_if_it_had_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", 4 * 24 * 16)
    monkeypatch.setattr(chunks, "ELEMENT_CHUNK", 100)
    monkeypatch.setattr(chunks, "FUSED_CHUNK", 100)
    ps = [*(matrix(24, 16) for _ in range(5)), matrix(16, 24), nn.Parameter(torch.empty(3, 24, 16, device="meta"))]
    once = estimate(ps, name, seconds=False)
    monkeypatch.setattr(_OnceEach, "_take_chunk", BucketStep._take_chunk)
    every = estimate(ps, name, seconds=False)
    assert (once.state_bytes, once.peak_bytes) == (every.state_bytes, every.peak_bytes)
    assert once.flops == pytest.approx(every.flops)
