"""`mixin.WeightDecayMixin` has the published signature and effects."""

import inspect

import pytest
import torch

from emerging_optimizers.mixin import WeightDecayMixin


class Decaying(WeightDecayMixin):
    def __init__(self, method: str | None = None) -> None:
        if method is not None:
            self.weight_decay_method = method


def decayed(method: str | None, weight_decay: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    p, grad = torch.tensor([2.0, -4.0]), torch.tensor([1.0, 1.0])
    Decaying(method)._apply_weight_decay_inplace(p, grad, 0.5, weight_decay)
    return p, grad


def test_its_arguments():
    arguments = inspect.signature(WeightDecayMixin._apply_weight_decay_inplace).parameters
    assert list(arguments) == ["self", "p", "grad", "lr", "weight_decay"]


@pytest.mark.parametrize(("method", "keep"), [("decoupled", 0.95), ("independent", 0.9), ("palm", 0.975)])
def test_the_weight_shrinks_in_place_and_the_gradient_stays(method, keep):
    p, grad = decayed(method)
    torch.testing.assert_close(p, torch.tensor([2.0, -4.0]) * keep)
    assert torch.equal(grad, torch.ones(2))


@pytest.mark.parametrize("method", ["l2", None])
def test_l2_which_is_the_default_adds_to_the_gradient_in_place(method):
    p, grad = decayed(method)
    assert torch.equal(p, torch.tensor([2.0, -4.0]))
    torch.testing.assert_close(grad, torch.tensor([1.2, 0.6]))


@pytest.mark.parametrize("method", ["decoupled", "independent", "palm", "l2"])
def test_no_decay_changes_nothing(method):
    p, grad = decayed(method, 0.0)
    assert torch.equal(p, torch.tensor([2.0, -4.0]))
    assert torch.equal(grad, torch.ones(2))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_an_unknown_method_says_which_there_are(weight_decay):
    with pytest.raises(ValueError, match="Decaying: weight_decay_method='cosine' is not one of decoupled, independent"):
        decayed("cosine", weight_decay)
