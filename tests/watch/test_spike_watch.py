"""What the watch measures, when it alarms, and that training does not notice it."""

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emerging_optimizers import REKLS, SOAP, AdamW, LaProp, Lion, Muon, SpikeWatch, create_optimizer
from emerging_optimizers.engine.parts import parts_of
from emerging_optimizers.engine.transit import Transit
from emerging_optimizers.linalg.kronecker import project_out
from emerging_optimizers.registry import OPTIMIZERS, entry
from emerging_optimizers.watch import Alarm
from tests.cases import CASES

NAMES = ("a", "b", "c")
SHAPES = ((8, 6), (8, 6), (5, 7))


def parameters(dtype: torch.dtype = torch.float64) -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(1)
    return [(name, nn.Parameter(torch.randn(shape, dtype=dtype))) for name, shape in zip(NAMES, SHAPES, strict=True)]


def step(optimizer: torch.optim.Optimizer, t: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(t)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    optimizer.step()


def matrices(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {name: p for g in optimizer.param_groups for name, p in zip(g["param_names"], g["params"], strict=True)}


def cosine(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum() / (x.norm() * y.norm()))


def observed(optimizer: torch.optim.Optimizer, steps: int = 4, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """The last observation, and the update per unit of learning rate that the last step took off each weight."""
    with SpikeWatch(optimizer, every=1, on_alarm=lambda alarm: None, **options) as watch:
        for t in range(1, steps + 1):
            before = {name: p.detach().clone() for name, p in matrices(optimizer).items()}
            step(optimizer, t)
    group = optimizer.param_groups[0]
    keep = 1 - group["lr"] * group["weight_decay"] if "weight_decay_method" in group else 1.0
    return watch.latest, {n: (keep * before[n] - p.detach()) / group["lr"] for n, p in matrices(optimizer).items()}


def check_update(seen: dict[str, float], update: Tensor, grad: Tensor) -> None:
    values = torch.linalg.svdvals(update)
    assert seen["grad_norm"] == pytest.approx(float(grad.norm()))
    assert seen["update_rms"] == pytest.approx(float(update.square().mean().sqrt()))
    assert seen["alignment"] == pytest.approx(cosine(update, grad))
    exact = float((values / values[0]).square().sum())
    assert exact * (1 - 1e-6) <= seen["stable_rank"] <= 1.3 * exact


def test_a_momentum_in_8_bits_is_listened_to() -> None:
    shares = []
    for dtype in (None, "int8"):
        torch.manual_seed(0)
        w = torch.nn.Parameter(torch.randn(64, 64))
        optimizer = Muon([("w", w)], lr=0.01, state_dtype=dtype)
        latest, _ = observed(optimizer)
        shares.append(latest["w"]["momentum_share"])
    assert shares[1] == pytest.approx(shares[0], rel=0.01)


def test_adamw_by_hand() -> None:
    optimizer = AdamW(parameters(), lr=0.1, betas=(0.8, 0.9), weight_decay=0.1)
    latest, updates = observed(optimizer)
    for name, p in matrices(optimizer).items():
        check_update(latest[name], updates[name], p.grad)
        m = optimizer.state[p]["exp_avg"]
        assert latest[name]["momentum_share"] == pytest.approx(0.2 * float((p.grad * m).sum() / (m * m).sum()))
        assert latest[name]["guard_scaled"] == latest[name]["guard_skipped"] == 0
        assert not latest[name].keys() & {"ns_residual", "basis_age", "basis_rotation", "factor_condition"}


def test_the_shares_of_all_gradients_in_the_momentum_add_up_to_one() -> None:
    optimizer = Muon(parameters(), lr=0.1, momentum=0.7, fp32_matmul_prec="highest")
    latest, _ = observed(optimizer, steps=3)
    for name, p in matrices(optimizer).items():
        m = optimizer.state[p]["momentum_buffer"]
        shares = []
        for t in (1, 2, 3):
            generator = torch.Generator().manual_seed(t)
            grads = {
                n: torch.randn(q.shape, generator=generator, dtype=q.dtype) for n, q in matrices(optimizer).items()
            }
            shares.append(0.3 * 0.7 ** (3 - t) * float((grads[name] * m).sum() / (m * m).sum()))
        assert sum(shares) == pytest.approx(1)
        assert latest[name]["momentum_share"] == pytest.approx(shares[-1])


@pytest.mark.parametrize("make", [Muon, torch.optim.Muon], ids=["ours", "torch"])
def test_muon_by_hand(make: Any) -> None:
    optimizer = make(parameters(), lr=0.1, momentum=0.9)
    latest, updates = observed(optimizer)
    for name, p in matrices(optimizer).items():
        check_update(latest[name], updates[name], p.grad)
        squares = torch.linalg.svdvals(updates[name]).square()
        residual = (squares / squares.mean() - 1).square().mean().sqrt()
        assert latest[name]["ns_residual"] == pytest.approx(float(residual))
        m = optimizer.state[p]["momentum_buffer"]
        assert latest[name]["momentum_share"] == pytest.approx(0.1 * float((p.grad * m).sum() / (m * m).sum()))


@pytest.mark.parametrize("make", [SOAP, REKLS])
def test_soap_by_hand(make: Any) -> None:
    groups = [{"params": [named]} for named in parameters()]  # each has the first turn
    optimizer = make(groups, lr=0.1, betas=(0.9, 0.95), precondition_frequency=3)
    latest, updates = observed(optimizer, steps=4)  # refreshed in steps 2 and 5
    before = {name: {key: optimizer.state[p][key].clone() for key in ("Q_L", "Q_R")}
              for name, p in matrices(optimizer).items()}  # fmt: skip
    for name, p in matrices(optimizer).items():
        check_update(latest[name], updates[name], p.grad)
        assert latest[name]["basis_age"] == 2
        assert latest[name]["basis_rotation"] < 1e-4
        s = optimizer.state[p]
        m = s["Q_L"] @ s["exp_avg"] @ s["Q_R"].mT
        assert latest[name]["momentum_share"] == pytest.approx(0.1 * float((p.grad * m).sum() / (m * m).sum()))
    with SpikeWatch(optimizer, every=1) as watch:
        watch._measures._leading = {(name, key): q[None, :, : q.size(-1) // 2] for name, bases in before.items()
                          for key, q in bases.items()}  # fmt: skip
        step(optimizer, 5)
    for name, p in matrices(optimizer).items():
        assert watch.latest[name]["basis_age"] == 0
        angles, conditions = [], []
        for side in ("L", "R"):
            Q, K = optimizer.state[p][f"Q_{side}"], optimizer.state[p][side]
            k = Q.size(-1) // 2
            overlap = before[name][f"Q_{side}"][:, :k].mT @ Q[:, :k]
            angles.append(float((overlap.norm() / k**0.5).clamp(max=1).arccos().rad2deg()))
            values = (Q.mT @ K @ Q).diagonal()
            conditions.append(float(values.max() / max(values.min(), 0.01 * values.mean())))
        assert watch.latest[name]["basis_rotation"] == pytest.approx(max(angles))
        assert watch.latest[name]["factor_condition"] == pytest.approx(max(conditions))


def test_an_optimizer_of_torch() -> None:
    optimizer = torch.optim.SGD(parameters(), lr=0.1, momentum=0.9)
    latest, updates = observed(optimizer, steps=3)
    for name, p in matrices(optimizer).items():
        check_update(latest[name], updates[name], p.grad)
        m = optimizer.state[p]["momentum_buffer"]
        assert latest[name]["momentum_share"] == pytest.approx(float((p.grad * m).sum() / (m * m).sum()))
        assert not latest[name].keys() & {"guard_scaled", "basis_age", "ns_residual"}


def test_what_does_not_apply_is_absent() -> None:
    p = [("w", nn.Parameter(torch.ones(3, 2))), ("v", nn.Parameter(torch.ones(3)))]
    for make in (LaProp, Lion, torch.optim.RMSprop):
        optimizer = make(p, lr=0.1)
        latest, _ = observed(optimizer, steps=1)
        assert ("momentum_share" in latest["w"]) == (make is Lion)
        assert "stable_rank" in latest["w"]
        assert "stable_rank" not in latest["v"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_declares_its_parts_and_how_its_average_forgets(name: str) -> None:
    """What a momentum has beyond the newest gradient, times its weight, is the momentum before."""
    cls = entry(name).load()
    p = nn.Parameter(torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    case = next(case for case in CASES if case.optimizer == name)
    optimizer = cls([p], **case.kwargs)
    step(optimizer, 1)
    kind = type(optimizer._places.buckets[0][1].state)
    parts = parts_of(kind)
    assert tuple(parts) == kind._fields
    found = [key for key, part in parts.items() if part.averages is not None]
    assert bool(found) == case.averages
    if not found:
        return
    (key,) = found
    averages = []
    for t in range(2, 5):
        step(optimizer, t)
        state = optimizer.state[p]
        x = state[key].clone()
        averages.append(project_out(x, state.get("Q_L"), state.get("Q_R")) if parts[key].rotated else x)
    rest = averages[-1] - parts[key].averages.weight(optimizer.param_groups[0]) * p.grad
    assert cosine(rest, averages[-2]) == pytest.approx(1, abs=1e-6)


def test_a_routed_optimizer() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10)).double()
    optimizer = create_optimizer("soap", model, lr=0.1)
    latest, _ = observed(optimizer)
    assert set(latest) == {name for name, _ in model.named_parameters()}
    assert "basis_age" in latest["1.weight"]
    assert "basis_age" not in latest["0.weight"]
    m, g = optimizer.state[model[0].weight]["exp_avg"], model[0].weight.grad
    assert latest["0.weight"]["momentum_share"] == pytest.approx(0.1 * float((g * m).sum() / (m * m).sum()))


def test_a_batch_of_matrices_counts_its_worst() -> None:
    experts = nn.Parameter(torch.randn(3, 6, 4, dtype=torch.float64))
    optimizer = Muon([("experts", experts)], lr=0.1, momentum=0.0, weight_decay=0.0)
    with SpikeWatch(optimizer, every=1, on_alarm=lambda alarm: None) as watch:
        before = experts.detach().clone()
        experts.grad = torch.randn(3, 6, 4, dtype=torch.float64)
        experts.grad[1, :, 1:] = 0  # rank one
        optimizer.step()
    values = torch.linalg.svdvals(before - experts.detach())
    ranks = (values / values[:, :1]).square().sum(dim=1)
    assert watch.latest["experts"]["stable_rank"] == pytest.approx(float(ranks.min()), rel=1e-3)
    assert watch.latest["experts"]["ns_residual"] == pytest.approx(3**0.5)  # three of four directions are missing
    assert watch.latest["experts"]["grad_norm"] == pytest.approx(float(experts.grad.norm()))


@pytest.mark.parametrize("make", [AdamW, Muon, SOAP])
def test_the_gradient_counts_as_the_spike_guard_let_it_through(make: Any) -> None:
    optimizer = make(parameters(), lr=0.1, spike_guard=2.0)
    for t in range(1, 6):
        step(optimizer, t)
    with SpikeWatch(optimizer, every=1) as watch:
        step(optimizer, 6, scale=1e4)
    for name in NAMES:
        assert watch.latest[name]["guard_scaled"] == 1
        assert watch.latest[name]["momentum_share"] < 1


# ---- alarms ----------------------------------------------------------------------------------------------------------


def run_with_spike(optimizer: torch.optim.Optimizer, watch: SpikeWatch, at: int, scale: float = 1000.0) -> None:
    for t in range(1, at + 3):
        step(optimizer, t, scale if t == at else 1.0)


def test_a_spike_between_observations_alarms_and_is_observed(tmp_path: Path) -> None:
    alarms: list[Alarm] = []
    optimizer = AdamW(parameters(), lr=0.1)
    with SpikeWatch(optimizer, every=10, on_alarm=alarms.append, path=tmp_path / "new" / "watch.jsonl") as watch:
        run_with_spike(optimizer, watch, 33)
    assert [(a.step, a.parameter, a.measure) for a in alarms] == [(33, name, "grad_norm") for name in NAMES]
    for alarm in alarms:
        assert alarm.value > 500 * alarm.usual
        assert alarm.threshold == pytest.approx(10 * alarm.usual)
        assert "look at" in alarm.message
    lines = [json.loads(line) for line in (tmp_path / "new" / "watch.jsonl").read_text().splitlines()]
    assert sorted({line["step"] for line in lines if line["kind"] == "observation"}) == [10, 20, 30, 33]
    assert [line["message"] for line in lines if line["kind"] == "alarm"] == [a.message for a in alarms]
    assert min(line["momentum_share"] for line in lines if line["step"] == 33 and "momentum_share" in line) > 0.99


def test_a_reading_that_comes_late_delays_the_observation_by_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator: no step waits for its own values."""
    asked: dict[int, int] = {}

    def ready(reading: Any) -> bool:
        asked[id(reading)] = asked.get(id(reading), 0) + 1
        return asked[id(reading)] > 1

    kept: list[Any] = []  # so that no id is used twice
    send = Transit.send
    monkeypatch.setattr(Transit, "ready", property(ready))
    monkeypatch.setattr(Transit, "send", lambda *a: kept.append(send(*a)) or kept[-1])
    alarms: list[Alarm] = []
    optimizer = AdamW(parameters(), lr=0.1)
    seen = []
    with SpikeWatch(optimizer, every=100, on_alarm=alarms.append) as watch:
        for t in range(1, 36):
            step(optimizer, t, 1000.0 if t == 33 else 1.0)
            seen.append(bool(watch.latest))
    assert {a.step for a in alarms} == {33}
    assert seen.index(True) + 1 == 35  # observed in step 34, read in step 35


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_alarms_in_its_first_step(bad: float, tmp_path: Path) -> None:
    optimizer = AdamW(parameters(), lr=0.1)
    path = tmp_path / "watch.jsonl"
    for p in matrices(optimizer).values():
        p.grad = torch.ones_like(p)
    optimizer.param_groups[0]["params"][0].grad[0, 0] = bad
    watch = SpikeWatch(optimizer, path=path)
    with pytest.warns(RuntimeWarning, match="grad_norm of a .*not a finite"):
        optimizer.step()
    watch.close()
    assert watch.latest["a"]["guard_skipped"] == 1

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert [line["value"] for line in lines if line["kind"] == "alarm"] == [None]
    assert [line["grad_norm"] is None for line in lines if line["kind"] == "observation"] == [True, False, False]


def test_an_alarm_comes_again_only_after_the_value_has_been_back() -> None:
    alarms: list[Alarm] = []
    optimizer = AdamW([("w", nn.Parameter(torch.ones(4, 2)))], lr=0.1)
    (w,) = optimizer.param_groups[0]["params"]
    with SpikeWatch(optimizer, every=100, on_alarm=alarms.append, thresholds={"grad_norm": 5.0}):
        for t in range(1, 41):
            w.grad = torch.full((4, 2), 100.0 if t in (30, 31, 33) else 1.0)
            optimizer.step()
    assert [a.step for a in alarms] == [30, 33]


def test_each_measure_with_a_threshold_can_alarm_and_be_turned_off() -> None:
    w = nn.Parameter(torch.zeros(8, 4))
    for limits, measures in (({}, {"ns_residual"}), ({"ns_residual": None}, set())):
        alarms: list[Alarm] = []
        optimizer = Muon([w], lr=0.1)
        with SpikeWatch(optimizer, every=1, on_alarm=alarms.append, thresholds=limits):
            w.grad = torch.ones(8, 4)  # rank one
            optimizer.step()
        assert {a.measure for a in alarms} == measures
        assert {a.parameter for a in alarms} <= {"param_groups[0]['params'][0]"}
    alarms = []
    optimizer = torch.optim.SGD([("w", w)], lr=0.1)
    with SpikeWatch(optimizer, every=1, on_alarm=alarms.append, thresholds={"grad_norm": None}):
        for t in range(8):
            w.grad = torch.full((8, 4), 100.0 if t == 6 else 1.0)
            optimizer.step()
    assert [(a.step, a.measure) for a in alarms] == [(7, "update_rms")]


# ---- it is not noticed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["stacked", "per_matrix"])
@pytest.mark.parametrize("name", ["adamw", "muon", "soap"])
def test_nothing_changes_in_the_trajectory(name: str, execution: str) -> None:
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        optimizer = create_optimizer(name, model, lr=0.01, execution=execution, spike_guard=2.0)
        watch = SpikeWatch(optimizer, every=2, on_alarm=lambda alarm: None) if watched else None
        for t in range(40):
            optimizer.zero_grad()
            (model(torch.randn(16, 6)).square().mean() * (1e4 if t == 31 else 1)).backward()
            optimizer.step()
        if watch is not None:
            watch.close()
            assert watch.latest
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(x, y) for x, y in zip(*ends, strict=True))


def test_it_stops_when_closed_and_copies_are_not_watched() -> None:
    optimizer = AdamW(parameters(), lr=0.1)
    with SpikeWatch(optimizer, every=1) as watch:
        step(optimizer, 1)
        for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            step(copied, 2)
        assert watch.step == 1
        step(optimizer, 2)
    step(optimizer, 3)
    assert watch.step == 2
    watch.close()


def test_it_goes_on_over_loading_new_groups_missing_gradients_and_low_precision() -> None:
    optimizer = SOAP(parameters(), lr=0.1)
    with SpikeWatch(optimizer, every=1, start=100) as watch:
        step(optimizer, 1)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        new = nn.Parameter(torch.randn(4, 4, dtype=torch.bfloat16))
        optimizer.add_param_group({"params": [("new", new)]})
        step(optimizer, 2)
        assert set(watch.latest) == {*NAMES, "new"}
        optimizer.zero_grad()
        new.grad = torch.ones_like(new)
        optimizer.step()
        assert set(watch.latest) == {"new"}
        optimizer.zero_grad()
        optimizer.step()
        assert watch.step == 104


def test_a_step_with_a_closure_is_observed() -> None:
    w = nn.Parameter(torch.ones(3, 2))
    optimizer = AdamW([("w", w)], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    with SpikeWatch(optimizer, every=1) as watch:
        optimizer.step(closure)
        assert watch.latest["w"]["grad_norm"] == pytest.approx(24**0.5)


def test_no_learning_rate_and_no_gradient_is_no_division_by_zero() -> None:
    optimizer = AdamW(parameters(), lr=0.0)
    with SpikeWatch(optimizer, every=1) as watch:
        for p in matrices(optimizer).values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(watch.latest[n][m] == 0 for n in NAMES for m in ("update_rms", "alignment", "stable_rank"))


# ---- what it is asked ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, r"every=0 .*integer >= 1"),
        ({"start": -1}, r"start=-1 .*integer >= 0"),
        ({"thresholds": {"grad_nrom": 2.0}}, r"names 'grad_nrom'; did you mean 'grad_norm'\?; known are"),
        ({"thresholds": {"update_rms": -1.0}}, r"thresholds\['update_rms'\]=-1.0 .*finite number > 0"),
    ],
)
def test_a_wrong_argument_is_named(options: dict[str, Any], message: str) -> None:
    optimizer = AdamW(parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        SpikeWatch(optimizer, **options)
    assert not optimizer._optimizer_step_pre_hooks


def test_tensorboard_writes_scalars_or_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    class Writer:
        def add_scalar(self, tag: str, value: float, step: int) -> None:
            written.append((tag, value, step))

    optimizer = AdamW(parameters(), lr=0.1)
    with SpikeWatch(optimizer, every=2, tensorboard=Writer()):
        step(optimizer, 1)
        step(optimizer, 2)
    assert {"update_rms/a", "grad_norm/c"} <= {tag for tag, _, _ in written}
    assert {at for _, _, at in written} == {2}
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    monkeypatch.delitem(__import__("sys").modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        SpikeWatch(optimizer, tensorboard="runs")
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.gpu
def test_a_spike_on_an_accelerator_alarms_without_waiting(device: torch.device) -> None:
    alarms: list[Alarm] = []
    optimizer = AdamW([(name, nn.Parameter(p.detach().to(device))) for name, p in parameters()], lr=0.1)
    with SpikeWatch(optimizer, every=10, on_alarm=alarms.append):
        run_with_spike(optimizer, None, 33)
    assert {a.step for a in alarms} == {33}


def test_a_spike_in_every_gradient_is_one_warning_and_every_alarm_is_in_the_file(tmp_path: Path) -> None:
    weights = [(f"layer.{i}.weight", nn.Parameter(torch.ones(4, 2))) for i in range(6)]
    optimizer = AdamW(weights, lr=0.1)
    path = tmp_path / "watch.jsonl"
    with (
        SpikeWatch(optimizer, every=1000, path=path, thresholds={"update_rms": None}),
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        for t in range(1, 31):
            for i, (_, w) in enumerate(weights):
                w.grad = torch.full((4, 2), (400.0 if i == 3 else 100.0) if t == 30 else 1.0)
            optimizer.step()
    (message,) = [str(w.message) for w in warned]
    assert message.startswith(
        "step 30: grad_norm of 6 parameters, worst 'layer.3.weight' at 1.13e+03, 400 times its usual"
    )
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    alarms = [line for line in lines if line["kind"] == "alarm"]
    assert [line["parameter"] for line in alarms] == [name for name, _ in weights]
    assert all("times its usual" in line["message"] for line in alarms)
