"""The step benchmark: counts against hand counts, ratios, a tiny run in worker processes, the page."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.step import checks
from benchmarks.step.arms import ARMS, PEERS
from benchmarks.step.cli import Run
from benchmarks.step.floors import Eigenbasis, NewtonSchulz, Traffic, floor
from benchmarks.step.promises import promise
from benchmarks.step.render import BEGIN, END, render
from benchmarks.step.run import ArmError, Request, chosen, compare, load, measure, quartiles, rounded, worker
from benchmarks.step.worker import PATHS, TYPE_PARAMETERS, tensors
from benchmarks.step.workloads import WORKLOADS, Workload, elements
from emerging_optimizers.lab.config import UsageError
from emerging_optimizers.linalg.coefficients import coefficients

TINY = Workload(name="tiny", family="muon", about="three matrices", cpu=((2, (8, 8)), (1, (8, 16))), gpu=())


@pytest.mark.parametrize(
    ("m", "n", "usual", "least"),
    [
        (1, 1, 30, 20),  # symmetric products, no gain of the Gram form
        (1, 2, 50, 26),  # Gram with a restart: 6 m^2 n + 14 m^3
        (4, 1, 90, 38),  # tall is wide
    ],
)
def test_floor_of_newton_schulz(m, n, usual, least):
    side = 64
    assert NewtonSchulz().counts(((3, (m * side, n * side)),)) == (3 * usual * side**3, 3 * least * side**3)


def test_floor_of_newton_schulz_counts_the_products_of_the_iteration():
    m, n, steps = 8, 24, 5
    one = 2 * m * n * m + 2 * m * m * m + 2 * m * m * n  # X X^T, A A, B X
    assert NewtonSchulz(steps=steps).counts(((1, (n, m)),))[0] == steps * one
    assert NewtonSchulz(steps=steps).counts(((1, (4, n, m)),))[0] == 4 * steps * one


def test_floor_of_soap():
    m = n = 16
    both, cubes = 4 * m**3, 2 * m**3
    shapes = ((2, (m, n)),)
    assert Eigenbasis().counts(shapes) == pytest.approx(
        (2 * (5 * both + 20 / 3 * cubes), 2 * (3.5 * both + 14 / 3 * cubes))
    )
    assert Eigenbasis(every=10).counts(shapes)[1] == pytest.approx(2 * (2.7 * both + 0.4667 * cubes), rel=1e-4)
    assert Eigenbasis(kl=True).counts(shapes)[0] - Eigenbasis().counts(shapes)[0] == pytest.approx(2 * both)


def test_floor_is_counts_over_rates():
    # Adam reads gradient, weight and two moments and writes three of them: 7 x 4 bytes.
    limit = floor(ARMS["AdamW"].cost, ((10, (100,)),), {"copy": 1000.0})
    assert limit is not None
    assert (limit.usual, limit.least) == (28.0, 28.0)
    assert ARMS["Lion"].cost == Traffic(bytes=20)
    assert floor(NewtonSchulz(rate="tf32"), ((1, (8, 8)),), {"copy": 1.0}) is None


def test_workloads_are_the_models_that_they_name():
    assert elements(WORKLOADS["gpt2"].gpu) == 12 * 12 * 768**2
    assert 2 * elements(WORKLOADS["llama"].gpu) == 16 * (2 * 2048**2 + 2 * 512 * 2048 + 3 * 8192 * 2048)
    assert elements(WORKLOADS["vit"].gpu) == 12 * 12 * 384**2
    resnet = WORKLOADS["resnet50"].gpu
    assert sum(count for count, _ in resnet) == 53
    assert elements(resnet) == 25_557_032 - 2_049_000 - 53_120  # the model less its head and its norms
    assert sum(count for count, _ in WORKLOADS["elements"].cpu) == 300
    assert elements(WORKLOADS["elements"].cpu) == pytest.approx(33e6, rel=0.01)
    assert all(count * 4096 >= elements(((count, shape),)) for count, shape in WORKLOADS["vectors"].cpu)


def test_every_arm_can_be_loaded_as_data():
    for arm in ARMS.values():
        assert arm.peer in PEERS
        json.dumps([dict(arm.kwargs), dict(arm.setup), dict(arm.group)])
        assert arm.against in ARMS or arm.against.startswith("a peer's ")


def arm_result(peer, against, seconds, passes=True):
    middle = sorted(seconds)[len(seconds) // 2]
    return {"peer": peer, "against": against, "seconds": seconds, "median_s": middle, "check": {"passes": passes}}


def test_ratio_is_the_median_of_the_ratios_of_each_round():
    results = {
        "ours": arm_result("ours", "theirs", [1.0, 4.0, 2.0]),
        "theirs": arm_result("published", "theirs", [2.0, 2.0, 5.0]),
    }
    compare(results)
    assert results["ours"]["ratio"] == 0.5  # of 0.5, 2.0, 0.4; the ratio of the medians would be 1
    assert results["ours"]["ratio_quartiles"] == pytest.approx([0.45, 1.25])
    assert results["theirs"]["ratio"] == 1


def test_the_fastest_exact_peer_stands_in_for_one_that_did_not_run():
    results = {
        "ours": arm_result("ours", "published", [1.0]),
        "published": {**arm_result("published", "published", [0.1]), "error": "no checkout"},
        "slow": arm_result("a", "published", [4.0]),
        "fast": arm_result("b", "published", [2.0]),
        "wrong": arm_result("c", "published", [0.5], passes=False),
        "other": arm_result("ours", "nothing", [1.0]),
    }
    compare(results)
    assert (results["ours"]["compared_with"], results["ours"]["ratio"]) == ("fast", 0.5)
    assert "ratio" not in results["other"]


def test_quartiles_and_rounding():
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 4.0]
    assert quartiles([3.0]) == [3.0, 3.0]
    assert rounded({"a": [1.2345678, 7], "b": "text"}) == {"a": [1.2346, 7], "b": "text"}
    assert promise("growth", "", [16.0, 15.0, 99.0])["kept"]
    assert not promise("import", "", [0.2])["kept"]


def test_check_knows_a_wrong_update():
    x = checks.spectrum(24, 40, "gaussian")
    schedule = coefficients("quintic", 5)
    exact, plain = checks.reference(24, 40, "gaussian", schedule)
    folded = 3 * exact  # a factor is no error
    assert checks.distances(folded, exact)["singular_values"] < 1e-12
    assert 1e-4 < plain["singular_values"] < 0.05
    assert checks.distances(checks.polynomial(x.double(), coefficients("simple", 5)), exact)["singular_values"] > 0.05
    values = torch.linalg.svdvals(checks.spectrum(30, 20, "condition_1e3"))
    assert float(values[0] / values[-1]) == pytest.approx(1e3, rel=1e-3)


@pytest.mark.parametrize("name", ["AdamW", "LaProp", "Lion", "SOAP", "Muon"])
def test_check_passes_what_is_right_and_refuses_what_is_not(name):
    from benchmarks.step.worker import named

    arm = ARMS[name]

    def update(gradients, dtype, kwargs, error=0.0):
        weights = [torch.nn.Parameter(torch.zeros_like(g, dtype=getattr(torch, dtype))) for g in gradients[0]]
        optimizer = named(arm.make)(weights, **{**arm.kwargs, **kwargs})
        for each in gradients:
            for weight, gradient in zip(weights, each, strict=True):
                weight.grad = gradient.to(weight.dtype)
            optimizer.step()
        noise = error if dtype == "float32" else 0.0
        return [-weight.detach() + noise * torch.randn_like(weight) for weight in weights]

    shapes = ((1, (12, 8)), (1, (8, 8)))
    assert checks.check(arm, shapes, update)["passes"]
    assert not checks.check(arm, shapes, lambda *request: update(*request, error=0.3))["passes"]


def test_tiny_run_in_workers(tmp_path):
    request = Request(rounds=2, only=("Muon", "torch Muon", "published Muon", "heavyball*"))
    result = measure(TINY, request, say=lambda line: None)
    muon, peer = result["arms"]["Muon"], result["arms"]["torch Muon"]
    assert muon["check"]["passes"]
    assert len(muon["seconds"]) == 2
    assert muon["compared_with"] == "torch Muon"
    assert muon["state_bytes"] == peer["state_bytes"] == 4 * result["parameters"]
    assert 0 < muon["floor_s"]["least"] < muon["floor_s"]["usual"] < muon["median_s"]
    assert "--peer published=PATH" in result["arms"]["published Muon"]["error"]

    page = tmp_path / "docs" / "performance.md"
    page.parent.mkdir()
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    promises = {"found": [promise("growth", "16 times the matrices", [15.0])]}
    file = tmp_path / "step_test.json"
    file.write_text(json.dumps({"workloads": {"tiny": result}, "promises": promises}))
    written = render([file], page, page.parent / "images")
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "**tiny: three matrices (all of it)**" in text
    assert "| 16 times the matrices | 15 | 16.5 | yes |" in text
    assert "(images/performance_step_test.png)" in text
    assert all(path.stat().st_size > 0 for path in written)
    assert render([file], page, page.parent / "images") == written  # and again, with the same page
    assert page.read_text() == text


def test_a_worker_that_fails_says_why(tmp_path):
    request = Request(patience=60)
    checkout = tmp_path / "checkout"
    (checkout / "emerging_optimizers").mkdir(parents=True)
    (checkout / "emerging_optimizers" / "__init__.py").write_text(
        "def pick[T: int](x: T) -> T:\n    raise TypeError(x)\n"
    )
    arm = replace(ARMS["published Muon"], make="emerging_optimizers:pick")
    with worker(request, tmp_path, "one") as process:
        with pytest.raises(ArmError, match="has no package"):
            load(process, arm, {"published": str(tmp_path)})
        # The checkout wins over the package of the same name, and its syntax is that of Python 3.12.
        load(process, arm, {"published": str(checkout)})
        with pytest.raises(ArmError, match="TypeError"):
            process.ask("build", shapes=[[1, [2, 2]]])
    assert sys.version_info >= (3, 12) or not list(checkout.rglob("*.pyc"))


def test_worker_helpers():
    source = "def f[T: Bound](x: T) -> T: ...\nclass C[T](Base[T]):\n    async def g[S](self): ...\nx = a[f(1)]\n"
    assert TYPE_PARAMETERS.sub(r"\1", source) == (
        "def f(x: T) -> T: ...\nclass C(Base[T]):\n    async def g(self): ...\nx = a[f(1)]\n"
    )

    class Holder:
        def __init__(self):
            self.basis = torch.zeros(2)

    shared = torch.zeros(3)
    found = list(tensors({"a": [shared, shared], "b": Holder(), "c": 1.0}, set()))
    assert [t.numel() for t in found] == [3, 2]


def test_import_of_the_worker_is_free_of_the_package():
    source = Path(sys.modules["benchmarks.step.worker"].__file__).read_text()
    assert "import emerging_optimizers" not in source
    assert "from benchmarks" not in source


def test_errors_do_not_say_where_things_are():
    text = "ImportError: cannot import name 'x' from 'y' (/home/someone/y/__init__.py); a/b and 1/2 stay"
    assert PATHS.sub("...", text) == "ImportError: cannot import name 'x' from 'y' (...); a/b and 1/2 stay"


def test_arms_are_chosen_by_workload_device_and_pattern():
    def names(workload, **request):
        return [arm.name for arm in chosen(WORKLOADS[workload], Request(**request))]

    assert "Muon, highest" in names("gpt2")
    assert names("square") == ["Muon", "published Muon", "torch Muon", "pytorch-optimizer Muon"]
    assert names("square", only=["muon, H*"]) == ["Muon, highest"]
    assert names("gpt2", only=["*high"]) == []
    assert names("gpt2", only=["*high"], device="cuda") == ["Muon, high", "published Muon, high"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_an_earlier_state_takes_turns_with_this_one():
    request = Request(only=("Lion", "published Lion"), checkouts={"before": "somewhere"})
    now, before = chosen(WORKLOADS["elements"], request)
    assert (now.name, before.name, before.peer, before.against) == ("Lion", "Lion, before", "before", "Lion")
    assert before.make == now.make


def test_a_device_that_is_not_there_is_named_before_anything_runs(tmp_path):
    with pytest.raises(UsageError, match=r"--device cuda: torch .* finds none"):
        Run(device="cuda", out=tmp_path / "out.json").run()
    assert not list(tmp_path.iterdir())
