"""`weight_rounding`: bfloat16 weights whose updates do not vanish, through everything that a step may meet."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from emerging_optimizers import SOAP, AdamW, Muon, create_optimizer
from emerging_optimizers.engine import executors, kept
from emerging_optimizers.linalg.rounding import join_bfloat16_, round_stochastically, split_bfloat16_
from tests.cases import CASES, SEEDS, OptimizerCase, parameters
from tests.engine.test_capturable import Recording

BY_NAME = {case.name: case for case in CASES}
LOSSLESS = pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
every_optimizer = pytest.mark.parametrize("case", SEEDS, ids=str)
# One of each kind: element by element, by matrix, with bases, from the weight, with a law, of Python functions.
KINDS = [BY_NAME[n] for n in ("adamw", "adamw_brake", "lion", "muon", "soap_every_third", "spectron", "muown")]
some = pytest.mark.parametrize("case", KINDS, ids=str)
ParametersT = list[torch.nn.Parameter]


def made(case: OptimizerCase, dtype: torch.dtype = torch.bfloat16, copies: int = 2) -> ParametersT:
    """The same numbers in every precision."""
    return [torch.nn.Parameter(p.detach().bfloat16().to(dtype)) for p in parameters(case, copies=copies)]


def give(ps: ParametersT, t: int, scale: Callable[[int], float] = lambda i: 1.0) -> None:
    """The gradients of step t; no gradient where `scale` is 0."""
    generator = torch.Generator().manual_seed(t)
    for i, p in enumerate(ps):
        grad = torch.randn(p.shape, generator=generator).bfloat16() * scale(i)
        p.grad = grad.to(p.dtype) if scale(i) else None


def train(optimizer: Any, ps: ParametersT, steps: range, scale: Callable[[int], float] = lambda i: 1.0) -> None:
    for t in steps:
        give(ps, t, scale)
        optimizer.step()


def master(optimizer: Any, p: Tensor) -> Tensor:
    """The float32 weight of a compensated one."""
    found = torch.empty(p.shape)
    join_bfloat16_(found, p.detach().contiguous(), optimizer.state[p]["weight_bits"].contiguous())
    return found


def all_of(optimizer: Any, ps: ParametersT) -> list[Tensor]:
    return [x.detach().clone() for p in ps for x in (p, *optimizer.state[p].values())]


def same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


# ---- what it computes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weight_and_bits_are_the_weight_of_a_float32_run(case: OptimizerCase) -> None:
    wide, low = made(case, torch.float32), made(case)
    exact, compensated = case.make(wide), case.make(low, weight_rounding="compensated")
    for optimizer, ps in ((exact, wide), (compensated, low)):
        train(optimizer, ps, range(1, 4))
    for p, q in zip(wide, low, strict=True):
        assert torch.equal(master(compensated, q), p)
        assert bool(((q.float() - p).abs() <= 2**-8 * p.abs()).all())  # half a unit in the last place
        assert set(compensated.state[q]) == {*exact.state[p], "weight_bits"}
        assert all(torch.equal(compensated.state[q][key], x) for key, x in exact.state[p].items())


@every_optimizer
def test_so_they_are_in_whatever_order_the_weight_lies(case: OptimizerCase) -> None:
    """A law's norms and a kernel's lanes go through memory, and their last bits depend on the way."""

    def turned(dtype: torch.dtype) -> ParametersT:
        return [torch.nn.Parameter(p.detach().mT.contiguous().mT) for p in made(case, dtype, copies=1) if p.ndim > 1]

    wide, low = turned(torch.float32), turned(torch.bfloat16)
    exact, compensated = case.make(wide), case.make(low, weight_rounding="compensated")
    for optimizer, ps in ((exact, wide), (compensated, low)):
        train(optimizer, ps, range(1, 6))
    for p, q in zip(wide, low, strict=True):
        assert torch.equal(master(compensated, q), p)
        assert all(torch.equal(compensated.state[q][key], x) for key, x in exact.state[p].items())


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_weights_are_neighbours_of_the_exact_step(case: OptimizerCase, dtype: torch.dtype) -> None:
    wide, low = made(case, torch.float32), made(case, dtype)
    exact, chance = case.make(wide), case.make(low, weight_rounding="stochastic")
    for optimizer, ps in ((exact, wide), (chance, low)):
        train(optimizer, ps, range(1, 2))
    for p, q in zip(wide, low, strict=True):
        unit = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
        assert bool(((q.float() - p).abs() <= unit * p.abs() + 2.0**-24).all())


@LOSSLESS
@pytest.mark.parametrize("name", ["adamw", "muon", "soap"])
def test_small_updates_arrive(rounding: str, name: str) -> None:
    """Nearest loses all of them: each is far below half a unit in the last place of 1."""

    def drift(rounding: str) -> Tensor:
        w = torch.nn.Parameter(torch.ones(128, 128, dtype=torch.bfloat16))
        optimizer = create_optimizer(name, [w], lr=3e-4, weight_decay=0.0, weight_rounding=rounding)
        exact = torch.nn.Parameter(torch.ones(128, 128))
        twin = create_optimizer(name, [exact], lr=3e-4, weight_decay=0.0)
        for t in range(8):
            give([w], t)
            w.grad += 2
            exact.grad = w.grad.float()
            optimizer.step()
            twin.step()
        low = master(optimizer, w) if rounding == "compensated" else w.detach()
        return torch.stack([(low.double() - 1).mean(), (exact.detach().double() - 1).mean()])

    moved, exact = drift(rounding)
    # Of 16384 weights each is off by at most a unit, 2^-8 below 1: six standard errors.
    assert abs(moved - exact) < 6 * 2**-8 / 128
    assert abs(exact) > 4 * abs(moved - exact)
    assert abs(drift("nearest")[0]) < abs(exact) / 10 or name != "adamw"


def test_the_parts_of_a_number() -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    edge = [
        0.0,
        -0.0,
        1.0,
        1 + 2**-8,
        -1 - 2**-8,
        1 + 3 * 2**-8,
        1e-45,
        -1e-40,
        3.4e38,
        torch.inf,
        -torch.inf,
        torch.nan,
    ]
    x = torch.cat([x, torch.tensor(edge)])
    high, low, back = x.bfloat16(), torch.empty(len(x), dtype=torch.int16), torch.empty_like(x)
    split_bfloat16_(high, low, x)
    join_bfloat16_(back, high, low)
    assert torch.equal(back.view(torch.int32), x.view(torch.int32))
    # torch rounds ties to even, and this away from zero.
    ties = (x.view(torch.int32) & 0xFFFF) == 2**15
    torch.testing.assert_close(high[~ties], x[~ties].bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert high[4098:4102].tolist() == [1.0, 1 + 2**-7, -1 - 2**-7, 1 + 2**-6]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_is_right_on_average(dtype: torch.dtype) -> None:
    noise = torch.arange(2**16, dtype=torch.int32)
    for value in (1.001, -0.3, 7e-5, 3.3e-5, -1.7e-7, 2e-8, 1000.3):
        x = torch.full((2**16,), value)
        rounded = round_stochastically(x, noise, dtype).double()
        below, above = rounded.min(), rounded.max()
        assert below <= x[0].double() <= above
        assert len(rounded.unique()) <= 2
        # Over all values of the noise it is right to a part in 2^13 of the distance between neighbours.
        assert abs(rounded.mean() - x[0].double()) <= (above - below) * 2**-13
        exact = x.to(dtype).float()
        assert torch.equal(round_stochastically(exact, noise, dtype), exact.to(dtype))
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan]).repeat_interleave(2**16)
    rounded = round_stochastically(odd, noise.repeat(5), dtype)
    torch.testing.assert_close(rounded, odd.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(rounded.signbit(), odd.signbit())


def test_noise_is_even_and_of_its_own_in_each_step_parameter_and_element() -> None:
    ps = [torch.nn.Parameter(torch.ones(256, 256, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = AdamW(ps, lr=2.0**-10, weight_rounding="stochastic")  # a quarter of a unit below 1
    moved = []
    for _ in range(2):
        for p in ps:
            p.data.fill_(1.0)
            p.grad = torch.ones_like(p)
        optimizer.step()
        moved += [(p.detach() != 1).double().flatten() for p in ps]
    share = torch.stack(moved).mean(1)
    assert ((share - 0.25).abs() < 6 * (0.25 * 0.75 / 2**16) ** 0.5).all()
    correlation = torch.corrcoef(torch.stack([*moved, moved[0].roll(1), moved[0].roll(256)]))
    assert float((correlation - torch.eye(6)).abs().max()) < 6 / 256


@LOSSLESS
def test_float32_and_float64_weights_are_left_alone(rounding: str) -> None:
    for dtype in (torch.float32, torch.float64):
        ps, twins = (parameters(BY_NAME["adamw"], dtype) for _ in range(2))
        optimizer, twin = AdamW(ps, weight_rounding=rounding), AdamW(twins)
        train(optimizer, ps, range(2))
        train(twin, twins, range(2))
        assert same(all_of(optimizer, ps), all_of(twin, twins))


# ---- in every execution, grouping and order ---------------------------------------------------------------------


@some
@LOSSLESS
@pytest.mark.parametrize("execution", ["per_matrix", "compiled"])
def test_executions_round_alike(
    case: OptimizerCase, rounding: str, execution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "BACKEND", "eager")
    ps, twins = made(case), made(case)
    if execution == "compiled" and case.name in ("adamw_brake",):
        pytest.skip("its law needs whole parameters")
    optimizer = case.make(ps, weight_rounding=rounding)
    twin = case.make(twins, weight_rounding=rounding, execution=execution)
    train(optimizer, ps, range(3))
    train(twin, twins, range(3))
    for p, q in zip(ps, twins, strict=True):
        if case.batched == 0 and execution == "per_matrix":
            assert same(all_of(optimizer, [p]), all_of(twin, [q]))
        # Products may differ in their last bits: then a weight goes to the other neighbour.
        torch.testing.assert_close(p, q, rtol=2**-7, atol=1e-3)
        if rounding == "stochastic":
            assert torch.equal(optimizer.state[p]["rounding_key"], twin.state[q]["rounding_key"])


@some
@LOSSLESS
def test_it_does_not_matter_what_shares_the_memory(
    case: OptimizerCase, rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ps, twins = made(case), made(case)
    optimizer = case.make(ps, weight_rounding=rounding)
    monkeypatch.setattr(kept, "AT_A_TIME_ON_CPU", 1)
    monkeypatch.setattr(kept, "PIECE", 5)
    twin = case.make(twins, weight_rounding=rounding, execution="per_matrix")
    train(optimizer, ps, range(3), lambda i: float(i != 1))
    train(twin, twins, range(3), lambda i: float(i != 1))
    if case.batched == 0:
        assert same(all_of(optimizer, ps), all_of(twin, twins))
    for p, q in zip(ps, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=2**-7, atol=1e-3)


@LOSSLESS
@pytest.mark.parametrize(
    "view", ["auto", ("interleaved", 2, 1, 1), ("split", 4, 2, 2), "transposed", ("columns", "heads", 2)], ids=str
)
def test_a_parameter_in_several_matrices(rounding: str, view: Any) -> None:
    w, exact = (
        torch.nn.Parameter(torch.linspace(-1, 1, 48).view(8, 6).bfloat16().to(d))
        for d in (torch.bfloat16, torch.float32)
    )
    optimizer = SOAP([w], lr=0.01, matrix_view=view, weight_rounding=rounding)
    twin = SOAP([exact], lr=0.01, matrix_view=view)
    train(optimizer, [w], range(3))
    train(twin, [exact], range(3))
    if rounding == "compensated":
        assert torch.equal(master(optimizer, w), exact)
    saved = copy.deepcopy(optimizer.state_dict())
    again = torch.nn.Parameter(w.detach().clone())
    resumed = SOAP([again], lr=0.01, matrix_view=view)
    resumed.load_state_dict(saved)
    train(optimizer, [w], range(3, 5))
    train(resumed, [again], range(3, 5))
    assert same(all_of(optimizer, [w]), all_of(resumed, [again]))


@LOSSLESS
def test_strange_but_legal_parameters(rounding: str) -> None:
    def ps(dtype: torch.dtype) -> ParametersT:
        torch.manual_seed(0)
        tensors = [
            torch.randn(6, 8).bfloat16().T,
            torch.zeros(0, 4),
            torch.randn(4, 3, 2, 2).bfloat16().to(memory_format=torch.channels_last),
            torch.randn(3, 5, 4).bfloat16(),
        ]
        return [torch.nn.Parameter(x.to(dtype)) for x in tensors]

    low, wide = ps(torch.bfloat16), ps(torch.float32)
    optimizer, twin = Muon(low, lr=0.01, weight_rounding=rounding), Muon(wide, lr=0.01)
    strides = [p.stride() for p in low]
    train(optimizer, low, range(2))
    train(twin, wide, range(2))
    assert [p.stride() for p in low] == strides
    for p, q in zip(low, wide, strict=True):
        torch.testing.assert_close(p.float(), q, rtol=2**-6, atol=1e-3)
        if rounding == "compensated" and p.numel():
            torch.testing.assert_close(master(optimizer, p), q, rtol=1e-5, atol=1e-6)


def test_weights_of_several_precisions_in_a_group() -> None:
    kinds = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    ps = [torch.nn.Parameter(torch.randn(4, 3).to(dtype)) for dtype in kinds]
    optimizer = Muon(ps, lr=0.1, weight_rounding="stochastic")
    train(optimizer, ps, range(2))
    assert [("rounding_key" in optimizer.state[p]) for p in ps] == [True, False, True, False]


# ---- promises of a step -----------------------------------------------------------------------------------------


@some
@LOSSLESS
def test_lr_zero_moves_nothing(case: OptimizerCase, rounding: str) -> None:
    if not case.rests:
        pytest.skip("its law moves the weight without a learning rate")
    ps = made(case)
    optimizer = case.make(ps, weight_rounding=rounding, weight_decay=0.0)
    train(optimizer, ps, range(2))
    before = [(p.detach().clone(), p._version) for p in ps]
    bits = [x.clone() for p in ps for key, x in optimizer.state[p].items() if key in kept.KEYS]
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, ps, range(2, 4))
    assert all(torch.equal(p, x) and p._version == version for p, (x, version) in zip(ps, before, strict=True))
    assert same([x for p in ps for key, x in optimizer.state[p].items() if key in kept.KEYS], bits)


@every_optimizer
@LOSSLESS
def test_a_gradient_that_is_skipped_or_missing_leaves_weight_and_state(case: OptimizerCase, rounding: str) -> None:
    ps = made(case)
    optimizer = case.make(ps, weight_rounding=rounding, spike_guard=3.0)
    train(optimizer, ps, range(4))

    def now() -> list[list[Tensor]]:  # the key goes on with a gradient that is skipped, too
        states = [{key: x for key, x in optimizer.state[p].items() if key != "rounding_key"} for p in ps]
        return [[x.detach().clone() for x in (p, *state.values())] for p, state in zip(ps, states, strict=True)]

    before = now()
    train(optimizer, ps, range(4, 5), lambda i: (torch.nan, 0.0)[i] if i < 2 else 1.0)
    assert same(now()[0], before[0])
    assert same(now()[1], before[1])
    assert not same(now()[2], before[2])
    train(optimizer, ps, range(5, 6), lambda i: 1e4 if i == 0 else 1.0)  # a spike is scaled down
    assert all(bool(p.isfinite().all()) for p in ps)
    assert sum(skipped for _, skipped in optimizer.guard_events().values()) == 1


class _Before(torch.utils._python_dispatch.TorchDispatchMode):
    """Raises once, before the operator with this number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", [BY_NAME[n] for n in ("adamw", "lion", "soap_every_third")], ids=str)
@LOSSLESS
def test_an_interrupt_at_any_operator_leaves_old_or_new(case: OptimizerCase, rounding: str) -> None:
    def begun() -> tuple[ParametersT, Any]:
        ps = made(case, copies=1)
        optimizer = case.make(ps, weight_rounding=rounding)
        train(optimizer, ps, range(3))
        give(ps, 3)
        return ps, optimizer

    ps, optimizer = begun()
    old = [all_of(optimizer, [p]) for p in ps]
    counter = _Before(10**9)
    with counter:
        optimizer.step()
    new = [all_of(optimizer, [p]) for p in ps]
    count = 10**9 - counter.left
    for number in sorted({*range(1, count + 1, max(1, count // 6)), *range(max(1, count - 8), count + 1)}):
        ps, optimizer = begun()
        with pytest.raises(KeyboardInterrupt), _Before(number):
            optimizer.step()
        for p, before, after in zip(ps, old, new, strict=True):
            now = all_of(optimizer, [p])
            assert same(now, before) or same(now, after), f"operator {number} of {count}"
        train(optimizer, ps, range(4, 5))
        assert all(bool(p.isfinite().all()) for p in ps)


# ---- checkpoints and what people do between steps ---------------------------------------------------------------


@every_optimizer
@LOSSLESS
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_a_resumed_run_is_the_run(case: OptimizerCase, rounding: str, how: str, tmp_path: Any) -> None:
    ps = made(case)
    optimizer = case.make(ps, weight_rounding=rounding)
    train(optimizer, ps, range(2))
    if how == "deepcopy":
        copies, resumed = copy.deepcopy((ps, optimizer))
    elif how == "pickle":
        copies, resumed = pickle.loads(pickle.dumps((ps, optimizer)))
    else:
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        copies = [torch.nn.Parameter(p.detach().clone()) for p in ps]
        resumed = case.make(copies)
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert resumed.param_groups[0]["weight_rounding"] == rounding
    train(optimizer, ps, range(2, 4))
    train(resumed, copies, range(2, 4))
    assert same(all_of(optimizer, ps), all_of(resumed, copies))


@LOSSLESS
def test_state_from_before_the_option_starts_it(rounding: str) -> None:
    case = BY_NAME["adamw"]
    ps = made(case)
    optimizer = case.make(ps)
    train(optimizer, ps, range(2))
    old = optimizer.state_dict()
    del old["param_groups"][0]["weight_rounding"]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in ps]
    resumed = case.make(copies, weight_rounding=rounding)
    resumed.load_state_dict(old)
    for p, q in zip(ps, copies, strict=True):
        assert torch.equal(resumed.state[q]["exp_avg"], optimizer.state[p]["exp_avg"])
    optimizer.param_groups[0]["weight_rounding"] = rounding  # the same as turning it on between two steps
    train(optimizer, ps, range(2, 4))
    train(resumed, copies, range(2, 4))
    assert same(all_of(optimizer, ps), all_of(resumed, copies))


@LOSSLESS
def test_the_way_back_drops_what_was_kept(rounding: str) -> None:
    case = BY_NAME["muon"]
    ps = made(case)
    optimizer = case.make(ps, weight_rounding=rounding)
    train(optimizer, ps, range(2))
    momentum = optimizer.state[ps[0]]["momentum_buffer"].clone()
    optimizer.param_groups[0]["weight_rounding"] = "nearest"
    give(ps, 2, lambda i: float(i > 0))
    optimizer.step()
    assert set(optimizer.state[ps[0]]) == set(case.state)
    assert torch.equal(optimizer.state[ps[0]]["momentum_buffer"], momentum)


@LOSSLESS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_goes_on_where_nothing_is_to_be_kept(rounding: str, dtype: torch.dtype, tmp_path: Any) -> None:
    """In another precision, or in another way of rounding that was asked for before the checkpoint."""
    case = BY_NAME["adamw"]
    ps = made(case)
    optimizer = case.make(ps, weight_rounding=rounding)
    train(optimizer, ps, range(2))
    optimizer.param_groups[0]["weight_rounding"] = "nearest" if dtype == torch.bfloat16 else rounding
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    copies = [torch.nn.Parameter(p.detach().to(dtype)) for p in ps]
    resumed = case.make(copies)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for p, q in zip(ps, copies, strict=True):
        assert set(resumed.state[q]) == set(case.state)
        assert all(torch.equal(x, optimizer.state[p][key]) for key, x in resumed.state[q].items())
        p.data = p.data.to(dtype)
    train(optimizer, ps, range(2, 4))
    train(resumed, copies, range(2, 4))
    assert same(all_of(optimizer, ps), all_of(resumed, copies))


def test_entries_that_are_written_replaced_and_deleted() -> None:
    ps, twins = made(BY_NAME["adamw"]), made(BY_NAME["adamw"])
    optimizer, twin = (AdamW(x, lr=1e-4, weight_rounding="compensated") for x in (ps, twins))
    train(optimizer, ps, range(2))
    train(twin, twins, range(2))
    optimizer.state[ps[0]] = {key: x.clone() for key, x in optimizer.state[ps[0]].items()}
    del optimizer.state[ps[1]]["weight_bits"]
    twin.state[twins[1]]["weight_bits"].zero_()
    train(optimizer, ps, range(2, 4))
    train(twin, twins, range(2, 4))
    assert same(all_of(optimizer, ps), all_of(twin, twins))
    optimizer.state[ps[0]]["weight_bits"] = torch.zeros(3, 3, dtype=torch.int16)
    with pytest.raises(ValueError, match=r"'weight_bits' of parameter 0 .* has shape \(3, 3\)"):
        train(optimizer, ps, range(4, 5))


@LOSSLESS
def test_a_weight_that_somebody_writes_stays_written(rounding: str) -> None:
    p = torch.nn.Parameter(torch.randn(6, 4).bfloat16())
    optimizer = Muon([p], lr=1e-3, weight_rounding=rounding)
    train(optimizer, [p], range(2))
    p.data.fill_(3.0)
    p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    assert torch.equal(p, torch.full_like(p, 3.0))


@LOSSLESS
def test_parameters_join_leave_and_change_their_precision(rounding: str) -> None:
    ps = made(BY_NAME["muon"])
    optimizer = Muon(ps[:2], lr=1e-3, weight_rounding=rounding)
    train(optimizer, ps[:2], range(2))
    kept_of = {key: optimizer.state[ps[0]][key].clone() for key in kept.KEYS if key in optimizer.state[ps[0]]}
    optimizer.param_groups[0]["params"][:] = [ps[2], ps[0]]
    give(ps, 2, lambda i: float(i == 2))
    optimizer.step()
    assert all(torch.equal(optimizer.state[ps[0]][key], x) for key, x in kept_of.items())
    ps[2].data = ps[2].data.float()
    train(optimizer, [ps[2], ps[0]], range(3, 5))
    assert bool(ps[2].isfinite().all())


# ---- what it costs, and what is refused -------------------------------------------------------------------------


def test_no_copy_of_the_weights_stays() -> None:
    w = torch.nn.Parameter(torch.zeros(64, 32, dtype=torch.bfloat16))
    for rounding, nbytes in (("compensated", 64 * 32 * 2), ("stochastic", 8)):
        optimizer = Muon([w], weight_rounding=rounding)
        optimizer._init_group(optimizer.param_groups[0], skip_non_grad_params=False)
        ((_, bucket),) = optimizer._places.buckets
        assert all(p.untyped_storage().nbytes() <= 4 for p in bucket.parameters)
        w.grad = torch.ones_like(w)
        optimizer.step()
        assert sum(optimizer.state[w][key].nbytes for key in kept.KEYS if key in optimizer.state[w]) == nbytes
        ((_, bucket),) = optimizer._places.buckets
        assert all(p.untyped_storage().nbytes() <= 4 for p in bucket.parameters)


def test_what_cannot_be_met_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'compensated' is not possible for .*float16.*weight_rounding='stochastic'"):
        Muon([torch.nn.Parameter(torch.eye(4).half())], lr=0.1, weight_rounding="compensated")
    with pytest.raises(ValueError, match=r"weight_rounding='up' .*one of 'nearest', 'stochastic', 'compensated'"):
        Muon([torch.nn.Parameter(torch.eye(4))], lr=0.1, weight_rounding="up")


def test_the_warning_of_lost_updates_names_the_option_and_does_not_come_with_it(recwarn: Any) -> None:
    for rounding in ("nearest", "stochastic", "compensated"):
        w = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = AdamW([w], lr=1e-4, weight_rounding=rounding)
        train(optimizer, [w], range(20))
        assert [("weight_rounding='stochastic'" in str(x.message)) for x in recwarn] == [True]


@pytest.mark.parametrize("case", [BY_NAME[n] for n in ("adamw", "muon", "soap")], ids=str)
@LOSSLESS
def test_a_recorded_step_repeated_is_the_run(case: OptimizerCase, rounding: str) -> None:
    """As a CUDA graph has it; one parameter has no gradient."""
    ps, twins = made(case), made(case)
    optimizer, twin = (case.make(x, weight_rounding=rounding, capturable=True) for x in (ps, twins))
    recording = Recording()
    for t in range(6):
        held = [p.grad for p in ps]
        for some in (ps, twins):
            give(some, t, lambda i: float(i != 1))
        for p, grad in zip(ps, held, strict=True):
            p.grad = p.grad if grad is None else grad.copy_(p.grad)
        twin.step()
        if t < 3:
            optimizer.step()
        elif t == 3:
            with recording:
                optimizer.step()
        else:
            recording.replay()
    assert same(all_of(optimizer, [ps[0], *ps[2:]]), all_of(twin, [twins[0], *twins[2:]]))
