"""The options that SOAP and its relatives share, each declared once."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from emerging_optimizers.engine.options import (
    COUNT,
    FLAG,
    FRACTION,
    MATMUL_PRECISION,
    POSITIVE,
    WHOLE,
    EngineOptions,
    Option,
    described,
    one_of,
    optional,
)
from emerging_optimizers.linalg.precision import FP32MatmulPrecT

FirstStepT = Literal["adam", "eigenbasis"]

FactorEps = Annotated[
    float,
    Option(POSITIVE, "added to the root of the second moment, and the floor of the eigenvalues with KL factors; > 0."),
]
ProductPrecision = Annotated[
    FP32MatmulPrecT,
    Option(MATMUL_PRECISION, 'float32 matmul precision of factors and projections: "highest", "high" or "medium".'),
]
UseEigh = Annotated[
    bool, Option(FLAG, "take the bases from eigh at every refresh instead of one orthogonal iteration.")
]
RefreshPrecision = Annotated[
    FP32MatmulPrecT,
    Option(
        MATMUL_PRECISION,
        'float32 matmul precision of the refresh; what eigenvalues are made of is "highest".',
    ),
]
PowerIterSteps = Annotated[int, Option(COUNT, "orthogonal iterations a refresh, >= 1.")]
UseKLShampoo = Annotated[bool, Option(FLAG, "the factors of KL-Shampoo.")]
CorrectFactorBias = Annotated[bool | None, Option(optional(FLAG), "bias-correct the factors; None: as `correct_bias`.")]
StreamList = Annotated[Sequence[Any] | None, "has no effect, and a warning says so."]
FirstStep = Annotated[
    FirstStepT,
    Option(
        one_of(*get_args(FirstStepT)),
        '"adam": the first update is Adam\'s, the second step makes the first basis; "eigenbasis": the published '
        "start, whose second update explodes, and the published permutation of the second moment. It reproduces "
        "published tables.",
        default="adam",
    ),
]


@described
class EigenbasisOptions(EngineOptions, total=False):
    """Keyword arguments of every optimizer that keeps eigenbases of Kronecker factors, beyond `EngineOptions`."""

    precondition_frequency: Annotated[
        int,
        Option(
            COUNT,
            "steps from one refresh of the bases to the next, >= 1. The factors take in every gradient. Above 1, give "
            "a `refresh_ramp`.",
            default=1,
        ),
    ]
    refresh_ramp: Annotated[
        int,
        Option(
            WHOLE,
            "with `precondition_frequency` above 1, the steps after the first basis in which it is refreshed in each; "
            "then ever more rarely, in step k about every k / refresh_ramp steps, down to the frequency. 0: rare from "
            "the start, which costs loss where the learning rate warms up for few steps. Give half of the warm-up's "
            "steps, or all of them (docs/performance.md).",
            default=0,
        ),
    ]
    max_precond_dim: Annotated[
        int | None,
        Option(
            optional(COUNT),
            "a side that is longer keeps the identity as its basis and has no factor; both longer: no preconditioner. "
            "None: no limit.",
            default=10000,
        ),
    ]
    relative_floor: Annotated[
        float | None,
        Option(
            optional(FRACTION),
            "with KL factors, eigenvalues below this share of their mean count as it, in [0, 1). None: 0.01, or 0 with "
            "the published start.",
            default=None,
        ),
    ]
    overlap: Annotated[
        bool,
        Option(
            FLAG,
            "refresh the bases at the end of a step instead of in it: on CUDA on a stream of its own, beside the "
            "model. An update is then taken in bases that have not seen its gradient, which may cost loss "
            "(docs/performance.md).",
            default=False,
        ),
    ]


@described
class SOAPOptions(EigenbasisOptions, total=False):
    """Keyword arguments of SOAP and REKLS, beyond `EigenbasisOptions`."""

    first_step: FirstStep
