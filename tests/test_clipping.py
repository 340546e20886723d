"""`clip_gradients`: equal to torch's where it means the same, by rule where it does not, and clear about bad input."""

import pytest
import torch

from emerging_optimizers import AdamW, Muon, clip_gradients, create_optimizer


def routed() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))
    optimizer = create_optimizer("muon", model)
    for k, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
    return model, optimizer


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6, float("inf"), 1])
def test_global_is_torchs(max_norm):
    (mine, optimizer), (theirs, _) = routed(), routed()
    norms = clip_gradients(optimizer, max_norm)
    wanted = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    torch.testing.assert_close(norms, {"all": wanted})
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_the_gradients_of_muon_do_not_shrink_those_of_adamw():
    model, optimizer = routed()
    hidden = model[1].weight
    others = [p for p in model.parameters() if p is not hidden]
    hidden.grad *= 1e6
    before = [p.grad.clone() for p in others]
    norms = clip_gradients(optimizer, 100.0, "rule")
    assert norms.keys() == {"Muon", "AdamW"}
    torch.testing.assert_close(hidden.grad.norm(), torch.tensor(100.0))
    assert all(torch.equal(p.grad, x) for p, x in zip(others, before, strict=True))
    torch.testing.assert_close(norms["AdamW"], torch.cat([x.flatten() for x in before]).norm())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_and_stops_no_other_matrix(bad):
    model, optimizer = routed()
    model[1].weight.grad[0, 0] = bad
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"the norm of the gradients \(all\) is"):
        clip_gradients(optimizer, 1e-3, error_if_nonfinite=True)
    assert not clip_gradients(optimizer, 1e-3)["all"].isfinite()
    for p, x in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, x, rtol=0, atol=0, equal_nan=True)
    weights = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    stayed = [torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True)]
    assert stayed == [p is model[1].weight for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_norm_does_not_overflow_in_a_short_dtype(dtype):
    w = torch.nn.Parameter(torch.zeros(300, 300, dtype=dtype))
    w.grad = torch.full_like(w, 1e3)
    norms = clip_gradients(AdamW([w]), 1.0)
    assert norms["all"].item() == pytest.approx(3e5, rel=1e-2)
    assert w.grad.to(torch.float64).norm().item() == pytest.approx(1, rel=1e-2)


def test_mixed_dtypes_missing_gradients_and_a_closure():
    a, b, c = (torch.nn.Parameter(torch.ones(2, 2, dtype=d)) for d in (torch.float32, torch.float64, torch.float32))
    optimizer = Muon([{"params": [a, c]}, {"params": [b]}], lr=0.1)
    assert clip_gradients(optimizer, 1.0, "rule") == {"Muon": 0}
    assert clip_gradients(optimizer, 1.0) == {"all": 0}

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (3 * a).sum() + (4 * b).sum()
        loss.backward()
        assert clip_gradients(optimizer, 1.0)["all"] == 10
        return loss

    optimizer.step(closure)
    assert c.grad is None
    torch.testing.assert_close(a.grad, torch.full((2, 2), 0.3))


@pytest.mark.parametrize("max_norm", [-1.0, float("nan"), None, "1", True, torch.tensor(1.0)])
def test_norms_that_are_none(max_norm):
    with pytest.raises(ValueError, match="max_norm="):
        clip_gradients(routed()[1], max_norm)


def test_other_bad_input():
    model, optimizer = routed()
    with pytest.raises(ValueError, match="policy='groups' is not one of 'global', 'rule'"):
        clip_gradients(optimizer, 1.0, "groups")
    with pytest.raises(TypeError, match="SGD is not an optimizer of emerging_optimizers; use torch"):
        clip_gradients(torch.optim.SGD(model.parameters()), 1.0)
    model[0].weight.grad = torch.ones(7, 4).to_sparse()
    with pytest.raises(ValueError, match=r"the gradient of 0.weight is sparse"):
        clip_gradients(optimizer, 1.0)


def test_sharded_gradients(tmp_path):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        a, b = (torch.nn.Parameter(distribute_tensor(torch.ones(2, 2), mesh, [x])) for x in (Shard(0), Replicate()))
        c = torch.nn.Parameter(torch.ones(2, 2))
        a.grad, b.grad = (distribute_tensor(torch.full((2, 2), 2.0), mesh, p.placements) for p in (a, b))
        c.grad = torch.ones(2, 2)
        norms = clip_gradients(AdamW([a, b, c]), 3.0)
        torch.testing.assert_close(norms["all"], torch.tensor(6.0))
        torch.testing.assert_close(a.grad.full_tensor(), torch.ones(2, 2))
        torch.testing.assert_close(c.grad, torch.full((2, 2), 0.5))
    finally:
        destroy_process_group()
