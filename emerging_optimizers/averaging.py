r"""Averages of the weights that an optimizer goes through, beside any torch optimizer.

With :math:`w_k` the weights after the k-th step, counted from the first one that is averaged, `WeightAverage` holds

.. math::
    \bar w_k = \bar w_{k-1} + c_k (w_k - \bar w_{k-1}), \qquad
    c_k = \frac{1 - d}{1 - d^k} \quad (d < 1), \qquad c_k = \frac{1}{k} \quad (d = 1)

which is the exact mean with weights :math:`d^{k - i}`: no average starts at zero or at the first weights. `d = 1` is
Polyak's and Ruppert's uniform mean; with `start` it is one of the tail alone.

`ScheduleFree` is that of Defazio et al. 2024, The Road Less Scheduled, arXiv 2405.15682. The optimizer moves z, the
model is trained at y, and evaluated at x:

.. math::
    y_t = (1 - \beta) z_t + \beta x_t, \qquad
    x_{t+1} = x_t + c_{t+1} (z_{t+1} - x_t), \qquad c_{t+1} = \gamma_t^2 \Big/ \sum_{i \le t} \gamma_i^2

with learning rates :math:`\gamma`, which warm up and then stay. Weight decay is the optimizer's own, at z.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from emerging_optimizers.distributed.dtensor import is_dtensor, local_of
from emerging_optimizers.engine.ambient import eager, undisturbed
from emerging_optimizers.engine.capture import is_capturing
from emerging_optimizers.engine.options import FRACTION, SHARE, WHOLE

ModeT = Literal["train", "eval"]
# What stands beside the optimizer's own in its state, and in its groups: which weights the model has.
ENTRIES = ("average", "z", "trained_weight")
MODE = "averaging_mode"
# Those whose state has an average; a second one would write into the same entries.
_TAKEN: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def _closure(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a step was given one; of its arguments, the optimizer comes first."""
    return kwargs.get("closure") is not None or any(x is not None for x in args[1:])


def _wide(p: Tensor) -> torch.dtype:
    """Of averages of a weight."""
    return torch.promote_types(p.dtype, torch.float32)


class _Layer:
    """Entries beside an optimizer's own in its state, which its checkpoints hold, and weights that can be exchanged.

    Args:
        optimizer: any torch optimizer.

    Attributes:
        count: what groups call that on which shares depend; a group without it has had no step.
    """

    count: str

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if not (isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "_optimizer_step_post_hooks")):
            raise TypeError(
                f"optimizer is a {type(optimizer).__name__}; give the torch optimizer that moves the weights, not what "
                "wraps it"
            )
        if optimizer in _TAKEN:
            raise ValueError(
                f"{type(self).__name__}: this {type(optimizer).__name__} has an average already, and its state has "
                "room for one; give a new optimizer, or a copy.deepcopy of it, which has none"
            )
        self.optimizer = optimizer
        self._late: dict[Tensor, Tensor] = {}
        self._loading: list[Any] = []
        self._hook()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or one out of a pickle: torch's optimizers leave their hooks behind."""
        self.__dict__.update(state)
        self._hook()

    def _hook(self) -> None:
        _TAKEN.add(self.optimizer)
        self.optimizer.register_step_pre_hook(self._before)
        self.optimizer.register_step_post_hook(self._after)
        self.optimizer.register_load_state_dict_pre_hook(self._before_loading)
        self.optimizer.register_load_state_dict_post_hook(self._after_loading)

    @property
    def mode(self) -> ModeT:
        """Which weights the model has: "train" those that it is trained at, "eval" the average."""
        return "eval" if any(group.get(MODE) == "eval" for group in self.optimizer.param_groups) else "train"

    @undisturbed
    @torch.no_grad()
    def eval(self) -> None:
        """Give the model the average; before the first step there is none, and nothing changes."""
        self._gather_anew()
        for group in self.optimizer.param_groups:
            if group.get(MODE) == "train":
                for state, p in self._averaged(group):
                    self._set_aside(p, state)
                    local_of(p).copy_(local_of(state["average"]))
                group[MODE] = "eval"

    @undisturbed
    @torch.no_grad()
    def train(self) -> None:
        """Give the model the weights that it is trained at, bit for bit."""
        self._gather_anew()
        for group in self.optimizer.param_groups:
            if group.get(MODE) == "eval":
                for state, p in self._averaged(group):
                    self._take_back(p, state)
                group[MODE] = "train"

    def _averaged(self, group: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Tensor]]:
        states = self.optimizer.state
        return ((states[p], p) for p in group["params"] if "average" in states.get(p, {}))

    def _gather_anew(self) -> None:
        """Have FSDP2 forget weights that it has gathered, and would use in place of those that are written now.

        After a forward pass without a backward pass it keeps the root's. An optimizer does not know the modules, but
        torch has a list of all that are sharded.
        """
        if not any(map(is_dtensor, self._parameters())):
            return
        from torch.distributed._composable_state import _module_state_mapping
        from torch.distributed.fsdp import FSDPModule

        for module in list(_module_state_mapping):
            if isinstance(module, FSDPModule):
                module.reshard()

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    @eager
    @undisturbed
    @torch.no_grad()
    def _before(self, _: torch.optim.Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if self.mode == "eval":
            raise RuntimeError(
                f"{type(self).__name__}: the model has its averaged weights, and a step belongs to those that it is "
                "trained at; call train() before the step. Nothing has moved"
            )
        if is_capturing():
            raise RuntimeError(
                f"{type(self).__name__}: this step is recorded in a CUDA graph, which would repeat its share in the "
                "average and not count; record the forward and backward pass alone. Nothing has moved"
            )
        # A weight whose first gradient comes later than others': so far it has stayed, and is its own average.
        self._late = {
            p: p.detach().clone()
            for group in self.optimizer.param_groups
            if self.count in group
            for p in group["params"]
            if "average" not in self.optimizer.state.get(p, {}) and (p.grad is not None or _closure(args, kwargs))
        }

    @eager  # torch 2.13's inductor reorders what `_after` writes, and the counts would compile it anew in each step
    @undisturbed
    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        for group in self.optimizer.param_groups:
            group.setdefault(MODE, "train")
            share = self._share(group)
            for p in group["params"]:
                known = self.optimizer.state.get(p, {})
                if "average" not in known and p.grad is None:  # an entry would tell the optimizer that it has state
                    continue
                state: dict[str, Any] = self.optimizer.state[p]
                if "average" not in state:
                    before = self._late.get(p, p.detach())
                    state["average"] = before.to(_wide(p), copy=True)
                average = local_of(state["average"])
                average.lerp_(local_of(p.detach()).to(average.dtype), share)
                self._follow(p, state)
        self._late = {}

    def _before_loading(self, _: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
        """Keep averages as a checkpoint has them: torch's optimizers round what they load to the weights' dtype."""
        ids = (i for group in saved.get("param_groups", ()) for i in group.get("params", ()))
        self._loading = [saved.get("state", {}).get(i, {}).get("average") for i in ids]
        # What a checkpoint of this library says of entries beside an optimizer's own; torch.distributed.checkpoint
        # does not keep it. `saved` is torch's own shallow copy.
        saved["others"] = sorted({*saved.get("others", ()), *ENTRIES})

    def _after_loading(self, _: torch.optim.Optimizer) -> None:
        for p, saved in zip(self._parameters(), self._loading, strict=True):
            state = self.optimizer.state.get(p, {})
            if (here := state.get("average")) is not None:
                rounded = saved is not None and saved.dtype != here.dtype
                state["average"] = (saved.detach().clone() if rounded else here).to(p.device, _wide(p))
            if "z" in state:
                state["z"] = state["z"].to(p.dtype)
        self._loading = []

    def _share(self, group: dict[str, Any]) -> float:
        """By how much of the way the averages of a group move to its weights in this step."""
        raise NotImplementedError  # by both

    def _follow(self, p: Tensor, state: dict[str, Any]) -> None:
        """What becomes of a weight after its average."""

    def _set_aside(self, p: Tensor, state: dict[str, Any]) -> None:
        """Keep a weight before the average takes its place."""

    def _take_back(self, p: Tensor, state: dict[str, Any]) -> None:
        """Give a weight its place again."""
        raise NotImplementedError  # by both


class WeightAverage(_Layer):
    r"""An exponential or uniform mean of an optimizer's weights; the equations are in this module's docstring.

    It stands beside the optimizer and is updated by its steps. The average is float32 (float64 for float64 weights) and
    stands in `optimizer.state[p]["average"]`, so that the optimizer's checkpoints hold it; make it before one is
    loaded. A sharded parameter's is sharded like it. A weight whose gradients begin late counts before as it was. A
    checkpoint that is written in mode "eval" holds the other weights, too; through torch.distributed.checkpoint write
    it in mode "train". A copy of the optimizer alone has the averages and no hooks: make another `WeightAverage` for
    it. A copy of both goes on by itself.

    Args:
        optimizer: any torch optimizer.
        decay: d, in [0, 1]; the mean reaches back over about 1 / (1 - d) steps, over all of them with 1.
        start: how many steps come before the first that is averaged, >= 0.

    Raises:
        TypeError: `optimizer` is none.
        ValueError: a value out of its range, or an optimizer that has an average.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([w], lr=1.0)
        >>> average = WeightAverage(optimizer, decay=1.0)
        >>> for _ in range(3):
        ...     w.grad = torch.tensor([-1.0, 2.0])
        ...     optimizer.step()
        >>> average.eval()
        >>> w.tolist()  # the mean of 1, 2, 3
        [2.0, -4.0]
        >>> average.train()
        >>> w.tolist()
        [3.0, -6.0]
    """

    count = "averaged_steps"

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float = 0.999, start: int = 0) -> None:
        if not SHARE.holds(decay):
            raise ValueError(f"WeightAverage: decay={decay!r} is not allowed; give a number in [0, 1]")
        if not WHOLE.holds(start):
            raise ValueError(f"WeightAverage: start={start!r} is not allowed; give a number of steps >= 0")
        self.decay, self.start = decay, start
        super().__init__(optimizer)

    def _share(self, group: dict[str, Any]) -> float:
        group[self.count] = group.get(self.count, 0) + 1
        k = group[self.count] - self.start
        return 1.0 if k <= 1 else 1 / k if self.decay == 1 else (1 - self.decay) / (1 - self.decay**k)

    def _set_aside(self, p: Tensor, state: dict[str, Any]) -> None:
        state["trained_weight"] = p.detach().clone()

    def _take_back(self, p: Tensor, state: dict[str, Any]) -> None:
        local_of(p).copy_(local_of(state.pop("trained_weight")))

    def _before_loading(self, _: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
        super()._before_loading(_, saved)
        groups = (group for group in saved.get("param_groups", ()) if group.get(MODE) == "eval")
        for state in (saved["state"].get(i, {}) for group in groups for i in group["params"]):
            average, trained = state.get("average"), state.get("trained_weight")
            if average is not None and (trained is None or is_dtensor(trained) != is_dtensor(average)):
                raise ValueError(
                    "WeightAverage: the checkpoint was written in mode 'eval', and the weights that the model was "
                    "trained at were not read with it: torch.distributed.checkpoint reads what the optimizer here has. "
                    "Let it take one step (with gradients of zero) and call eval() before you ask for the state into "
                    "which the checkpoint is read; or write checkpoints in mode 'train'. Nothing has changed"
                )


class ScheduleFree(_Layer):
    r"""Schedule-free training with any optimizer; the equations are in this module's docstring.

    Give the optimizer no momentum of its own (betas of (0, 0.999), momentum 0): `beta` is in its place. Its learning
    rate warms up and stays; nothing decays it. Call `train()` and `eval()` as on the model, before training and
    before evaluating or saving the model; a step that raises leaves the model at z, until `train()` is called. z and x
    stand in `optimizer.state[p]` as "z" and "average"; weights that somebody else changes come back from them.

    Args:
        optimizer: any torch optimizer.
        beta: share of the average in the weights that are trained at, in [0, 1).

    Raises:
        TypeError: `optimizer` is none.
        ValueError: a value out of its range, or an optimizer that has an average.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([w], lr=1.0)
        >>> free = ScheduleFree(optimizer, beta=0.5)
        >>> for _ in range(2):
        ...     w.grad = torch.tensor([-1.0])
        ...     optimizer.step()
        >>> w.tolist()  # z is 2, the average of 1 and 2 is 1.5
        [1.75]
        >>> free.eval()
        >>> w.tolist()
        [1.5]
    """

    count = "lr_squares"

    def __init__(self, optimizer: torch.optim.Optimizer, beta: float = 0.9) -> None:
        if not FRACTION.holds(beta):
            raise ValueError(f"ScheduleFree: beta={beta!r} is not allowed; give a number in [0, 1)")
        self.beta = beta
        super().__init__(optimizer)

    @undisturbed
    @torch.no_grad()
    def train(self) -> None:
        """Give the model the weights that it is trained at, bit for bit; also where a step has raised."""
        self._gather_anew()
        for group in self.optimizer.param_groups:
            for state, p in self._averaged(group):
                if "z" in state:
                    self._take_back(p, state)
            if MODE in group:
                group[MODE] = "train"

    @eager
    @undisturbed
    @torch.no_grad()
    def _before(self, _: torch.optim.Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        super()._before(_, args, kwargs)
        if _closure(args, kwargs):
            raise RuntimeError(
                "ScheduleFree: step(closure) would evaluate the model at z, not where it is trained; call the closure "
                "yourself, and step() afterwards. Nothing has moved"
            )
        for p in self._parameters():  # the optimizer moves z; a copy in the parameter's own precision
            if "z" in self.optimizer.state.get(p, {}):
                local_of(p).copy_(local_of(self.optimizer.state[p]["z"]))

    def _share(self, group: dict[str, Any]) -> float:
        weight = float(group["lr"]) ** 2
        group[self.count] = group.get(self.count, 0.0) + weight
        return weight / group[self.count] if weight else 0.0

    def _follow(self, p: Tensor, state: dict[str, Any]) -> None:
        if "z" not in state:
            state["z"] = torch.empty_like(p, requires_grad=False)
        local_of(state["z"]).copy_(local_of(p))
        self._take_back(p, state)

    def _take_back(self, p: Tensor, state: dict[str, Any]) -> None:
        average = local_of(state["average"])
        local_of(p).copy_(local_of(state["z"]).to(average.dtype).lerp(average, self.beta))
