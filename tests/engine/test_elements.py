"""The short ways of element-wise rules: torch's kernel, a parameter as it is, one compiled pass."""

from typing import Any

import pytest
import torch

from emerging_optimizers.engine import chunks, executors
from emerging_optimizers.engine.rule import kernel_of
from emerging_optimizers.orthogonalized_optimizers import Muon
from emerging_optimizers.scalar_optimizers import AdamW, AdEMAMix, LaProp, Lion, RMSProp, Signum, SimplifiedAdEMAMix

SHAPES = ((40,), (3, 5), (), (2, 3, 2), (17,))


def trained(cls: Any, execution: str, steps: int = 4, poison: bool = False, **kwargs: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float64 if kwargs.pop("wide", False) else kwargs.pop("dtype", torch.float32)
    ps = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    optimizer = cls(ps, **{"lr": 0.1, "weight_decay": 0.1, "execution": execution, **kwargs})
    for t in range(steps):
        for p in ps:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        if poison and t == 1:
            assert ps[0].grad is not None
            ps[0].grad[-1] = float("nan")
        optimizer.step()
    return [p.detach() for p in ps] + [x for p in ps for x in optimizer.state[p].values()]


@pytest.mark.parametrize("cap", [4, 16, 2**17])
@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"maximize": True},
        {"weight_decay_method": "l2"},
        {"weight_decay_method": "independent", "lr": 0.0},
        {"weight_decay_method": "palm", "dtype": torch.bfloat16},
        {"lr": torch.tensor(0.1)},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
@pytest.mark.parametrize("cls", [AdamW, AdEMAMix, LaProp, Lion])
def test_pieces_of_any_size_and_whole_parameters_are_the_same(
    cls: Any, options: dict[str, Any], poison: bool, cap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient that is not finite is seen before the first piece of its parameter has moved."""
    monkeypatch.setattr(chunks, "ELEMENT_CHUNK", cap)
    monkeypatch.setattr(chunks, "FUSED_CHUNK", 2 * cap)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if "dtype" not in options else {"rtol": 1e-2, "atol": 1e-3}
    for x, y in zip(
        trained(cls, "stacked", poison=poison, **options),
        trained(cls, "per_matrix", poison=poison, **options),
        strict=True,
    ):
        torch.testing.assert_close(x, y, **tolerance)


KERNELS = [
    (AdamW, {}),
    (AdamW, {"correct_bias": False}),
    (LaProp, {}),
    (LaProp, {"correct_bias": False, "betas": (0.0, 0.9)}),
    (Lion, {}),
    (Lion, {"betas": (0.0, 0.9)}),
    (Signum, {}),
    (RMSProp, {}),
    (AdEMAMix, {}),
    (AdEMAMix, {"correct_bias": False, "betas": (0.0, 0.9, 0.99)}),
    (AdEMAMix, {"num_beta_slow_warmup_steps": 20, "num_alpha_warmup_steps": 10}),
    (SimplifiedAdEMAMix, {}),
    (SimplifiedAdEMAMix, {"correct_bias": False, "alpha": 0.0}),
    (SimplifiedAdEMAMix, {"num_beta_fast_warmup_steps": 20, "min_beta_fast": 0.5, "alpha": 100.0}),
]


@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.0}, {"weight_decay_method": "l2"}, {"maximize": True}])
@pytest.mark.parametrize(("cls", "options"), KERNELS)
def test_torchs_kernel_is_the_rule(cls: Any, options: dict[str, Any], decay: dict[str, Any]) -> None:
    """With a tensor as learning rate the rule itself runs, here in float64."""
    lr = 1e-2
    ours = trained(cls, "stacked", steps=40, lr=lr, **options, **decay)
    rule = trained(cls, "stacked", steps=40, lr=torch.tensor(lr, dtype=torch.float64), wide=True, **options, **decay)
    for x, y in zip(ours, rule, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=2e-4, atol=1e-5)


def test_a_kernel_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_of(AdamW.rule(nesterov=True)) is None
    assert kernel_of(Signum.rule(nesterov=True)) is None
    assert kernel_of(type("Changed", (AdamW.rule,), {"update": Lion.rule.update})()) is None
    assert kernel_of(type("Same", (AdamW.rule,), {})()) is not None
    calls = []
    kernel = torch._fused_adamw_
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *args, **kwargs: (calls.append(1), kernel(*args, **kwargs)))
    for n, cls in enumerate((AdamW, LaProp, RMSProp, AdEMAMix, SimplifiedAdEMAMix), start=1):
        trained(cls, "stacked", steps=1)
        assert len(calls) == n


def test_gradients_are_left_as_they_are() -> None:
    """The kernels may write them, each as it is."""
    for cls in (LaProp, RMSProp, AdEMAMix, Lion):
        p = torch.nn.Parameter(torch.ones(5))
        p.grad = torch.tensor([1e-40, -0.0, 0.0, -3.0, 1e30])
        bits = p.grad.view(torch.int32).clone()
        cls([p], lr=0.1).step()
        assert torch.equal(p.grad.view(torch.int32), bits)


@pytest.mark.usefixtures("without_code")
def test_one_graph_serves_every_length() -> None:
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for shapes in (((40,), (3, 5)), ((7,),), ((200, 3), (9,))):
        ps = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizer = Lion(ps, execution="compiled")
        for p in ps:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


def test_an_entry_of_state_that_is_replaced_again_and_again_is_followed() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Lion([p])
    for value in (1.0, 2.0, 3.0):
        p.grad = torch.zeros(3)
        optimizer.step()
        optimizer.state[p]["exp_avg"] = torch.full((3,), value)
        p.grad = torch.zeros(3)
        optimizer.step()
        assert optimizer.state[p]["exp_avg"].tolist() == pytest.approx([0.99 * value] * 3)


@pytest.mark.parametrize("options", [{"cautious": True}, {"weight_update_hook": "hyperball"}], ids=str)
def test_small_parameters_share_a_call_and_what_sees_each_of_them_does_not_mix_them(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    together = [torch.nn.Parameter(torch.randn(6, 5)) for _ in range(20)]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    for p, q in zip(together, alone, strict=True):
        p.grad = q.grad = torch.randn(6, 5)
    calls = []

    def counted(rule: Any, grad: torch.Tensor, *rest: Any) -> Any:
        calls.append(len(grad))
        return executors.call(rule, grad, *rest)

    monkeypatch.setattr("emerging_optimizers.engine.run.call", counted)
    AdamW(together, lr=0.1, **options).step()
    assert calls == [20 * 30]
    for q in alone:
        AdamW([q], lr=0.1, **options).step()
    assert all(torch.equal(p, q) for p, q in zip(together, alone, strict=True))


@pytest.mark.parametrize("cls", [AdamW, AdEMAMix, LaProp, Lion, RMSProp, Signum, SimplifiedAdEMAMix, Muon])
def test_decay_that_is_much_larger_than_the_rate_overflows_nowhere(cls: Any) -> None:
    """torch's kernels take decay divided by the rate, which is infinite here, and infinity times a weight of zero."""
    p = torch.nn.Parameter(torch.tensor([[0.0, 1.0], [-2.0, 0.0]]))
    p.grad = torch.ones(2, 2)
    cls([p], lr=1e-40, weight_decay=0.25, weight_decay_method="independent").step()
    torch.testing.assert_close(p.detach(), torch.tensor([[0.0, 0.75], [-1.5, 0.0]]))
