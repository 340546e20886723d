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

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from emerging_optimizers.distributed.dtensor import local_of
from emerging_optimizers.engine.options import FRACTION, SHARE, WHOLE

ModeT = Literal["train", "eval"]


class _Layer:
    """Entries beside an optimizer's own in its state, which its checkpoints hold, and weights that can be exchanged.

    Args:
        optimizer: any torch optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer is a {type(optimizer).__name__}; give the torch optimizer that moves the weights"
            )
        self.optimizer = optimizer
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)
        self._loading: list[Any] = []
        optimizer.register_load_state_dict_pre_hook(self._before_loading)
        optimizer.register_load_state_dict_post_hook(self._after_loading)

    @property
    def mode(self) -> ModeT:
        """Which weights the model has: "train" those that it is trained at, "eval" the average."""
        return (
            "eval" if any("trained_weight" in self.optimizer.state.get(p, {}) for p in self._parameters()) else "train"
        )

    @torch.no_grad()
    def eval(self) -> None:
        """Give the model the average; before the first step there is none, and nothing changes."""
        for p in self._parameters():
            state = self.optimizer.state.get(p, {})
            if "average" in state and "trained_weight" not in state:
                state["trained_weight"] = p.detach().clone()
                local_of(p).copy_(local_of(state["average"]))

    @torch.no_grad()
    def train(self) -> None:
        """Give the model the weights that it is trained at, bit for bit."""
        for p in self._parameters():
            if "trained_weight" in self.optimizer.state.get(p, {}):
                local_of(p).copy_(local_of(self.optimizer.state[p].pop("trained_weight")))

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def _before(self, *_: Any) -> None:
        if self.mode == "eval":
            raise RuntimeError(
                f"{type(self).__name__}: the model has its averaged weights, and a step belongs to those that it is "
                "trained at; call train() before the step. Nothing has moved"
            )

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        for group in self.optimizer.param_groups:
            share = self._share(group)
            for p in group["params"]:
                known = self.optimizer.state.get(p, {})
                if "average" not in known and p.grad is None:  # an entry would tell the optimizer that it has state
                    continue
                state: dict[str, Any] = self.optimizer.state[p]
                if "average" not in state:
                    state["average"] = p.detach().to(
                        torch.float64 if p.dtype == torch.float64 else torch.float32, copy=True
                    )
                average = local_of(state["average"])
                average.lerp_(local_of(p.detach()).to(average.dtype), share)
                self._follow(p, state)

    def _before_loading(self, _: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
        """Keep the averages of a checkpoint as they are: torch's optimizers round them to the parameters' dtype."""
        ids = (i for group in saved.get("param_groups", ()) for i in group.get("params", ()))
        self._loading = [saved.get("state", {}).get(i, {}).get("average") for i in ids]

    def _after_loading(self, _: torch.optim.Optimizer) -> None:
        for p, average in zip(self._parameters(), self._loading, strict=True):
            if average is not None and self.optimizer.state[p]["average"].dtype != average.dtype:
                self.optimizer.state[p]["average"] = average.detach().to(p.device, copy=True)
        self._loading = []

    def _share(self, group: dict[str, Any]) -> float:
        """By how much of the way the averages of a group move to its weights in this step."""
        raise NotImplementedError  # by both

    def _follow(self, p: Tensor, state: dict[str, Any]) -> None:
        """What becomes of a weight after its average."""


class WeightAverage(_Layer):
    r"""An exponential or uniform mean of an optimizer's weights; the equations are in this module's docstring.

    It stands beside the optimizer and is updated by its steps. The average is float32 (float64 for float64 weights) and
    stands in `optimizer.state[p]["average"]`, so that the optimizer's checkpoints hold it; make it before one is
    loaded. A sharded parameter's is sharded like it. A checkpoint that is written in mode "eval" holds the other
    weights, too. A copy of the optimizer has the averages and no hooks: make another `WeightAverage` for it.

    Args:
        optimizer: any torch optimizer.
        decay: d, in [0, 1]; the mean reaches back over about 1 / (1 - d) steps, over all of them with 1.
        start: how many steps come before the first that is averaged, >= 0.

    Raises:
        TypeError: `optimizer` is none.
        ValueError: a value out of its range.

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

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float = 0.999, start: int = 0) -> None:
        if not SHARE.holds(decay):
            raise ValueError(f"WeightAverage: decay={decay!r} is not allowed; give a number in [0, 1]")
        if not WHOLE.holds(start):
            raise ValueError(f"WeightAverage: start={start!r} is not allowed; give a number of steps >= 0")
        self.decay, self.start = decay, start
        super().__init__(optimizer)

    def _share(self, group: dict[str, Any]) -> float:
        group["averaged_steps"] = group.get("averaged_steps", 0) + 1
        k = group["averaged_steps"] - self.start
        return 1.0 if k <= 1 else 1 / k if self.decay == 1 else (1 - self.decay) / (1 - self.decay**k)


class ScheduleFree(_Layer):
    r"""Schedule-free training with any optimizer; the equations are in this module's docstring.

    Give the optimizer no momentum of its own (betas of (0, 0.999), momentum 0): `beta` is in its place. Its learning
    rate warms up and stays; nothing decays it. Call `train()` and `eval()` as on the model, before training and
    before evaluating or saving the model; a step that raises leaves the model at z, until `train()` is called. z and x
    stand in `optimizer.state[p]` as "z" and "average".

    Args:
        optimizer: any torch optimizer.
        beta: share of the average in the weights that are trained at, in [0, 1).

    Raises:
        TypeError: `optimizer` is none.
        ValueError: a value out of its range.

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

    def __init__(self, optimizer: torch.optim.Optimizer, beta: float = 0.9) -> None:
        if not FRACTION.holds(beta):
            raise ValueError(f"ScheduleFree: beta={beta!r} is not allowed; give a number in [0, 1)")
        self.beta = beta
        super().__init__(optimizer)

    @torch.no_grad()
    def train(self) -> None:
        """Give the model the weights that it is trained at, bit for bit; also where a step has raised."""
        super().train()
        for p in self._parameters():
            if "z" in (state := self.optimizer.state.get(p, {})):
                self._train_at(p, state)

    @torch.no_grad()
    def _before(self, *called: Any) -> None:
        super()._before()
        _, args, kwargs = called
        if kwargs.get("closure") is not None or any(x is not None for x in args[1:]):
            raise RuntimeError(
                "ScheduleFree: step(closure) would evaluate the model at z, not where it is trained; call the closure "
                "yourself, and step() afterwards. Nothing has moved"
            )
        for p in self._parameters():  # the optimizer moves z; a copy in the parameter's own precision
            if "z" in self.optimizer.state.get(p, {}):
                local_of(p).copy_(local_of(self.optimizer.state[p]["z"]))

    def _share(self, group: dict[str, Any]) -> float:
        weight = float(group["lr"]) ** 2
        group["lr_squares"] = group.get("lr_squares", 0.0) + weight
        return weight / group["lr_squares"] if weight else 0.0

    def _follow(self, p: Tensor, state: dict[str, Any]) -> None:
        local_of(state.setdefault("z", p.detach().clone())).copy_(local_of(p))
        self._train_at(p, state)

    def _train_at(self, p: Tensor, state: dict[str, Any]) -> None:
        average = local_of(state["average"])
        local_of(p).copy_(local_of(state["z"]).to(average.dtype).lerp(average, self.beta))
