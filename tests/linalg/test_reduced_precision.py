"""What "medium" is on a device: by what the CPU says, by one measurement where it does not, or by force."""

import runpy
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from emerging_optimizers import create_optimizer, estimate, plan_parameters
from emerging_optimizers.linalg import precision
from emerging_optimizers.linalg.emulation import emulate_bf16
from emerging_optimizers.linalg.precision import (
    VARIABLE,
    fp32_matmul_precision,
    reduced_dtype,
    reduced_in_words,
    reduced_precision,
)
from emerging_optimizers.orthogonalized_optimizers import Muon, Spectron
from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz
from emerging_optimizers.soap import SOAP

CPU = torch.device("cpu")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that has not decided yet, where nothing is asked for or limited."""
    monkeypatch.setattr(precision, "_fast", None)
    monkeypatch.setattr(precision, "_asked", precision._Asked("auto", ""))
    for name in precision._LIMITS:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def on(machine: str, fresh: pytest.MonkeyPatch, *, amx: bool = False, avx512_bf16: bool = False) -> None:
    fresh.setattr(precision.platform, "machine", lambda: machine)
    fresh.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    fresh.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)


def measuring(fresh: pytest.MonkeyPatch, share: float) -> list[float]:
    """Where a measurement would say `share`; the list grows with each."""
    calls: list[float] = []

    def measure() -> float:
        calls.append(share)
        time.sleep(0.02)
        return share

    fresh.setattr(precision, "_measure", measure)
    return calls


@pytest.mark.parametrize("has", [{"amx": True}, {"avx512_bf16": True}, {}], ids=str)
def test_what_an_x86_cpu_says_settles_it(fresh, has) -> None:
    calls = measuring(fresh, 99.0 if has else 0.1)  # which is not asked
    on("x86_64", fresh, **has)
    assert reduced_dtype(CPU) == (torch.bfloat16 if has else torch.float32)
    words = (
        "bfloat16 (this CPU has AMX or avx512_bf16)" if has else "float32 (this CPU has no bfloat16 matrix hardware)"
    )
    assert reduced_in_words(CPU) == words
    assert not calls


@pytest.mark.parametrize("name", precision._LIMITS)
@pytest.mark.parametrize("share", [0.3, 30.0])
def test_a_limit_on_its_instructions_is_measured(fresh, name, share) -> None:
    calls = measuring(fresh, share)
    on("AMD64", fresh, avx512_bf16=True)
    fresh.setenv(name, "AVX2")
    assert reduced_dtype(CPU) == (torch.bfloat16 if share < 1 else torch.float32)
    assert len(calls) == 1


@pytest.mark.parametrize(("share", "dtype"), [(0.5, "bfloat16"), (0.75, "bfloat16"), (0.76, "float32"), (4, "float32")])
def test_elsewhere_one_measurement_settles_it_for_all_threads(fresh, share, dtype) -> None:
    calls = measuring(fresh, share)
    on("aarch64", fresh)
    answers: list[torch.dtype] = []
    threads = [threading.Thread(target=lambda: answers.append(reduced_dtype(CPU))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [getattr(torch, dtype)] * 8
    fast = "faster" if dtype == "bfloat16" else "not faster"
    assert reduced_in_words(CPU) == f"{dtype} (measured on this CPU: bfloat16 is {fast} than float32)"
    assert len(calls) == 1


def test_without_onednn_it_is_float32_and_with_it_again_what_it_was(fresh) -> None:
    on("x86_64", fresh, amx=True)
    assert reduced_dtype(CPU) == torch.bfloat16
    fresh.setattr(torch.backends.mkldnn, "enabled", False)  # not its `flags`, which warn about something else
    assert reduced_dtype(CPU) == torch.float32
    assert "oneDNN" in reduced_in_words(CPU)
    fresh.setattr(torch.backends.mkldnn, "enabled", True)
    assert reduced_dtype(CPU) == torch.bfloat16


def test_an_accelerator_has_bfloat16_whatever_the_cpu_has(fresh) -> None:
    on("x86_64", fresh)
    assert reduced_dtype(torch.device("cuda")) == torch.bfloat16
    assert reduced_in_words(torch.device("cuda", 1)) == "bfloat16 (on cuda)"


def test_the_measurement_is_one_of_real_products_and_leaves_no_trace(fresh) -> None:
    before = torch.get_rng_state()
    with fp32_matmul_precision("medium"), torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        with FakeTensorMode(), torch.inference_mode(), emulate_bf16():
            assert 0 < precision._measure() < float("inf")
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.equal(torch.get_rng_state(), before)


def test_a_graph_that_is_being_compiled_measures_once_and_follows_what_is_asked_for(fresh) -> None:
    calls = measuring(fresh, 0.3)
    on("aarch64", fresh)

    @torch.compile(fullgraph=True, backend="eager")
    def cast(x: torch.Tensor) -> torch.Tensor:
        return x.to(reduced_dtype(x.device)) + 1

    x = torch.ones(2)
    assert cast(x).dtype == torch.bfloat16
    with reduced_precision("float32"):
        assert cast(x).dtype == torch.float32
    assert cast(x).dtype == torch.bfloat16
    assert len(calls) == 1


@pytest.mark.parametrize("word", ["bfloat16", "float32"])
def test_force_holds_on_every_device_until_the_block_ends(fresh, word) -> None:
    on("x86_64", fresh, amx=word == "float32")
    before = reduced_dtype(CPU)
    with reduced_precision(word):
        for device in (CPU, torch.device("cuda")):
            assert reduced_dtype(device) == getattr(torch, word)
            assert reduced_in_words(device) == f"{word} (reduced_precision asks for it)"
        with reduced_precision("auto"):
            assert reduced_dtype(CPU) == before
    assert reduced_dtype(CPU) == before


@pytest.mark.parametrize("amx", [True, False])
def test_torchs_own_products_on_a_cpu_are_plain_where_medium_is_float32(fresh, amx) -> None:
    on("x86_64", fresh, amx=amx)
    with fp32_matmul_precision("medium"):
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == ("bf16" if amx else "ieee")
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_medium_is_highest_where_float32_is_asked_for() -> None:
    with reduced_precision("float32"), fp32_matmul_precision("medium"):
        assert torch.get_float32_matmul_precision() == "highest"
    with reduced_precision("bfloat16"), fp32_matmul_precision("medium"):
        assert torch.get_float32_matmul_precision() == "medium"


def test_another_word_is_an_error_before_anything_has_changed() -> None:
    before = precision._asked
    match = "reduced_precision='half' is not one of auto, bfloat16, float32"
    with pytest.raises(ValueError, match=match), reduced_precision("half"):
        pytest.fail("the block ran")
    assert precision._asked == before


@pytest.mark.parametrize("word", ["bfloat16", "float32", "half"])
def test_the_environment_asks_in_the_same_words(word, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, word)
    if word == "half":
        with pytest.raises(ValueError, match=f"{VARIABLE}='half' is not one of auto, bfloat16, float32"):
            runpy.run_path(precision.__file__)
    else:
        anew = runpy.run_path(precision.__file__)  # as by the first import of a process
        assert anew["reduced_in_words"](CPU) == f"{word} ({VARIABLE} asks for it)"


def test_importing_decides_nothing() -> None:
    code = (
        "import emerging_optimizers.orthogonalized_optimizers, emerging_optimizers.cost;"
        "from emerging_optimizers.linalg import precision; assert precision._fast is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def trained(execution: str, medium: str, fp32_matmul_prec: str, kind: type = Muon, side: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    w = nn.Parameter(torch.randn(side, 16, generator=generator))
    optimizer = kind([w], lr=0.1, fp32_matmul_prec=fp32_matmul_prec, execution=execution)
    with reduced_precision(medium):
        for _ in range(3):
            w.grad = torch.randn(side, 16, generator=generator)
            optimizer.step()
    return w.detach()


@pytest.mark.usefixtures("without_code")
@pytest.mark.parametrize("execution", ["stacked", "per_matrix", "compiled"])
def test_muon_at_medium_is_muon_at_highest_where_that_is_float32(execution) -> None:
    highest = trained(execution, "auto", "highest")
    assert torch.equal(trained(execution, "float32", "medium"), highest)
    rounded = trained(execution, "bfloat16", "medium")
    assert not torch.equal(rounded, highest)
    torch.testing.assert_close(rounded, highest, rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", [Muon, SOAP], ids=lambda kind: kind.__name__)
def test_so_it_is_where_the_cpu_has_no_bfloat16(fresh, kind) -> None:
    on("x86_64", fresh)
    # Long enough that another library's products would differ in their last bits.
    highest = trained("stacked", "auto", "highest", kind, 512)
    assert torch.equal(trained("stacked", "auto", "medium", kind, 512), highest)


def test_the_published_function_follows_too() -> None:
    x = torch.randn(2, 12, 8)
    exact = newton_schulz(x, 5)
    with fp32_matmul_precision("medium"):
        with reduced_precision("float32"):
            assert torch.equal(newton_schulz(x, 5), exact)
        with reduced_precision("bfloat16"):
            rounded = newton_schulz(x, 5)
    assert 1e-4 < float((rounded - exact).abs().max()) < 0.05


def test_where_bfloat16_is_emulated_newton_schulz_multiplies_in_it() -> None:
    x = torch.randn(2, 12, 8)
    with reduced_precision("bfloat16"), fp32_matmul_precision("medium"):
        expected = newton_schulz(x, 5)
    with reduced_precision("float32"), emulate_bf16(), fp32_matmul_precision("medium"):
        assert torch.equal(newton_schulz(x, 5), expected)


def test_what_is_refused_in_bfloat16_is_refused_where_medium_is_float32() -> None:
    with reduced_precision("float32"):
        for options in ({"coefficient_type": "cans"}, {"accuracy": 0.01}):
            with pytest.raises(ValueError, match="fp32_matmul_prec"):
                Muon([torch.zeros(2, 2)], **options)


def test_optimizers_plans_and_estimates_say_it() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6))
    line = 'Newton-Schulz at "medium" multiplies in float32 (reduced_precision asks for it)'
    w = [nn.Parameter(torch.zeros(4, 2))]
    with reduced_precision("float32"):
        for shown in (
            Muon(w),
            Spectron(w, lr=0.1, rank=2),
            create_optimizer("muon", model),
            plan_parameters(model, "muon"),
            plan_parameters(model, "spectron", lr=0.1, companion_lr=0.01),
            estimate(model, "muon", seconds=False),
            estimate(w, Muon, seconds=False),
        ):
            assert str(shown).splitlines()[-1] == line
        for shown in (
            Muon(w, fp32_matmul_prec="highest"),
            Muon(w, orthogonalizer="qdwh"),
            Spectron(w, lr=0.1, rank=2, fp32_matmul_prec="high"),
            create_optimizer("soap", model, lr=0.1),
            create_optimizer("muon", model, fp32_matmul_prec="high"),
            plan_parameters(model, "soap", lr=0.1),
            estimate(w, torch.optim.SGD, seconds=False),
        ):
            assert "medium" not in str(shown).replace("fp32_matmul_prec: medium", "")
