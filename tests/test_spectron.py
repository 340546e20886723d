"""Spectron: its bound, its starts, what others do to its weights, and its two forms."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from emerging_optimizers.engine.parts import lost
from emerging_optimizers.linalg.precision import reduced_precision
from emerging_optimizers.lowrank import LowRankLinear, factor_groups, factorize, reconstruct
from emerging_optimizers.orthogonalized_optimizers.spectron import Spectron
from tests.cases import distance


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameter(*shape: int, rank: int | None = None, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    weight = gaussian(*shape, seed=seed, dtype=torch.float64)
    if rank is not None:
        weight = gaussian(*shape[:-1], rank, seed=seed, dtype=torch.float64) @ gaussian(
            *shape[:-2], rank, shape[-1], seed=seed + 1, dtype=torch.float64
        )
    return nn.Parameter(weight.to(dtype))


def step(optimizer: torch.optim.Optimizer, t: int) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = gaussian(*p.shape, seed=1000 + t, dtype=p.dtype)
    optimizer.step()


# ---- the bound --------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    rank=st.integers(1, 12),
    lr=st.floats(1e-3, 1),
    scale=st.sampled_from([0.0, 1e-2, 1.0, 30.0]),
    grad_rank=st.integers(1, 12),
    precision=st.sampled_from(["medium", "highest"]),
    seed=st.integers(0, 2**16),
)
def test_no_update_is_longer_than_the_learning_rate(m, n, rank, lr, scale, grad_rank, precision, seed):
    """From the first step on, for any start, any gradient (rank one is Newton-Schulz's worst), one power iteration."""
    p = nn.Parameter(scale * parameter(m, n, rank=min(rank, m, n), seed=seed).detach())
    optimizer = Spectron([p], lr=lr, rank=rank, weight_decay=0.0, fp32_matmul_prec=precision, truncation_tolerance=1e-3)
    for t in range(6):
        before = p.detach().double()
        p.grad = gaussian(m, grad_rank, seed=seed + t) @ gaussian(grad_rank, n, seed=seed - t)
        with reduced_precision("bfloat16"):
            optimizer.step()
        update = torch.linalg.matrix_norm(p.detach().double() - before, 2).item()
        assert update <= lr * (1 + 1e-4) + 1e-5 * scale


@pytest.mark.parametrize("coefficient_type", ["simple", "quintic", "polar_express", "aol", "deepseekv4", "cubic5"])
def test_an_orthogonalized_momentum_is_never_longer_than_one(coefficient_type):
    steps = {"polar_express": 8, "aol": 4, "deepseekv4": 10}.get(coefficient_type, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # aol's caution
        optimizer = Spectron([parameter(2, 2)], coefficient_type=coefficient_type, num_ns_steps=steps)
    rule = optimizer._checked_rule(0)
    for decades in (0, 1, 3):
        for k in (1, 2, 8):
            U, V = (torch.linalg.qr(gaussian(4, size, k, seed=size)).Q for size in (16, 8))
            x = U @ torch.diag_embed(torch.logspace(0, -decades, k).expand(4, k)) @ V.mT
            norm = torch.linalg.matrix_norm(rule.orthogonalize(x), 2)
            assert (norm <= 1).all()
            assert (norm > 0.4).all()  # cubic5's band is wide: 0.77 to 1.30


def test_a_larger_weight_takes_a_smaller_step_of_its_factors():
    moved = []
    for scale in (1.0, 100.0):
        p = nn.Parameter(scale * parameter(8, 6).detach())
        optimizer = Spectron([p], lr=0.1, rank=6, weight_decay=0.0)
        step(optimizer, 0)
        before = optimizer.state[p]["factor_A"].clone()
        step(optimizer, 1)
        moved.append((optimizer.state[p]["factor_A"] - before).norm().item())
    assert moved[1] < 0.2 * moved[0]


# ---- the four faults of the published draft ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_gradients_train_float32_factors(dtype):
    p, wide = parameter(8, 6, dtype=dtype), nn.Parameter(parameter(8, 6, dtype=dtype).detach().float())
    runs = [(p, Spectron([p], lr=0.1, rank=6)), (wide, Spectron([wide], lr=0.1, rank=6))]
    for t in range(5):
        grad = gaussian(8, 6, seed=t, dtype=dtype)
        for q, optimizer in runs:
            q.grad = grad.to(q.dtype)
            optimizer.step()
    assert runs[0][1].state[p]["factor_A"].dtype == torch.float32
    assert torch.equal(p, wide.to(dtype))  # the weight is rounded, what it is made of is not


class NoReads(torch.overrides.TorchFunctionMode):
    """Every way from a tensor's value to Python raises."""

    READS = (torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__float__, torch.Tensor.tolist)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in self.READS, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("native", [False, True])
def test_a_steady_step_of_the_rule_reads_nothing_on_the_host(lr, native):
    model = nn.Sequential(LowRankLinear(6, 8, rank=3, bias=False))
    groups = factor_groups(model) if native else [parameter(8, 6)]
    optimizer = Spectron(groups, lr=lr, rank=6)
    step(optimizer, 0)
    ((_, bucket),) = optimizer._places.buckets
    rule = optimizer._checked_rule(0)
    from emerging_optimizers.engine.scalars import make_scalars

    (chunk,) = bucket.chunks(bucket.whole, "stacked")
    weight = bucket.stack(chunk, {0: bucket.parameters[0]})
    t = make_scalars(
        rule.reads,
        optimizer.param_groups[0],
        {"step": torch.full((1, 1, 1), 2.0), "l2": None, "weight": weight, "weight_dtype": torch.float32},
    )
    with NoReads():
        rule.update(torch.ones_like(weight), bucket.read(chunk), t)
        lost(bucket.state)


def test_truncation_is_announced_once_with_its_size():
    ps = [parameter(8, 6, seed=s) for s in range(3)]
    lost = []
    for p in ps:
        sigma = torch.linalg.svdvals(p.detach())
        lost.append(sigma[2:].norm() / sigma.norm())
    worst = int(torch.stack(lost).argmax())
    optimizer = Spectron([(f"w{i}", p) for i, p in enumerate(ps)], lr=1e-20, weight_decay=0.0, rank=2)
    text = rf"rank=2 keeps 2 singular values of parameter 'w{worst}' .*; {lost[worst]:.3g} of its norm is lost"
    with pytest.warns(UserWarning, match=text) as caught:
        step(optimizer, 0)
    assert len(caught) == 1
    step(optimizer, 1)  # a warning would be an error
    sigma = torch.linalg.svdvals(ps[0].detach())
    assert (sigma[2:] < 1e-5 * sigma[0]).all()


def test_a_truncation_beyond_its_tolerance_is_refused_before_anything_moves():
    ps = [parameter(8, 6, rank=2), parameter(7, 5, seed=3)]
    before = [p.detach().clone() for p in ps]
    optimizer = Spectron(ps, lr=0.1, rank=2, truncation_tolerance=0.1)
    with pytest.raises(ValueError, match=r"parameter 1 of shape \(7, 5\).*truncation_tolerance=0.1.*nothing has moved"):
        step(optimizer, 0)
    assert all(torch.equal(p, b) for p, b in zip(ps, before, strict=True))


def test_what_fits_into_the_rank_is_not_announced():
    step(Spectron([parameter(8, 6, rank=2)], rank=2), 0)
    step(Spectron([parameter(8, 6)], rank_ratio=1.0), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_zero_weight_trains_as_far_as_its_rank_allows(dtype):
    target = parameter(8, 6, rank=3, dtype=dtype).detach().float()
    p = nn.Parameter(torch.zeros(8, 6, dtype=dtype))
    optimizer = Spectron([p], lr=0.5, rank=3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=200)
    for _ in range(200):
        p.grad = (p.detach().float() - target).to(dtype)
        optimizer.step()
        schedule.step()
    assert (p.detach().float() - target).norm() < 0.05 * target.norm()


def test_a_weight_of_less_than_its_rank_reaches_its_rank():
    p = parameter(8, 6, rank=1)
    optimizer = Spectron([p], lr=0.1, rank=4, weight_decay=0.0)
    before = p.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    step(optimizer, 0)
    torch.testing.assert_close(p.detach(), before)
    optimizer.param_groups[0]["lr"] = 0.1
    for t in range(5):
        step(optimizer, t)
    assert torch.linalg.matrix_rank(p.detach(), rtol=1e-3) == 4


def test_a_run_is_a_function_of_the_seed():
    def run(draws: int) -> torch.Tensor:
        torch.manual_seed(5)
        torch.randn(draws)
        p = nn.Parameter(torch.zeros(8, 6))
        optimizer = Spectron([p], lr=0.1, rank=2)
        for t in range(4):
            step(optimizer, t)
        return p.detach()

    assert torch.equal(run(0), run(3))


# ---- weights that others write ----------------------------------------------------------------------------------

EDITS = {
    "average swapped in": lambda p: p.copy_(0.9 * p + 0.1 * gaussian(*p.shape, seed=9, dtype=p.dtype)),
    "clipping": lambda p: p.clamp_(-0.5, 0.5),
    "through .data": lambda p: p.data.mul_(1.25),
    "one entry": lambda p: p[0, 0].add_(1.0),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("execution", ["stacked", "per_matrix"])
def test_an_edited_weight_sits_one_step_out_and_is_factorised_anew(edit, dtype, execution):
    p, other = parameter(8, 6, dtype=dtype), parameter(8, 6, seed=1, dtype=dtype)
    q = nn.Parameter(other.detach().clone())
    options = {"lr": 0.01, "rank": 6, "weight_decay": 0.0, "execution": execution}
    optimizer, undisturbed = Spectron([p, other], **options), Spectron([q], **options)
    for t in range(3):
        step(optimizer, t)
        step(undisturbed, t)
    with torch.no_grad():
        edit(p)
    edited = p.detach().clone()
    step(optimizer, 3)
    assert torch.equal(p, edited)
    step(optimizer, 4)
    fresh = nn.Parameter(edited.clone())
    step(Spectron([fresh], **options), 4)
    torch.testing.assert_close(p, fresh)
    step(optimizer, 5)
    assert not torch.equal(p, fresh)
    for t in (3, 4, 5):
        step(undisturbed, t)
    torch.testing.assert_close(other, q)  # the matrix beside it noticed nothing


def test_an_edit_that_is_undone_is_none():
    p, q = parameter(8, 6), parameter(8, 6)
    optimizers = [Spectron([x], lr=0.1, rank=6) for x in (p, q)]
    for t in range(6):
        held = p.detach().clone()
        p.data.mul_(0.5)  # an average is swapped in for an evaluation, and out again
        p.data.copy_(held)
        for optimizer in optimizers:
            step(optimizer, t)
    assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rounding_is_not_taken_for_an_edit(dtype, scale):
    ps = [nn.Parameter(scale * parameter(*shape, dtype=dtype).detach()) for shape in ((64, 48), (5, 90), (3, 16, 8))]
    optimizer = Spectron(ps, lr=0.05, rank=4, truncation_tolerance=1.0)
    for t in range(12):
        before = [p.detach().clone() for p in ps]
        step(optimizer, t)
        assert all(state["u_A"].any(dim=-1).all() for state in optimizer.state.values())
        if scale == 1:
            assert not any(torch.equal(p, b) for p, b in zip(ps, before, strict=True))


def test_a_skipped_first_step_leaves_no_trace_and_the_next_one_starts():
    p = parameter(8, 6)
    before = p.detach().clone()
    optimizer = Spectron([p], lr=0.1, rank=2, truncation_tolerance=1.0)
    p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert torch.equal(p, before)
    fresh = nn.Parameter(before.clone())
    step(optimizer, 1)
    step(Spectron([fresh], lr=0.1, rank=2, truncation_tolerance=1.0), 1)
    assert torch.equal(p, fresh)


# ---- factors as weights -----------------------------------------------------------------------------------------


def model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5, bias=False), nn.Linear(5, 2)).to(dtype)


def fit(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[float]:
    losses = []
    for t in range(first, first + steps):
        p = next(net.parameters())
        x, y = (gaussian(16, k, seed=t + k, dtype=p.dtype).to(p.device) for k in (6, 2))
        loss = (net(x) - y).square().mean()
        net.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.usefixtures("without_code")
@pytest.mark.parametrize("execution", ["stacked", "per_matrix", "compiled"])
@pytest.mark.parametrize("method", ["decoupled", "l2"])
def test_factors_as_weights_follow_the_law_of_factors_as_state(execution, method):
    options = {"lr": 0.1, "weight_decay": 0.1, "weight_decay_method": method, "fp32_matmul_prec": "highest"}
    native = factorize(model(), rank=3, skip=["3"])
    dense = reconstruct(copy.deepcopy(native))
    a = Spectron(factor_groups(native), execution=execution, **options)
    b = Spectron([dense[0].weight, dense[2].weight], rank=3, **options)
    torch.testing.assert_close(fit(native, a, 6), fit(dense, b, 6), rtol=1e-9, atol=0)
    for i in (0, 2):
        torch.testing.assert_close(native[i].weight, dense[i].weight, rtol=1e-8, atol=1e-10)


def test_native_training_resumes_bitwise_and_copies():
    def made(net: nn.Module) -> Spectron:
        return Spectron(factor_groups(net), lr=0.1)

    through = factorize(model(torch.float32), rank=2, skip=["3"])
    net = copy.deepcopy(through)
    fit(through, made(through), 6)
    optimizer = made(net)
    fit(net, optimizer, 3)
    resumed = copy.deepcopy(net)
    again = made(resumed)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fit(resumed, again, 3, first=3)
    fit(*(pair := copy.deepcopy((net, optimizer))), 3, first=3)
    assert all(
        torch.equal(p, q) and torch.equal(p, r)
        for p, q, r in zip(through.parameters(), resumed.parameters(), pair[0].parameters(), strict=True)
    )


def test_the_state_of_native_factors_is_half_of_it_and_no_dense_matrix_exists():
    native = factorize(nn.Sequential(nn.Linear(64, 64, bias=False)), rank_ratio=0.25)
    dense = reconstruct(copy.deepcopy(native))
    a, b = Spectron(factor_groups(native)), Spectron(dense.parameters(), rank=16)
    for net, optimizer in ((native, a), (dense, b)):
        net(torch.randn(3, 64)).sum().backward()
        optimizer.step()

    def numbers(optimizer: torch.optim.Optimizer) -> int:
        return sum(x.numel() for state in optimizer.state.values() for x in state.values())

    assert sum(p.numel() for p in native.parameters()) == 16 * 128
    assert numbers(a) == 16 * 128 + 128 + 1
    assert numbers(b) == 2 * 16 * 128 + 128 + 1


def test_a_zero_layer_trains():
    layer = LowRankLinear(6, 8, rank=3, bias=False)
    layer.assign(torch.zeros(8, 6))
    assert not layer.weight.any()
    net = nn.Sequential(layer)
    step(Spectron(factor_groups(net), lr=0.1), 0)
    assert layer.weight.any()


def test_factorize_and_reconstruct():
    net, x = model(), gaussian(4, 6, dtype=torch.float64)
    expected, keys = net(x), list(net.state_dict())
    assert factorize(net, rank_ratio=1.0) is net
    torch.testing.assert_close(net(x), expected)
    assert [type(m) for m in net] == [LowRankLinear, nn.Tanh, LowRankLinear, LowRankLinear]
    reconstruct(net)
    torch.testing.assert_close(net(x), expected)
    assert list(net.state_dict()) == keys
    assert not net.training or all(m.training for m in net.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layers_keep_dtype_and_train_in_low_precision(dtype):
    net = factorize(model(dtype), rank=2, skip=["3"])
    optimizer = Spectron(factor_groups(net), lr=0.1)
    fit(net, optimizer, 4)
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert all(p.isfinite().all() for p in net.parameters())
    assert reconstruct(net)[0].weight.dtype == dtype


def tied() -> nn.Module:
    net = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 5, bias=False))
    net[1].weight = net[0].weight
    return net


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: factorize(model()), "give either rank or rank_ratio"),
        (lambda: factorize(model(), rank=2, rank_ratio=0.5), "give either rank or rank_ratio"),
        (lambda: factorize(model(), rank=0), "rank=0 is not allowed"),
        (lambda: factorize(model(), rank_ratio=1.5), r"rank_ratio=1.5 .* \(0, 1\]"),
        (lambda: factorize(model(), rank=2, skip=["hed"]), "skip='hed' matches no module"),
        (lambda: factorize(nn.Linear(3, 3), rank=2), "this Linear is one"),
        (lambda: factorize(nn.Sequential(nn.ReLU()), rank=2), "has none"),
        (lambda: factorize(tied(), rank=2), "'1' shares its weight.*skip"),
        (lambda: factor_groups(model()), "has no LowRankLinear"),
        (lambda: LowRankLinear(3, 4), "give either rank or rank_ratio"),
        (lambda: Spectron(factorize(model(), rank=2).parameters()), "factor_groups.*create_optimizer"),
        (lambda: step(Spectron([parameter(4, 2)], out_features=4), 0), "out_features=4 leaves no row for B"),
        (lambda: Spectron([parameter(4, 2)], rank_ratio=0.0), r"rank_ratio=0.0.*\(0, 1\]"),
    ],
)
def test_what_cannot_be_done_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.usefixtures("without_code")
def test_truncated_stacks_equal_single_matrices_and_compiled_ones():
    def run(execution: str) -> list[nn.Parameter]:
        ps = [parameter(9, 6, seed=s, dtype=torch.float64) for s in range(3)]
        options = {"rank": 3, "truncation_tolerance": 1.0, "execution": execution}
        optimizer = Spectron(ps, lr=0.1, **options)
        for t in range(6):
            if t == 3:
                ps[1].data.mul_(0.5)
            for i, p in enumerate(ps):
                p.grad = None if (i + t) % 4 == 0 else gaussian(9, 6, seed=50 * i + t, dtype=torch.float64)
            optimizer.step()
        return ps

    start = [parameter(9, 6, seed=s, dtype=torch.float64) for s in range(3)]
    stacked = run("stacked")
    assert distance(run("per_matrix"), stacked, start) < 1e-9
    assert distance(run("compiled"), stacked, start) < 1e-9
