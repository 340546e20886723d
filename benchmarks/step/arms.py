"""The implementations, as data. A new arm is one entry in `ARMS`; a new library also one in `PEERS`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from benchmarks.step.floors import Cost, Eigenbasis, NewtonSchulz, Traffic
from benchmarks.step.workloads import Family

Check = Literal["quintic", "simple", "polar_express", "adamw", "laprop", "lion", "float64", ""]
"""What the update is held against: a polynomial in float64 (its name in linalg/coefficients.py), a textbook rule in
float64, the same class one matrix at a time in float64; "": only that the step descends."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A library."""

    module: str
    distribution: str | None
    """Its name in a package index; None: a checkout, whose folder `--peer NAME=PATH` gives."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One implementation with its settings."""

    name: str
    family: Family
    peer: str
    make: str
    """module:class"""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """"@module:name" stands for that object, {"@": "module:name", **kwargs} for what it returns."""
    group: Mapping[str, Any] = field(default_factory=dict)
    """What the parameter group says besides, where a library asks for it."""
    setup: Mapping[str, Any] = field(default_factory=dict)
    """"module:name" -> value, set before the class is called."""
    cost: Cost
    against: str
    """The arm that it is compared with: the published one if it runs, else the fastest peer with the same word here."""
    check: Check = ""
    period: int = 1
    """Steps that make a whole cycle."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    slow: bool = False
    """Left out unless `--arm` names it."""


PEERS: dict[str, Peer] = {
    "ours": Peer(module="emerging_optimizers", distribution=None),
    "before": Peer(module="emerging_optimizers", distribution=None),
    "torch": Peer(module="torch", distribution="torch"),
    "published": Peer(module="emerging_optimizers", distribution=None),
    "pytorch_optimizer": Peer(module="pytorch_optimizer", distribution="pytorch-optimizer"),
    "heavyball": Peer(module="heavyball", distribution="heavyball"),
    "meta": Peer(module="distributed_shampoo", distribution=None),
    "dion": Peer(module="dion", distribution=None),
}

_BF16 = NewtonSchulz(rate="bfloat16")
_FP32 = NewtonSchulz(rate="float32")
_EAGER = {"heavyball.utils:compile_mode": None}
_META: dict[str, Any] = {
    "max_preconditioner_dim": 100_000,
    # Else it merges both sides of a small matrix into one, with a factor of (m n) x (m n).
    "distributed_config": {
        "@": "distributed_shampoo:SingleDeviceDistributedConfig",
        "target_parameter_dimensionality": 2,
    },
}

_MUON = (
    Arm(
        name="Muon",
        family="muon",
        peer="ours",
        make="emerging_optimizers.orthogonalized_optimizers.muon:Muon",
        cost=_BF16,
        against="published Muon",
        check="quintic",
    ),
    Arm(
        name="Muon, syrk",
        family="muon",
        peer="ours",
        make="emerging_optimizers.orthogonalized_optimizers.muon:Muon",
        kwargs={"use_syrk": True},
        cost=_BF16,
        against="published Muon",
        check="quintic",
        devices=("cuda",),
    ),
    Arm(
        name="published Muon",
        family="muon",
        peer="published",
        make="emerging_optimizers.orthogonalized_optimizers:Muon",
        cost=_BF16,
        against="published Muon",
        check="quintic",
    ),
    Arm(
        name="published Muon, syrk",
        family="muon",
        peer="published",
        make="emerging_optimizers.orthogonalized_optimizers:Muon",
        kwargs={"use_syrk": True},
        cost=_BF16,
        against="published Muon",
        check="quintic",
        devices=("cuda",),
    ),
    Arm(
        name="torch Muon",
        family="muon",
        peer="torch",
        make="torch.optim:Muon",
        cost=_BF16,
        against="published Muon",
        check="simple",
    ),
    Arm(
        name="pytorch-optimizer Muon",
        family="muon",
        peer="pytorch_optimizer",
        make="pytorch_optimizer:Muon",
        group={"use_muon": True},
        cost=_BF16,
        against="published Muon",
        check="simple",
    ),
    Arm(
        name="heavyball Muon, eager",
        family="muon",
        peer="heavyball",
        make="heavyball:Muon",
        setup=_EAGER,
        cost=_BF16,
        against="published Muon",
        check="quintic",
    ),
    Arm(
        name="dion Muon",
        family="muon",
        peer="dion",
        make="dion:Muon",
        cost=_BF16,
        against="published Muon",
        check="",
        slow=True,
    ),
    Arm(
        name="Muon, highest",
        family="muon",
        peer="ours",
        make="emerging_optimizers.orthogonalized_optimizers.muon:Muon",
        kwargs={"fp32_matmul_prec": "highest"},
        cost=_FP32,
        against="published Muon, highest",
        check="quintic",
    ),
    Arm(
        name="published Muon, highest",
        family="muon",
        peer="published",
        make="emerging_optimizers.orthogonalized_optimizers:Muon",
        kwargs={"fp32_matmul_prec": "highest"},
        cost=_FP32,
        against="published Muon, highest",
        check="quintic",
    ),
    Arm(
        name="Muon, high",
        family="muon",
        peer="ours",
        make="emerging_optimizers.orthogonalized_optimizers.muon:Muon",
        kwargs={"fp32_matmul_prec": "high"},
        cost=NewtonSchulz(rate="tf32"),
        against="published Muon, high",
        check="quintic",
        devices=("cuda",),
    ),
    Arm(
        name="Muon, high, syrk",
        family="muon",
        peer="ours",
        make="emerging_optimizers.orthogonalized_optimizers.muon:Muon",
        kwargs={"fp32_matmul_prec": "high", "use_syrk": True},
        cost=NewtonSchulz(rate="tf32"),
        against="published Muon, high",
        check="quintic",
        devices=("cuda",),
    ),
    Arm(
        name="published Muon, high",
        family="muon",
        peer="published",
        make="emerging_optimizers.orthogonalized_optimizers:Muon",
        kwargs={"fp32_matmul_prec": "high"},
        cost=NewtonSchulz(rate="tf32"),
        against="published Muon, high",
        check="quintic",
        devices=("cuda",),
    ),
    Arm(
        name="meta spectral descent, float32",
        family="muon",
        peer="meta",
        make="distributed_shampoo:DistributedShampoo",
        kwargs={
            "lr": 0.01,
            "preconditioner_config": "@distributed_shampoo:DefaultSpectralDescentPreconditionerConfig",
            **_META,
        },
        cost=_FP32,
        against="published Muon, highest",
    ),
)


def _soap(name: str, make: str, peer: str, against: str, *, every: int = 1, kl: bool = False, **kwargs: Any) -> Arm:
    setup = _EAGER if peer == "heavyball" else {}
    return Arm(
        name=name,
        family="soap",
        peer=peer,
        make=make,
        kwargs={"lr": 1e-3, **kwargs},
        setup=setup,
        cost=Eigenbasis(every=every, kl=kl),
        against=against,
        check="float64" if peer == "ours" else "",
        period=every,
    )


_OUR_SOAP, _OUR_REKLS = "emerging_optimizers.soap.soap:SOAP", "emerging_optimizers.soap.rekls:REKLS"
_EO_SOAP, _EO_REKLS = "emerging_optimizers.legacy_soap:SOAP", "emerging_optimizers.legacy_soap:REKLS"
_PO_SOAP = "pytorch_optimizer:SOAP"

_SOAP = (
    _soap("SOAP", _OUR_SOAP, "ours", "published SOAP"),
    # Its test of the result is SOAP's own in float64: whichever way the basis is made orthonormal, it is the same.
    replace(
        _soap("SOAP, Cholesky QR", _OUR_SOAP, "ours", "published SOAP"),
        setup={"emerging_optimizers.linalg.kernels.routes:ORTHONORMALIZERS": {"cuda": "cholesky"}},
        devices=("cuda",),
    ),
    _soap("published SOAP", _EO_SOAP, "published", "published SOAP"),
    _soap("pytorch-optimizer SOAP", _PO_SOAP, "pytorch_optimizer", "published SOAP", precondition_frequency=1),
    _soap("heavyball SOAP, eager", "heavyball:SOAP", "heavyball", "published SOAP", precondition_frequency=1),
    _soap(
        "meta SOAP",
        *("distributed_shampoo:DistributedShampoo", "meta", "published SOAP"),
        precondition_frequency=1,
        preconditioner_config="@distributed_shampoo:DefaultSOAPConfig",
        **_META,
    ),
    # The published library refreshes at every step only.
    _soap("SOAP, every 10", _OUR_SOAP, "ours", "published SOAP", every=10, precondition_frequency=10),
    _soap(
        "pytorch-optimizer SOAP, every 10",
        *(_PO_SOAP, "pytorch_optimizer", "published SOAP"),
        every=10,
        precondition_frequency=10,
    ),
    _soap("SOAP, KL", _OUR_SOAP, "ours", "published SOAP, KL", kl=True, use_kl_shampoo=True),
    _soap("published SOAP, KL", _EO_SOAP, "published", "published SOAP, KL", kl=True, use_kl_shampoo=True),
    _soap(
        "heavyball KLSOAP, eager",
        *("heavyball:KLSOAP", "heavyball", "published SOAP, KL"),
        kl=True,
        precondition_frequency=1,
    ),
    _soap("REKLS", _OUR_REKLS, "ours", "published REKLS", kl=True),
    _soap("published REKLS", _EO_REKLS, "published", "published REKLS", kl=True),
)


def _elementwise(name: str, make: str, peer: str, rule: str, *, check: Check = "", **kwargs: Any) -> Arm:
    # float32 read and written: gradient and weight, and each state tensor both ways.
    state = {"AdamW": 2, "LaProp": 2, "Lion": 1, "AdEMAMix": 3, "SimplifiedAdEMAMix": 2}[rule]
    published = rule in ("LaProp", "Lion", "SimplifiedAdEMAMix")
    return Arm(
        name=name,
        family="elementwise",
        peer=peer,
        make=make,
        kwargs={"lr": 1e-3, **kwargs},
        setup=_EAGER if peer == "heavyball" else {},
        cost=Traffic(bytes=12 + 8 * state),
        against=f"published {rule}" if published else f"a peer's {rule}",
        check=check,
    )


_SCALAR, _EO_SCALAR = "emerging_optimizers.scalar_optimizers", "emerging_optimizers.scalar_optimizers"
_ELEMENTWISE = (
    _elementwise("AdamW", f"{_SCALAR}.adamw:AdamW", "ours", "AdamW", check="adamw"),
    _elementwise("torch AdamW, fused", "torch.optim:AdamW", "torch", "AdamW", check="adamw", fused=True),
    _elementwise("torch AdamW, foreach", "torch.optim:AdamW", "torch", "AdamW", check="adamw", foreach=True),
    _elementwise("heavyball AdamW, eager", "heavyball:AdamW", "heavyball", "AdamW"),
    _elementwise("LaProp", f"{_SCALAR}.laprop:LaProp", "ours", "LaProp", check="laprop"),
    _elementwise(
        "LaProp, compiled", f"{_SCALAR}.laprop:LaProp", "ours", "LaProp", check="laprop", execution="compiled"
    ),
    _elementwise("published LaProp", f"{_EO_SCALAR}:LaProp", "published", "LaProp", check="laprop"),
    _elementwise("pytorch-optimizer LaProp", "pytorch_optimizer:LaProp", "pytorch_optimizer", "LaProp"),
    _elementwise("heavyball LaProp, eager", "heavyball:LaProp", "heavyball", "LaProp"),
    _elementwise("Lion", f"{_SCALAR}.lion:Lion", "ours", "Lion", check="lion"),
    _elementwise("Lion, compiled", f"{_SCALAR}.lion:Lion", "ours", "Lion", check="lion", execution="compiled"),
    _elementwise("published Lion", f"{_EO_SCALAR}:Lion", "published", "Lion", check="lion"),
    _elementwise("pytorch-optimizer Lion", "pytorch_optimizer:Lion", "pytorch_optimizer", "Lion", check="lion"),
    _elementwise("AdEMAMix", f"{_SCALAR}.ademamix:AdEMAMix", "ours", "AdEMAMix", check="float64"),
    _elementwise("pytorch-optimizer AdEMAMix", "pytorch_optimizer:AdEMAMix", "pytorch_optimizer", "AdEMAMix"),
    _elementwise(
        "SimplifiedAdEMAMix",
        *(f"{_SCALAR}.sim_ademamix:SimplifiedAdEMAMix", "ours", "SimplifiedAdEMAMix"),
        check="float64",
    ),
    _elementwise("published SimplifiedAdEMAMix", f"{_EO_SCALAR}:SimplifiedAdEMAMix", "published", "SimplifiedAdEMAMix"),
)

ARMS: dict[str, Arm] = {arm.name: arm for arm in (*_MUON, *_SOAP, *_ELEMENTWISE)}
