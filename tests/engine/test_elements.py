"""The short ways of element-wise rules: torch's kernel, a parameter as it is, one compiled pass."""

from typing import Any

import pytest
import torch

from emerging_optimizers.engine import buckets
from emerging_optimizers.scalar_optimizers import AdamW, LaProp, Lion

SHAPES = ((40,), (3, 5), (), (2, 3, 2), (17,))


def trained(cls: Any, execution: str, steps: int = 4, poison: bool = False, **kwargs: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtype = kwargs.pop("dtype", torch.float32)
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
@pytest.mark.parametrize("cls", [AdamW, LaProp, Lion])
def test_pieces_of_any_size_and_whole_parameters_are_the_same(
    cls: Any, options: dict[str, Any], poison: bool, cap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient that is not finite is seen before the first piece of its parameter has moved."""
    monkeypatch.setattr(buckets, "ELEMENT_CHUNK", cap)
    monkeypatch.setattr(buckets, "FUSED_CHUNK", 2 * cap)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if "dtype" not in options else {"rtol": 1e-2, "atol": 1e-3}
    for x, y in zip(
        trained(cls, "stacked", poison=poison, **options),
        trained(cls, "per_matrix", poison=poison, **options),
        strict=True,
    ):
        torch.testing.assert_close(x, y, **tolerance)  # type: ignore[arg-type]


def test_torchs_kernel_is_the_rule() -> None:
    """`nesterov` has no kernel; with a tensor as learning rate the rule itself runs."""
    assert AdamW.rule().fused is not None
    assert AdamW.rule(nesterov=True).fused is None
    for x, y in zip(trained(AdamW, "stacked"), trained(AdamW, "stacked", lr=torch.tensor(0.1)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


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
