"""What a model does with each of its parameters in one call, which computes nothing where that can be avoided."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

# What a parameter is multiplied with as a matrix, by the names of torch's functions.
_LAYERS = {
    *("linear", "bilinear", "lstm", "gru", "rnn_tanh", "rnn_relu", "multi_head_attention_forward"),
    *("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
}
_PRODUCTS = _LAYERS | {
    *("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "addmv", "baddbmm", "einsum", "tensordot"),
    "_grouped_mm",
}
_BATCHES = {"bmm", "baddbmm", "matmul", "__matmul__", "__rmatmul__", "_grouped_mm"}
_LOOKUPS = frozenset(["embedding", "embedding_bag"])


@dataclass
class Uses:
    """What was seen in a call.

    Attributes:
        products: parameters that something is multiplied with, as a matrix or a filter.
        stacks: those of them that are a batch of matrices, one for each part of what they are multiplied with.
        lookups: tables of which rows are taken by their number.
        others: parameters that are added, multiplied element by element, compared, ...
        followed: products whose result reaches another product.
        leaving: products whose result leaves the model.
    """

    products: set[str] = field(default_factory=set)
    stacks: set[str] = field(default_factory=set)
    lookups: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)
    followed: set[str] = field(default_factory=set)
    leaving: set[str] = field(default_factory=set)

    @property
    def heads(self) -> set[str]:
        """Products whose result leaves the model and reaches no other product."""
        return self.leaving - self.followed


class _Watch(TorchFunctionMode):
    """Notes on tensors from which product they come, or of which parameter they are a form."""

    def __init__(self, uses: Uses) -> None:
        super().__init__()
        self.uses = uses

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        called = getattr(func, "__name__", "")
        made = [x for x in tree_leaves(args[0] if called == "__setitem__" else out) if isinstance(x, Tensor)]
        if not made:
            return out
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        weights = {name for x in given for name in _form_of(x)}
        if called in _LAYERS and isinstance(args[0], Tensor):  # what goes through a layer is no weight of it
            self.uses.others |= {*_form_of(args[0])}
            weights -= {*_form_of(args[0])}
        sources = {name for x in given for name in _sources(x)}
        if not weights:
            _note(made, sources=sources)
        elif called in _PRODUCTS:
            self.uses.products |= weights
            if called in _BATCHES or (called == "einsum" and _goes_through(args)):
                self.uses.stacks |= {name for x in given if x.ndim == 3 for name in _form_of(x)}
            self.uses.followed |= sources
            _note(made, sources=weights)
        elif called in _LOOKUPS:
            self.uses.lookups |= weights
            _note(made)
        elif len(weights) == 1 and all(map(_form_of, given)):
            _note(made, form=weights)  # turned, cut or cast: still this parameter
        else:
            self.uses.others |= weights
            _note(made, sources=sources)
        return out


def _goes_through(args: Sequence[Any]) -> bool:
    """Whether an einsum of two operands has an index that all three have: that of a batch."""
    operands, _, out = str(args[0]).replace(" ", "").partition("->")
    first, _, second = operands.partition(",")
    return bool(set(first) & set(second) & set(out) - {"."})


def _form_of(x: Tensor) -> Iterable[str]:
    return getattr(x, "_form_of", ())


def _sources(x: Tensor) -> Iterable[str]:
    return getattr(x, "_sources", ())


def _note(tensors: Iterable[Tensor], *, sources: Iterable[str] = (), form: Iterable[str] = ()) -> None:
    for x in tensors:
        x._sources, x._form_of = frozenset(sources) | frozenset(_sources(x)), frozenset(form)  # type: ignore[attr-defined]  # notes of our own on a tensor


def trace(model: nn.Module, example: Any) -> Uses:
    """Call a model once and say what it does with its parameters; nothing of the model is changed.

    The call is made on the meta device, where tensors hold no numbers and nothing is computed. Where what is done hangs
    on values (experts that a token chooses, say), the call is made for real, without gradients, if the model is.

    Args:
        model: any module, on any device.
        example: what it is called with: a tensor, a tuple of arguments, or a mapping of keyword arguments.

    Raises:
        ValueError: the call fails.
    """
    args, kwargs = ((), example) if isinstance(example, Mapping) else (example, {})
    args = args if isinstance(args, (tuple, list)) else (args,)
    given = (tuple(args), dict(kwargs))
    try:
        return _call(model, given, meta=True)
    except Exception as wrong:  # whatever a model does where there are no values
        failed = wrong
    if not any(p.is_meta for p in model.parameters()):
        try:
            return _call(model, given, meta=False)
        except Exception as wrong:  # whatever a model does with a wrong example
            failed = wrong
    raise ValueError(
        f"example: the model cannot be called with it ({type(failed).__name__}: {failed}). Give what the model takes "
        "(a tensor, a tuple of arguments, or a dict of keyword arguments), or leave it out"
    ) from failed


def _call(model: nn.Module, given: tuple[tuple[Any, ...], dict[str, Any]], *, meta: bool) -> Uses:
    """One call on the meta device, or for real with copies of whatever a model may write."""

    def copied(x: Tensor) -> Tensor:
        return x.detach().to("meta") if meta else x.detach().clone()

    args, kwargs = tree_map_only(Tensor, copied, given)
    tensors = {name: copied(b) for name, b in model.named_buffers()}
    for name, p in model.named_parameters():
        tensors[name] = copied(p) if meta else p.detach()  # a call only reads them
        _note([tensors[name]], form=[name])
    device = torch.device("meta") if meta else nullcontext()
    uses = Uses()
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), device, _Watch(uses):
            out = functional_call(model, tensors, args, kwargs, tie_weights=True)
    finally:
        for module, training in modes.items():
            module.training = training
    uses.leaving = {name for x in tree_leaves(_opened(out)) if isinstance(x, Tensor) for name in _sources(x)}
    return uses


def _opened(out: Any) -> Any:
    """An output with its tensors where `tree_leaves` finds them, also in a dataclass."""
    return (
        dict(out)
        if isinstance(out, Mapping)
        else vars(out)
        if hasattr(out, "__dict__") and not isinstance(out, Tensor)
        else out
    )
