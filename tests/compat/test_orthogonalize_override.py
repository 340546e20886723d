"""Subclasses of OrthogonalizedOptimizer that override `orthogonalize`, as training frameworks write them."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from emerging_optimizers.orthogonalized_optimizers import (
    MOP,
    AdaptiveMuon,
    Muon,
    MuonHyperball,
    Muown,
    OrthogonalizedOptimizer,
    PolarGrad,
    Scion,
    Spel,
)

COMMON = {
    "momentum": 0.9,
    "weight_decay": 0.0,
    "nesterov": False,
    "weight_decay_method": "decoupled",
    "fp32_matmul_prec": "highest",
}


def polar(x: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(x, full_matrices=False)
    return U @ Vh


class SplitQKV(OrthogonalizedOptimizer):
    """Orthogonalizes the parts of a fused QKV weight one by one; sizes come from a constructor keyword."""

    def __init__(self, params, lr, **kwargs):
        super().__init__(params, lr, **COMMON, scaled_orthogonalize_fn=polar, **kwargs)

    def orthogonalize(self, p: Tensor, grad: Tensor, **kwargs) -> Tensor:
        if not getattr(p, "is_qkv", False):
            return super().orthogonalize(p, grad, **kwargs)
        parts = grad.split(kwargs["qkv_split"], dim=0)
        return torch.cat([super(SplitQKV, self).orthogonalize(p, part, **kwargs) for part in parts])


class Recorder(OrthogonalizedOptimizer):
    """Keeps what it is called with."""

    def __init__(self, params, **options):
        self.calls = []
        super().__init__(params, **{**COMMON, "lr": 0.5, **options})

    def orthogonalize(self, p: Tensor, grad: Tensor, **kwargs) -> Tensor:
        self.calls.append((p, grad.clone(), kwargs))
        return grad


def parameter(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    p = nn.Parameter(torch.zeros(shape, dtype=dtype))
    p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return p


def test_a_fused_qkv_is_orthogonalized_part_by_part():
    qkv, plain = parameter(12, 5), parameter(12, 5)
    qkv.is_qkv = True
    optimizer = SplitQKV([qkv, plain], lr=1.0, qkv_split=(6, 4, 2))
    optimizer.step()
    expected = torch.cat([polar(part) for part in qkv.grad.split((6, 4, 2))])
    torch.testing.assert_close(qkv.detach(), -expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(plain.detach(), -polar(plain.grad), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_gets_the_parameter_a_float32_matrix_and_the_entries_of_its_group(dtype):
    p = parameter(4, 3, dtype=dtype)
    optimizer = Recorder([{"params": [p], "lr": 0.25}], weight_decay=0.1, heads=2, execution="stacked")
    optimizer.step()
    ((got_p, grad, kwargs),) = optimizer.calls
    assert got_p is p
    assert (grad.shape, grad.dtype) == ((4, 3), torch.float32)
    torch.testing.assert_close(grad, 0.1 * p.grad.float(), rtol=1e-3, atol=0)
    assert kwargs.items() >= {**COMMON, "lr": 0.25, "weight_decay": 0.1, "heads": 2}.items()
    assert "params" not in kwargs


@pytest.mark.parametrize(("shape", "calls"), [((4, 3), [(4, 3)]), ((2, 4, 3), [(4, 3)] * 2), ((4, 2, 3, 3), [(4, 18)])])
def test_it_is_called_once_for_every_matrix(shape, calls):
    p = parameter(*shape)
    optimizer = Recorder([p])
    optimizer.step()
    assert [tuple(grad.shape) for _, grad, _ in optimizer.calls] == calls
    assert all(got is p for got, _, _ in optimizer.calls)
    torch.testing.assert_close(p.detach(), -0.5 * 0.1 * p.grad)


@pytest.mark.parametrize("entry", [("heads", 8), ("lr", 0.125), ("new_entry", "set later")])
@pytest.mark.parametrize("after", [0, 1])
def test_an_entry_of_the_group_that_is_set_later_reaches_it(entry, after):
    optimizer = Recorder([parameter(4, 3)], heads=2)
    for _ in range(after):
        optimizer.step()
    optimizer.param_groups[0].update([entry])
    optimizer.step()
    assert optimizer.calls[-1][2].items() >= {entry}


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_and_nesterov_are_applied_before_it(nesterov):
    p = parameter(4, 3)
    optimizer = Recorder([p], nesterov=nesterov)
    first = p.grad.clone()
    optimizer.step()
    p.grad = parameter(4, 3, seed=1).grad
    optimizer.step()
    momentum = 0.9 * 0.1 * first + 0.1 * p.grad
    expected = 0.1 * p.grad + 0.9 * momentum if nesterov else momentum
    torch.testing.assert_close(optimizer.calls[-1][1], expected)
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], momentum)


def test_a_subclass_of_muon_that_hands_everything_on_is_muon():
    class Passing(Muon):
        def orthogonalize(self, p: Tensor, grad: Tensor, **kwargs) -> Tensor:
            return super().orthogonalize(p, grad, **kwargs)

    ours, theirs = parameter(6, 4), parameter(6, 4)
    for optimizer in (Passing([ours], lr=0.1), Muon([theirs], lr=0.1, execution="per_matrix")):
        optimizer.step()
        optimizer.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("cls", [MOP, AdaptiveMuon, MuonHyperball, Muown, PolarGrad, Scion, Spel])
def test_so_is_a_subclass_of_any_relative(cls):
    class Passing(cls):
        def orthogonalize(self, p: Tensor, grad: Tensor, **kwargs) -> Tensor:
            return super().orthogonalize(p, grad, **kwargs)

    ours, theirs = (nn.Parameter(torch.eye(6, 4)) for _ in range(2))
    for p, optimizer in ((ours, Passing([ours], lr=0.1)), (theirs, cls([theirs], lr=0.1, execution="per_matrix"))):
        for t in range(3):
            p.grad = parameter(6, 4, seed=t).grad
            optimizer.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("skip", [True, False])
def test_init_group_creates_the_state_before_the_first_step(skip):
    p, frozen = parameter(4, 3), nn.Parameter(torch.zeros(2, 3), requires_grad=False)
    optimizer = Recorder([p, frozen])
    optimizer._init_group(optimizer.param_groups[0], skip_non_grad_params=skip)
    expected = [p] if skip else [p, frozen]
    assert {id(q) for q in optimizer.state} == {id(q) for q in expected}
    for q in expected:
        assert torch.equal(optimizer.state[q]["momentum_buffer"], torch.zeros(q.shape))
    buffer = optimizer.state[p]["momentum_buffer"]
    optimizer.step()
    assert optimizer.state[p]["momentum_buffer"] is buffer
    torch.testing.assert_close(buffer, 0.1 * p.grad)


def test_without_a_function_and_without_an_override_a_warning_says_what_it_is():
    with pytest.warns(UserWarning, match="SGD with momentum"):
        optimizer = OrthogonalizedOptimizer([p := parameter(4, 3)], 1.0, **COMMON)
    optimizer.step()
    torch.testing.assert_close(p.detach(), -0.1 * p.grad)


def test_a_python_function_cannot_be_compiled_and_says_what_can():
    with pytest.raises(ValueError, match="use execution='stacked' or 'per_matrix'"):
        SplitQKV([parameter(4, 3)], lr=1.0, execution="compiled")


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_a_copy_keeps_the_function(duplicate):
    p = parameter(6, 4)
    optimizer = SplitQKV([p], lr=1.0)
    optimizer.step()
    twin = duplicate(optimizer)
    q = twin.param_groups[0]["params"][0]
    q.grad = p.grad.clone()
    optimizer.step()
    twin.step()
    assert torch.equal(p, q)
