r"""QK-Clip: where an attention logit gets too large, its head's query and key projections are scaled down.

.. math:: S_h = \max_{i, j} s \langle q_i^h, k_j^h \rangle, \qquad \gamma_h = \min(1, \tau / S_h), \qquad
   W_q^h \leftarrow \gamma_h^{\alpha} W_q^h, \quad W_k^h \leftarrow \gamma_h^{1 - \alpha} W_k^h

after each step of the optimizer, with s the scale of the logits and the maximum over everything that the step's forward
passes saw. Of shared keys, and of latent attention, see `attention.py`; how logits are seen, `logits.py`; which modules
are attention, `heads.py`.

References:
    Kimi Team 2025, Kimi K2: Open Agentic Intelligence, arXiv 2507.20534 (MuonClip, algorithm 1).
"""

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from emerging_optimizers.distributed.groups import Peers
from emerging_optimizers.engine import RuleOptimizer
from emerging_optimizers.engine.ambient import eager
from emerging_optimizers.engine.capture import is_capturing
from emerging_optimizers.engine.options import COUNT, POSITIVE, SHARE, WHOLE, optional
from emerging_optimizers.engine.validate import check_group, suggest
from emerging_optimizers.qk_clip.attention import Attention
from emerging_optimizers.qk_clip.heads import Heads, find, in_words
from emerging_optimizers.qk_clip.logits import Sight

# Optimizers that set a weight's size by themselves.
UNDOES = {
    "Iso": "keeps its singular values in its state",
    "Muown": "keeps the norms of its rows in its state",
    "ObliqueAdam": "keeps its rows or columns at unit norm",
    "ObliqueSGD": "keeps its rows or columns at unit norm",
    "SinkhornMuon": "keeps the sums of its rows and columns",
    "Spel": "keeps it orthogonal",
}


class QKClip:
    """Keeps the attention logits of a model at a threshold, by scaling the projections of the heads that exceed it.

    Stands beside any optimizer: `attach` has it run after each of its steps. The momentum and all other state of the
    optimizer stay as they are, as in Kimi K2. A head that exceeds is scaled so that the logits of the step's own
    batch would just reach the threshold; heads that do not keep their weights bit for bit.

    The logits are seen where a module in training mode calls torch's `scaled_dot_product_attention`, a softmax over
    (B, H, S, T), or is an `nn.MultiheadAttention`; for the first and the last the products of queries and keys are
    computed once more, in pieces and without gradients. Masked ones do not count. Attention kernels of other libraries
    show nothing: with `measure=False` you give the maxima that they return.

    Args:
        model: whose attention modules are found (`heads.LOOKED_FOR`). A module that normalises queries or keys has
            nothing to clip; it is left alone, with a warning.
        threshold: tau, > 0. 100 in Kimi K2.
        alpha: the queries' share of the scaling, in [0, 1].
        every: look and clip in every so many steps, >= 1. What exceeds in between stays.
        rows: how many sequences of each batch are looked at, >= 1, from the first on; None: all.
        heads: how many query heads, where modules do not say it.
        projections: `Heads` by the path of a module, or a pattern of paths; then no module is looked for.
        measure: False: nothing is looked at, and all values come through `observe`.
        group: the processes whose maxima count together: all that have the same weights, or shards of them. None: all.

    Attributes:
        steps: how many steps were done.
        skipped: modules that look like attention and are left alone, with the reason.

    Raises:
        TypeError: `model` is no module, or `projections` no dictionary of `Heads`.
        ValueError: an argument out of its range, or no attention module.

    Example:
        >>> from emerging_optimizers import Muon, QKClip
        >>> _ = torch.manual_seed(0)
        >>> attention = nn.MultiheadAttention(8, 2, bias=False)
        >>> optimizer = Muon([attention.in_proj_weight], lr=0.1, matrix_view=("split", 8, 8, 8))
        >>> clip = QKClip(attention, threshold=1.0)
        >>> clip.attach(optimizer)
        >>> x = torch.randn(5, 3, 8)
        >>> attention(4 * x, 4 * x, x)[0].square().mean().backward()
        >>> optimizer.step()
        >>> clip.events()
        {'': [1, 1]}
    """

    def __init__(
        self,
        model: nn.Module,
        threshold: float = 100.0,
        alpha: float = 0.5,
        *,
        every: int = 1,
        rows: int | None = None,
        heads: int | None = None,
        projections: Mapping[str, Heads] | None = None,
        measure: bool = True,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        given = {"threshold": threshold, "alpha": alpha, "every": every, "rows": rows, "heads": heads}
        checks = {"threshold": POSITIVE, "alpha": SHARE, "every": COUNT}
        check_group("QKClip", "its arguments", given, {**checks, **dict.fromkeys(("rows", "heads"), optional(COUNT))})
        self.threshold, self.alpha, self.every, self.group = threshold, alpha, every, group
        self.steps = 0
        if not isinstance(model, nn.Module):
            raise TypeError(f"QKClip: model is a {type(model).__name__}; give the module whose attention is clipped")
        found, self.skipped = find(model, projections, heads)
        self._attentions = {attention.name: attention for attention in found}
        for line in in_words(self.skipped):
            warnings.warn(f"QKClip leaves modules alone: {line}", stacklevel=2)
        self._model = model
        self._peers: Peers | None = None
        self._handles: list[Any] = []
        self._attached: torch.optim.Optimizer | None = None
        self._sight = Sight(rows)
        for attention in found if measure else []:
            before, after = _Hook(self, attention, "_enter"), _Hook(self, attention, "_leave")
            self._handles += [
                attention.module.register_forward_pre_hook(before),
                attention.module.register_forward_hook(after, always_call=True),
            ]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuses copies and pickles.

        Raises:
            TypeError: always; the hooks of a copied model and optimizer are gone, and a copy would never see a logit.
        """
        raise TypeError(
            "QKClip: it belongs to its model and optimizer and is not copied with them; make another one for the copy, "
            "attach it, and give it load_state_dict(clip.state_dict())"
        )

    def __repr__(self) -> str:
        names = ", ".join(f"{a.name}: {a.heads} over {a.key_heads}" for a in self._attentions.values())
        return f"QKClip(threshold={self.threshold}, alpha={self.alpha}, query heads over key heads: {names})"

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip after each of an optimizer's steps; of several optimizers, name the one with the query projections.

        Raises:
            TypeError: `optimizer` is none.
            ValueError: it is attached already, or the optimizer would undo the clipping of a query or key projection in
                its next step.
        """
        if not (isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "_optimizer_step_post_hooks")):
            raise TypeError(
                f"QKClip: optimizer is a {type(optimizer).__name__}; give the torch optimizer that moves the weights, "
                "not what wraps it"
            )
        if self._attached is not None:
            name = type(self._attached).__name__
            raise ValueError(
                f"QKClip: it runs after the steps of a {name} already, and would clip twice; of several optimizers, "
                "attach the one with the query projections; for another one, close() this one and make a new one"
            )
        if isinstance(optimizer, RuleOptimizer):
            self._check(optimizer)
        handle = optimizer.register_step_post_hook(lambda *_: self.step())
        # First of all, so that averages of the weights follow what was clipped.
        hooks = cast(OrderedDict[int, Any], optimizer._optimizer_step_post_hooks)
        hooks.move_to_end(handle.id, last=False)
        self._handles.append(handle)
        self._attached = optimizer

    def _check(self, optimizer: RuleOptimizer) -> None:
        names = {id(rows.parameter): rows.name for a in self._attentions.values() for rows in a.rows}
        for group in optimizer.param_groups:
            algorithm = optimizer._algorithm(group)
            why = next((UNDOES[cls.__name__] for cls in algorithm.__mro__ if cls.__name__ in UNDOES), None)
            name = next((names[id(p)] for p in group["params"] if id(p) in names), None)
            if why is not None and name is not None:
                raise ValueError(
                    f"QKClip: {algorithm.__name__} has {name} and {why}, so its next step would undo the clipping; "
                    "give query and key projections to another optimizer (create_optimizer(..., overrides=...))"
                )

    def close(self) -> None:
        """Look at nothing and clip nothing any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._sight.close()

    # ---- what is seen -----------------------------------------------------------------------------------------------

    def observe(self, module: str | nn.Module, maxima_H: Tensor | Sequence[float]) -> None:
        """Give the largest logits of a module; those of several calls before a step count together.

        Args:
            module: an attention module, or its path in the model.
            maxima_H: the largest logit of each query head, scale included; of the heads that this process works on,
                where tensor parallelism gives it some of them.

        Raises:
            TypeError: `maxima_H` are no numbers.
            ValueError: no such attention module, or another number of heads.
        """
        if isinstance(module, nn.Module):
            name = next((a.name for a in self._attentions.values() if a.module is module), type(module).__name__)
        else:
            name = module
        if name not in self._attentions:
            raise ValueError(
                f"QKClip: {name!r} is no attention module{suggest(name, self._attentions)}; known are "
                f"{', '.join(a.called for a in self._attentions.values())}"
            )
        try:
            maxima_H = torch.as_tensor(maxima_H)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"QKClip: maxima_H={maxima_H!r} is not allowed; give a number for each query head, or a tensor of them"
            ) from None
        self._attentions[name].record(maxima_H.flatten())

    def _enter(self, attention: Attention) -> None:
        if self._sight.inside and not attention.name.startswith(self._sight.inside[-1].name):
            self._sight.close()  # an interrupt has ended that call, of which no hook is told
        # An activation checkpoint calls modules once more in the backward pass.
        if attention.module.training and torch._C._current_graph_task_id() == -1 and self._is_due(self.steps + 1):
            attention.looks = 0
            self._sight.enter(attention)

    def _leave(self, attention: Attention, output: Any) -> None:
        if not self._sight.inside or self._sight.inside[-1] is not attention:
            return
        self._sight.leave()
        if output is not None and not attention.looks:  # None: it has raised an error of its own
            raise ValueError(
                f"QKClip: {attention.called} has called neither torch's scaled_dot_product_attention nor a softmax "
                "over (B, H, S, T), so its logits are not seen; use measure=False and give the largest logit of "
                "each head with observe(), or another implementation of attention"
            )

    def _is_due(self, step: int) -> bool:
        return step % self.every == 0

    # ---- a step -----------------------------------------------------------------------------------------------------

    @eager
    @torch.no_grad()
    def step(self) -> None:
        """Clip what was seen since the last step; after `optimizer.step()`, where `attach` was not called.

        Raises:
            RuntimeError: a CUDA graph is being recorded.
            ValueError: nothing was seen, or a parameter has another shape than it had.
        """
        if is_capturing():
            raise RuntimeError(
                "QKClip: this step is recorded in a CUDA graph, which would repeat it without counting; call step() "
                "outside of the graph, and observe() where the graph has the forward pass"
            )
        self.steps += 1
        self._sight.close()
        if not self._is_due(self.steps):
            for attention in self._attentions.values():
                attention.seen = None  # what observe() was told, of weights that have moved since
            return
        for module in self._model.modules():
            if isinstance(module, Gathers):
                module.reshard()  # else what is written into gathered weights would be lost
        attentions = [*self._attentions.values()]
        states = {} if self._attached is None else self._attached.state
        maxima = [attention.whole() for attention in attentions]
        seen = any(attention.seen is not None for attention in attentions)
        flat = torch.cat([x.to(maxima[0].device) for x in maxima])
        if (peers := self._same_everywhere()) is not None:
            flat = peers.largest(flat.masked_fill(flat.isnan(), torch.inf))  # else chance decides whether NaN is larger
        if not seen and flat.max() == -torch.inf:
            raise ValueError(
                "QKClip: no attention module has run in training mode since the last step, so no logit was seen; call "
                "step() after a forward pass, make QKClip before a model that is compiled runs for the first time, or "
                "give the largest logit of each head with observe()"
            )
        parts = torch.split(flat, [attention.heads for attention in attentions])
        for attention, maxima_H in zip(attentions, parts, strict=True):
            attention.clip(maxima_H.to(attention.device), self.threshold, self.alpha, states)
            attention.seen = None

    def _same_everywhere(self) -> Peers | None:
        """The processes whose maxima count together; None in a single one."""
        if self._peers is None and dist.is_initialized() and dist.get_world_size(self.group) > 1:
            peers = Peers(self.group or dist.distributed_c10d._get_default_group())
            said = peers.everyone([(a.name, a.heads) for a in self._attentions.values()])
            if any(other != said[0] for other in said):
                raise ValueError(
                    "QKClip: the processes have different attention modules; give as group= those that have the same "
                    "weights or shards of them, such as the processes of one stage of a pipeline"
                )
            self._peers = peers
        return self._peers

    # ---- what came of it ----------------------------------------------------------------------------------------

    def maxima(self) -> dict[str, list[float]]:
        """The largest logit of each head in the last step that looked, before clipping; waits for the device."""
        return {name: attention.latest_H.tolist() for name, attention in self._attentions.items()}

    def events(self) -> dict[str, list[int]]:
        """How often each head was clipped, of modules where one was; waits for the device."""
        return {name: a.clips_H.tolist() for name, a in self._attentions.items() if a.clips_H.any()}

    def state_dict(self) -> dict[str, Any]:
        """Steps, counts and last maxima, for a checkpoint; loads with `weights_only=True`."""
        return {
            "steps": self.steps,
            "maxima": {name: a.latest_H.clone() for name, a in self._attentions.items()},
            "clips": {name: a.clips_H.clone() for name, a in self._attentions.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the counts of a checkpoint.

        Raises:
            TypeError: it is no dictionary.
        ValueError: it is of other attention modules, or of something else; nothing has changed.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"QKClip: the checkpoint is a {type(state_dict).__name__}; give what state_dict() of a QKClip returned"
            )
        kinds = {"steps": WHOLE.holds, "maxima": _has_tensors, "clips": _has_tensors}
        if lacking := [key for key, fits in kinds.items() if not fits(state_dict.get(key))]:
            raise ValueError(
                f"QKClip: the checkpoint has no {', '.join(lacking)}; give what state_dict() of a QKClip returned"
            )
        here = {name: a.heads for name, a in self._attentions.items()}
        for part in ("maxima", "clips"):
            saved = {name: len(x) for name, x in state_dict[part].items()}
            if saved != here:
                raise ValueError(f"QKClip: the checkpoint has heads {saved}, and this model {here}")
        self.steps = state_dict["steps"]
        for name, attention in self._attentions.items():
            attention.latest_H = state_dict["maxima"][name].to(attention.device, copy=True)
            attention.clips_H = state_dict["clips"][name].to(attention.device, copy=True)


@runtime_checkable
class Gathers(Protocol):
    """FSDP2's modules, which keep gathered weights from a forward pass to the backward pass."""

    def unshard(self) -> Any: ...

    def reshard(self) -> None: ...


class _Hook:
    """Tells a `QKClip` of the calls of its module; a copy of the module, or a pickle, has one that does nothing."""

    def __init__(self, clip: QKClip, attention: Attention, method: str) -> None:
        self._clip, self._attention, self._method = weakref.ref(clip), attention, method

    @eager
    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        if (clip := self._clip()) is None:
            return
        if self._method == "_enter":
            clip._enter(self._attention)
        else:
            clip._leave(self._attention, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (_ignore,)


def _has_tensors(part: Any) -> bool:
    return isinstance(part, Mapping) and all(isinstance(x, Tensor) and x.ndim == 1 for x in part.values())


def _ignore(*_: Any) -> None:
    """Nothing."""
