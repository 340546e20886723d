"""Where an average of gradients stands in an optimizer's state, and how much of it the newest gradient is."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Average(NamedTuple):
    """An average of gradients in a state.

    Attributes:
        key: in the checkpoint.
        weight: by a group, with which the newest gradient entered it.
        rotated: it stands in the eigenbases Q_L, Q_R.
    """

    key: str
    weight: Callable[[Mapping[str, Any]], Any]
    rotated: bool = False


def _beta(group: Mapping[str, Any]) -> Any:
    return 1 - group["betas"][0]


def _momentum(group: Mapping[str, Any]) -> Any:
    return 1 - group["momentum"]


def _sum(group: Mapping[str, Any]) -> Any:
    return 1.0


# By the class's name, or that of the first of its bases that is here. None: what it averages is not the gradient, but
# one that was divided by its size first (LaProp), squared (RMSProp), or taken by parts of the weight (Muown, Iso,
# Spectron); or it is the whole matrix's, of which this process has a shard (TpRekls).
MOMENTUM: Mapping[str, Average | None] = {
    "AdEMAMix": Average("exp_avg_fast", _beta),
    "Adam": Average("exp_avg", _beta),
    "AdamW": Average("exp_avg", _beta),
    "Iso": None,
    "KLShampoo": Average("exp_avg", _momentum),
    "LaProp": None,
    "Lion": Average("exp_avg", lambda group: 1 - group["betas"][1]),
    "MAdam": Average("exp_avg", _beta),
    "MOSO": Average("momentum_buffer", _momentum),
    "Muon": Average("momentum_buffer", _momentum),
    "Muown": None,
    "ObliqueAdam": Average("exp_avg", _beta),
    "ObliqueSGD": Average("momentum_buffer", _sum),
    "OrthogonalizedOptimizer": Average("momentum_buffer", _momentum),
    "PSGDPro": Average("exp_avg", _momentum),
    "RMSProp": None,
    "SGD": Average("momentum_buffer", lambda group: 1 - group["dampening"]),
    "SOAP": Average("exp_avg", _beta, rotated=True),
    "SOAPMuon": Average("exp_avg", _beta, rotated=True),
    "Shampoo": Average("exp_avg", _momentum),
    "Signum": Average("exp_avg", _momentum),
    "SimplifiedAdEMAMix": Average("exp_avg", _sum),
    "Spectron": None,
    "TpRekls": None,
}


def momentum_of(cls: type) -> Average | None:
    """The entry of `MOMENTUM` for a class of optimizers."""
    return next((MOMENTUM[c.__name__] for c in cls.__mro__ if c.__name__ in MOMENTUM), None)
