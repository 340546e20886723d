r"""Clipping of gradients by the norm of those that follow one rule.

Muon's update is as long as its learning rate says, however large a gradient is. A global norm that hidden matrices
dominate shrinks the gradients of everything else for nothing. With the policy "rule" the parameters of each rule, k,
have a norm of their own:

.. math::
    G_p \leftarrow G_p \min\Bigl(1, \frac{c}{n_k + 10^{-6}}\Bigr), \qquad n_k^2 = \sum_{p \in k} \lVert G_p \rVert_F^2

and with "global" all have one, as with `torch.nn.utils.clip_grad_norm_`. What orthogonalizes is clipped too: its
momentum is an average in which a large gradient would stay for tens of steps.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from emerging_optimizers.distributed.dtensor import is_dtensor, local_of
from emerging_optimizers.engine import RuleOptimizer
from emerging_optimizers.engine.validate import place

ClipPolicyT = Literal["global", "rule"]


@torch.no_grad()
def clip_gradients(
    optimizer: RuleOptimizer,
    max_norm: float,
    policy: ClipPolicyT = "global",
    *,
    error_if_nonfinite: bool = False,
) -> dict[str, Tensor]:
    """Scale gradients in place so that their norms are at most `max_norm`; call it between backward and step.

    It reads nothing on the host. Gradients whose common norm is not finite stay as they are: the optimizer then leaves
    out the matrix that has them, and no other. Norms are of whole gradients, also where they are sharded (DTensor).

    Args:
        optimizer: of this library, or of `create_optimizer`.
        max_norm: largest norm, >= 0, in the unit of the gradient; infinity: measure alone.
        policy: "global", one norm of all gradients; "rule", one of the gradients of each rule.
        error_if_nonfinite: raise where a norm is not finite, for which the host waits for the device.

    Returns:
        The norms before: under "all", or under the class of each rule, "Muon" and "AdamW" say. Zero where no parameter
        has a gradient.

    Raises:
        TypeError: an optimizer that is not of this library.
        ValueError: a `max_norm` or a policy that is not allowed, or a sparse gradient; it names the parameter.
        RuntimeError: a norm that is not finite, with `error_if_nonfinite`. No gradient has changed then.

    Example:
        >>> from emerging_optimizers import AdamW
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = AdamW([w], lr=0.1)
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> clip_gradients(optimizer, 1.0)
        {'all': tensor(5.)}
        >>> w.grad
        tensor([0.6000, 0.8000])
    """
    if not isinstance(optimizer, RuleOptimizer):
        raise TypeError(
            f"optimizer: {type(optimizer).__name__} is not an optimizer of emerging_optimizers; use "
            "torch.nn.utils.clip_grad_norm_"
        )
    if isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)) or not max_norm >= 0:
        raise ValueError(f"max_norm={max_norm!r} is not a number >= 0; give 1.0 say")
    if policy not in get_args(ClipPolicyT):
        raise ValueError(f"policy={policy!r} is not one of {', '.join(map(repr, get_args(ClipPolicyT)))}")
    kinds: dict[str, list[Tensor]] = {}
    for index, group in enumerate(optimizer.param_groups):
        kind = "all" if policy == "global" else optimizer._algorithm(group).__name__
        kinds.setdefault(kind, []).extend(_gradients(group, index))
    norms = {kind: _norm(grads) for kind, grads in kinds.items()}
    if error_if_nonfinite:
        for kind, norm in norms.items():
            if not norm.isfinite():
                raise RuntimeError(
                    f"the norm of the gradients ({kind}) is {norm.item()}; leave error_if_nonfinite out, and the "
                    "optimizer leaves out those matrices alone"
                )
    if math.isfinite(max_norm):
        for kind, grads in kinds.items():
            _scale(grads, norms[kind], max_norm)
    return norms


def _gradients(group: dict[str, Any], index: int) -> Iterable[Tensor]:
    for i, p in enumerate(group["params"]):
        if p.grad is None:
            continue
        if p.grad.layout != torch.strided:
            raise ValueError(
                f"the gradient of {place(group, index, i)} is sparse, and no optimizer here takes that; make it dense"
            )
        yield p.grad


def _alike(grads: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Gradients that one call can take: of one dtype and device, on one mesh."""
    found: dict[Any, list[Tensor]] = {}
    for grad in grads:
        found.setdefault((grad.dtype, grad.device, getattr(grad, "device_mesh", None)), []).append(grad)
    return found.values()


def _norm(grads: list[Tensor]) -> Tensor:
    """The norm of all together, on the device of the first, in float32 at least."""
    parts = []
    for some in _alike(grads):
        wide = torch.promote_types(some[0].dtype, torch.float32)
        if is_dtensor(some[0]):
            norm: Any = torch.nn.utils.get_total_norm([grad.to(wide) for grad in some])
            norm = norm.full_tensor()
        else:
            norm = torch.stack([*torch._foreach_norm(some, 2, dtype=wide)]).norm()
        parts.append(norm.to(grads[0].device))
    return _together(parts) if parts else torch.tensor(0.0)


def _together(parts: list[Tensor]) -> Tensor:
    wide = max((x.dtype for x in parts), key=lambda dtype: dtype.itemsize)
    return torch.stack([x.to(wide) for x in parts]).norm()


def _scale(grads: list[Tensor], norm: Tensor, max_norm: float) -> None:
    factor = torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)
    for some in _alike(grads):
        torch._foreach_mul_([local_of(grad) for grad in some], factor.to(some[0].device))
