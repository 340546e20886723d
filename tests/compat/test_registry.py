"""The registry's functions, as the published library has them; and a user's own optimizer in it."""

import pytest
import torch
from torch import nn

from emerging_optimizers import create_optimizer, list_optimizers, registry
from emerging_optimizers.scalar_optimizers.lion import Lion
from emerging_optimizers.soap.soap import SOAP


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setattr(registry, "OPTIMIZERS", dict(registry.OPTIMIZERS))


def test_names_and_classes():
    assert registry.get_optimizer_name_list() == list_optimizers()
    assert registry.get_optimizer_cls("SOAP") is SOAP
    with pytest.raises(ValueError, match="did you mean 'soap'"):
        registry.get_optimizer_cls("soup")


def test_arguments_are_validated_by_the_signature_and_the_engine():
    registry.validate_optimizer_args(SOAP, {"lr": 1e-3, "use_eigh": True, "spike_guard": 2.0})
    with pytest.raises(TypeError, match="SOAP has no argument 'use_eig'; did you mean 'use_eigh'"):
        registry.validate_optimizer_args(SOAP, {"use_eig": True})
    with pytest.raises(TypeError, match="Lion has no argument"):
        registry.get_configured_optimizer_cls("lion", momentum=0.9)


def test_a_configured_class_takes_the_parameters():
    optimizer = registry.get_configured_optimizer_cls("soap", lr=0.5)([nn.Parameter(torch.zeros(3, 2))])
    assert type(optimizer) is SOAP
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_registered_class_can_be_created_routed_and_registered_again():
    def define():
        @registry.register_optimizer("Tiger")
        class Tiger(SOAP):
            """SOAP with stripes."""

        return Tiger

    define()
    newest = define()  # as a module that is executed again does
    assert "tiger" in list_optimizers()
    assert registry.get_optimizer_cls("tiger") is newest
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    optimizer = create_optimizer("tiger", model, lr=0.01)
    assert [group["algorithm"] for group in optimizer.param_groups] == ["tiger", "adamw", "adamw"]
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()


def test_a_name_belongs_to_one_class():
    with pytest.raises(ValueError, match=r"'lion' is emerging_optimizers\.scalar_optimizers\.lion:Lion already"):

        @registry.register_optimizer("lion")
        class Other(Lion):
            pass
