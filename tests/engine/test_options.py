"""Options on their way in: configuration libraries' types, checkpoints of earlier versions, ready-made state."""

import copy
import io
from collections import UserList
from typing import Any

import numpy as np
import pytest
import torch

from emerging_optimizers import MARS, SOAP, AdamW, LaProp, MAdam, Muon, MuonMix, ObliqueSGD
from emerging_optimizers.engine.validate import suggest


def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(3, 2))


@pytest.mark.parametrize("betas", [[0.9, 0.95], UserList([0.9, 0.95]), (np.float64(0.9), np.float32(0.95))], ids=type)
def test_lists_and_numpy_numbers_become_plain_and_load_with_weights_only(betas: Any) -> None:
    optimizer = AdamW([weight()], lr=np.float64(0.1), betas=betas)
    group = optimizer.param_groups[0]
    assert type(group["lr"]) is float
    assert type(group["betas"]) is tuple
    assert all(type(beta) is float for beta in group["betas"])
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    optimizer.load_state_dict(torch.load(buffer, weights_only=True))


def test_a_checkpoint_from_before_an_option_existed_gets_its_default() -> None:
    optimizer = SOAP([weight()], lr=0.1, precondition_frequency=7)
    old = copy.deepcopy(optimizer.state_dict())
    del old["param_groups"][0]["precondition_frequency"], old["param_groups"][0]["relative_floor"], old["format"]
    optimizer.load_state_dict(old)
    assert optimizer.param_groups[0]["precondition_frequency"] == 7


def test_a_torch_adamw_checkpoint_goes_on_as_it_would_have() -> None:
    theirs, ours = weight(), weight()
    source = torch.optim.AdamW([theirs], lr=0.1)
    target = AdamW([ours], lr=0.5)
    for t in range(4):
        if t == 2:
            ours.data.copy_(theirs.data)
            target.load_state_dict(copy.deepcopy(source.state_dict()))
        for p, optimizer in ((theirs, source), (ours, target)):
            p.grad = torch.full_like(p, float(t + 1))
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_a_changed_static_option_holds_from_the_next_step() -> None:
    p, q = weight(), weight()
    a, b = Muon([p], lr=0.1), Muon([q], lr=0.1, nesterov=True)
    a.param_groups[0]["nesterov"] = True
    for optimizer, w in ((a, p), (b, q)):
        w.grad = torch.tensor([[1.0, 2.0], [3.0, -4.0], [5.0, 6.0]])
        optimizer.step()
    assert torch.equal(p, q)


def test_warnings_come_once_and_not_with_every_new_learning_rate(recwarn: pytest.WarningsRecorder) -> None:
    p = weight()
    with pytest.warns(UserWarning, match="no effect on the norm"):
        optimizer = LaProp([p], lr=0.1, frob_normalize=True, weight_decay=0.1)
    for t in range(3):
        optimizer.param_groups[0]["lr"] = 0.1 / (t + 1)
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert not recwarn.list


def test_near_misses_are_suggested() -> None:
    assert suggest("momentun", ["momentum", "lr"]) == "; did you mean 'momentum'?"
    assert suggest("label", ["momentum", "lr"]) == ""


def test_what_cannot_be_met_raises_and_says_why() -> None:
    with pytest.raises(ValueError, match="needs custom_coefficient_sets"):
        Muon([weight()], coefficient_type="custom")
    with pytest.warns(UserWarning, match="stream_list has no effect"):
        SOAP([weight()], lr=0.1, stream_list=[])
    with pytest.warns(UserWarning, match="is made for 10 steps, 5 asked for"):
        Muon([weight()], coefficient_type="deepseekv4")
    with pytest.raises(ValueError, match="made for 5 steps, 6 asked"):
        Muon([weight()], coefficient_type="cubic5", num_ns_steps=6)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: ObliqueSGD(p, dim=1.0), r"dim=1\.0 .*one of 0, 1, -2, -1"),
        (lambda p: ObliqueSGD(p, dim=True), "dim=True .*one of 0, 1, -2, -1"),
        (lambda p: MuonMix(p, slow_share=True), r"slow_share=True .*a number in \[0, 1\]"),
        (lambda p: MAdam(p, scale_log2=False), "scale_log2=False .*an even integer"),
        (lambda p: MARS(p, gamma=10**400), "gamma=1000.*a finite number >= 0"),
    ],
)
def test_a_value_of_another_kind_is_refused_before_the_step(make: Any, says: str) -> None:
    """They passed for one that is allowed, and torch refused them in the step, or took them."""
    with pytest.raises(ValueError, match=says):
        make([weight()])
