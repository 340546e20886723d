"""Anything in any order: a state machine over what people do to an optimizer between steps.

It holds, after each step: what had no gradient, was skipped, is in no group, or has a learning rate of zero, has not
moved; everything else has; all is finite. A copy and a resumed run go on bit for bit.
"""

import copy
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

from emerging_optimizers import registry
from tests.cases import SEEDS, OptimizerCase

SHAPES = [(4, 3), (3, 4), (4, 4), (2, 3, 3), (1, 5)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# What the engine can do beside every rule; a rule may refuse one of them.
OPTIONS = st.fixed_dictionaries(
    {
        "spike_guard": st.sampled_from([None, 3.0]),
        "offload": st.sampled_from([None, "cpu"]),
        "weight_rounding": st.sampled_from(["nearest", "stochastic", "compensated"]),
        "state_dtype": st.sampled_from([None, torch.bfloat16]),
        "cautious": st.booleans(),
    }
)
indices = st.integers(0, 5)


class Machine(RuleBasedStateMachine):
    """One optimizer, its parameters, and what they should have done."""

    case: OptimizerCase
    optimizer: Any = None

    @initialize(
        case=st.sampled_from([case for case in SEEDS if case.optimizer != "aol"]),
        shapes=st.lists(st.sampled_from(SHAPES), min_size=2, max_size=5),
        dtypes=st.lists(st.sampled_from(DTYPES), min_size=5, max_size=5),
        split=st.integers(1, 4),
        named=st.booleans(),
        options=OPTIONS,
        seed=st.integers(0, 2**16),
    )
    def make(
        self,
        case: OptimizerCase,
        shapes: Any,
        dtypes: Any,
        split: int,
        named: bool,
        options: dict[str, Any],
        seed: int,
    ) -> None:
        self.case, self.named = case, named
        self.generator = torch.Generator().manual_seed(seed)
        ps = [self.parameter(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]
        self.everyone = list(ps)
        self.groups = [group for group in (ps[:split], ps[split:]) if group]
        self.options = {name: value for name, value in options.items() if self.takes(**{name: value})}
        self.optimizer = self.made(self.groups)

    def takes(self, **option: Any) -> bool:
        try:
            self.case.make([nn.Parameter(torch.eye(3))], **option)
        except ValueError as refused:
            if "is not possible" in str(refused):
                return False
            raise
        return True

    def parameter(self, shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype))

    def made(self, groups: list[list[nn.Parameter]]) -> Any:
        count = iter(range(100))
        rows = [[(f"p{next(count)}", p) for p in ps] if self.named else ps for ps in groups]
        return self.case.make([{"params": row} for row in rows], **self.options)

    # ---- between steps ------------------------------------------------------------------------------------------

    @rule(i=indices, lr=st.sampled_from([0.0, 0.01, numpy.float32(0.02), 0.05]))
    def set_the_rate(self, i: int, lr: Any) -> None:
        groups = self.optimizer.param_groups
        groups[i % len(groups)]["lr"] = lr

    @rule()
    def reverse_groups(self) -> None:
        self.optimizer.param_groups.reverse()

    @rule(i=indices, j=indices)
    def take_out(self, i: int, j: int) -> None:
        ps = self.optimizer.param_groups[i % len(self.optimizer.param_groups)]["params"]
        if len(ps) > 1:
            ps.pop(j % len(ps))

    @rule(i=indices, shape=st.sampled_from(SHAPES), dtype=st.sampled_from(DTYPES))
    def put_in(self, i: int, shape: Any, dtype: Any) -> None:
        inside = {p for group in self.optimizer.param_groups for p in group["params"]}
        outside = [p for p in self.everyone if p not in inside] or [self.parameter(shape, dtype)]
        self.everyone += [p for p in outside[:1] if p not in set(self.everyone)]
        self.optimizer.param_groups[i % len(self.optimizer.param_groups)]["params"].append(outside[0])

    @rule(shape=st.sampled_from(SHAPES), dtype=st.sampled_from(DTYPES))
    def add_a_group(self, shape: Any, dtype: Any) -> None:
        if len(self.optimizer.param_groups) < 4 and not self.named:
            self.everyone.append(self.parameter(shape, dtype))
            self.optimizer.add_param_group({"params": [self.everyone[-1]], "lr": 0.03})

    @rule(i=indices)
    def freeze_or_thaw(self, i: int) -> None:
        p = self.everyone[i % len(self.everyone)]
        p.requires_grad_(not p.requires_grad)

    @rule(i=indices, dtype=st.sampled_from(DTYPES))
    def change_dtype(self, i: int, dtype: torch.dtype) -> None:
        p = self.everyone[i % len(self.everyone)]
        p.grad = None
        p.data = p.data.to(dtype)

    @rule(i=indices, what=st.sampled_from(["clear", "clone", "own", "everything"]))
    def edit_state(self, i: int, what: str) -> None:
        state = self.optimizer.state
        p = self.everyone[i % len(self.everyone)]
        if what == "everything":
            state.clear()
        elif what == "own":
            state[p]["z"] = torch.ones(2)
        elif p in state and what == "clear":
            del state[p]
        elif p in state:
            state[p] = {key: x.clone() for key, x in state[p].items()}

    @rule(i=indices, name=st.sampled_from(["lr", "maximize", "weight_decay_method"]))
    def ask_for_nonsense(self, i: int, name: str) -> None:
        """It is refused, and nothing has changed."""
        group = self.optimizer.param_groups[i % len(self.optimizer.param_groups)]
        old, weights = group[name], [p.detach().clone() for p in self.everyone]
        group[name] = "nonsense"
        with pytest.raises(ValueError, match=name):
            self.optimizer.step()
        group[name] = old
        assert all(map(torch.equal, weights, self.everyone))

    # ---- steps --------------------------------------------------------------------------------------------------

    def set_gradients(self, missing: set[int], bad: set[int], scale: float) -> None:
        for i, p in enumerate(self.everyone):
            p.grad = None
            if i in missing or not p.requires_grad:
                continue
            noise = torch.randn(p.shape, generator=self.generator, dtype=torch.float64) * scale
            p.grad = (torch.full_like(noise, float("nan")) if i in bad else noise).to(p.dtype)

    @rule(
        missing=st.sets(indices, max_size=2), bad=st.sets(indices, max_size=1), scale=st.sampled_from([1.0, 1.0, 1e3])
    )
    def step(self, missing: set[int], bad: set[int], scale: float) -> None:
        self.set_gradients(missing, bad, scale)
        before = [p.detach().clone() for p in self.everyone]
        rates = {p: float(group["lr"]) for group in self.optimizer.param_groups for p in group["params"]}
        self.optimizer.step()
        for i, (p, old) in enumerate(zip(self.everyone, before, strict=True)):
            moves = p.grad is not None and i not in bad and rates.get(p, 0.0) > 0
            if not moves:
                assert torch.equal(p, old), (i, "moved")
        assert all(bool(p.isfinite().all()) for p in self.everyone)

    @precondition(lambda self: self.optimizer is not None)
    @rule(how=st.sampled_from(["copy", "resume"]), place=st.sampled_from([None, "cpu"]))
    def go_on_bit_for_bit(self, how: str, place: str | None) -> None:
        """A copy, or another optimizer that loads the checkpoint, takes the next step as this one does.

        Wherever its state is kept.
        """
        if how == "copy":
            everyone, other = copy.deepcopy((self.everyone, self.optimizer))
        else:
            everyone = copy.deepcopy(self.everyone)
            twin = dict(zip(self.everyone, everyone, strict=True))
            groups = self.optimizer.param_groups
            other = self.case.make([{"params": [twin[p] for p in group["params"]]} for group in groups], **self.options)
            saved = copy.deepcopy(self.optimizer.state_dict())
            del saved["names"]  # which edited groups do not keep up with
            other.load_state_dict(saved)
        for group in other.param_groups:
            group["offload"] = place
        self.set_gradients(set(), set(), 1.0)
        for p, q in zip(self.everyone, everyone, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        self.optimizer.step()
        other.step()
        assert all(map(torch.equal, self.everyone, everyone))

    @invariant()
    def state_belongs_to_parameters(self) -> None:
        if self.optimizer is not None:
            known = set(self.everyone)
            assert all(p in known for p in self.optimizer.state if isinstance(p, Tensor))


def _run(examples: int) -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=12,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=examples < 1000,
        ),
    )


@pytest.mark.filterwarnings("ignore:.*keeps .* singular values:UserWarning")  # Spectron, as it is asked to
@pytest.mark.filterwarnings("ignore:.*in each of the last 100 steps:UserWarning")
def test_anything_in_any_order() -> None:
    _run(60)


@pytest.mark.slow  # the same for many more programs
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore:.*keeps .* singular values:UserWarning")
@pytest.mark.filterwarnings("ignore:.*in each of the last 100 steps:UserWarning")
def test_anything_in_any_order_for_long() -> None:
    _run(1500)


def test_every_optimizer_can_be_drawn() -> None:
    assert {case.optimizer for case in SEEDS} == set(registry.OPTIMIZERS)
