"""Options, each declared once: its type, what is allowed, and a line about it.

A constructor says its options in its signature, with the named types of this module or of its family:

    def __init__(self, params: Params, lr: LearningRate = 1e-3, momentum: Momentum = 0.9, ...)

From that follow the checks of parameter groups, the arguments in the class's documentation, and what `eopt` and the
pages say. Another text for one class stands behind the type: `Annotated[LearningRate, "the angle of a step, >= 0."]`.
"""

import inspect
import textwrap
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, TypeVar, Unpack, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from emerging_optimizers.engine.hooks import ALLOWED as ALLOWED_HOOKS
from emerging_optimizers.engine.hooks import WeightUpdateHookT, make_hook
from emerging_optimizers.engine.kept import WeightRoundingT
from emerging_optimizers.engine.matrix_view import ALLOWED, MatrixViewT, is_view
from emerging_optimizers.engine.packing import INT8
from emerging_optimizers.engine.scalars import is_number
from emerging_optimizers.engine.weight_decay import WeightDecayT
from emerging_optimizers.linalg.coefficients import SCHEDULES, NSCoeffT
from emerging_optimizers.linalg.flops import has_no_data
from emerging_optimizers.linalg.precision import FP32MatmulPrecT
from emerging_optimizers.linalg.scaling import MuonScaleT

ClassT = TypeVar("ClassT", bound=type)
Execution = Literal["stacked", "per_matrix", "compiled"]
NonfiniteT = Literal["skip", "raise", "propagate"]


class Check(NamedTuple):
    """A range: a predicate and the words for what it allows.

    Attributes:
        holds: whether it allows a value.
        allowed: in words.
        wrong: what is wrong with a value that it does not allow, where that says more; empty: nothing does.
    """

    holds: Callable[[Any], bool]
    allowed: str
    wrong: Callable[[Any], str] = lambda value: ""


class Option(NamedTuple):
    """What a type says of an option.

    Attributes:
        check: its range.
        text: its line in the documentation.
        default: of an option in a `TypedDict`, which has no other place for it.
    """

    check: Check
    text: str
    default: Any = inspect.Parameter.empty


# ---- ranges ---------------------------------------------------------------------------------------------------------


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong_with_hook(value: Any) -> str:
    try:
        make_hook(value)
    except ValueError as wrong:
        return str(wrong)
    return ""


def one_of(*values: Any) -> Check:
    """A choice among fixed values; 1.0 and True are no 1."""

    def is_one(v: Any) -> bool:
        same_kind = [x for x in values if isinstance(v, type(x)) and isinstance(v, bool) == isinstance(x, bool)]
        return v in same_kind

    return Check(is_one, "one of " + ", ".join(map(repr, values)))


def optional(check: Check) -> Check:
    """None, or what `check` allows."""
    return Check(lambda v: v is None or check.holds(v), f"None, or {check.allowed}")


NON_NEGATIVE = Check(lambda v: is_number(v) and v >= 0, "a finite number >= 0")
POSITIVE = Check(lambda v: is_number(v) and v > 0, "a finite number > 0")
FRACTION = Check(lambda v: is_number(v) and 0 <= v < 1, "a number in [0, 1)")
SHARE = Check(lambda v: is_number(v) and 0 <= v <= 1, "a number in [0, 1]")
BETAS = Check(
    lambda v: isinstance(v, tuple) and len(v) == 2 and all(FRACTION.holds(b) for b in v),
    "two numbers in [0, 1)",
)
FLAG = Check(lambda v: isinstance(v, bool), "True or False")
COUNT = Check(lambda v: _integer(v) and v >= 1, "an integer >= 1")
WHOLE = Check(lambda v: _integer(v) and v >= 0, "an integer >= 0")
LEARNING_RATE = Check(
    # A tensor on an accelerator is not read: that would wait for the device.
    lambda v: (
        (v.numel() == 1 and (v.device.type != "cpu" or has_no_data(v) or NON_NEGATIVE.holds(v.item())))
        if isinstance(v, Tensor)
        else NON_NEGATIVE.holds(v)
    ),
    "a finite number >= 0, or a tensor with one such element",
)
MATMUL_PRECISION = one_of(*get_args(FP32MatmulPrecT))

# ---- options that many optimizers have ------------------------------------------------------------------------------

Params = Annotated[ParamsT, "tensors of any shape, (name, tensor) pairs, or groups."]
MatrixParams = Annotated[
    ParamsT,
    "tensors of two or more dimensions, (name, tensor) pairs, or groups. 3-D: a batch of matrices; convolutions are "
    "flattened to (out, rest).",
]
LearningRate = Annotated[float | Tensor, Option(LEARNING_RATE, "learning rate, >= 0.")]
Momentum = Annotated[float, Option(FRACTION, "mu, in [0, 1).")]
Betas = Annotated[tuple[float, float], Option(BETAS, "decay of Adam's moments, each in [0, 1).")]
Eps = Annotated[float, Option(NON_NEGATIVE, "added to the root of the second moment, >= 0.")]
PositiveEps = Annotated[float, Option(POSITIVE, "added to the root of the second moment, > 0.")]
WeightDecay = Annotated[float, Option(NON_NEGATIVE, ">= 0.")]
WeightDecayMethod = Annotated[
    WeightDecayT, Option(one_of(*get_args(WeightDecayT)), '"decoupled", "independent", "l2", "palm" or "cautious".')
]
Nesterov = Annotated[bool, Option(FLAG, "look one step ahead.")]
CorrectBias = Annotated[bool, Option(FLAG, "divide the moments by 1 - beta^t.")]
MatmulPrecision = Annotated[
    FP32MatmulPrecT, Option(MATMUL_PRECISION, 'float32 matmul precision: "highest", "high" or "medium".')
]
MaxUpdateRms = Annotated[float, Option(NON_NEGATIVE, "scale an update down whose RMS is larger; 0: never.")]
ExtraScaleFactor = Annotated[float, Option(POSITIVE, "multiplies the update, > 0.")]
ShampooBeta = Annotated[float, Option(FRACTION, "decay of the factors, in [0, 1).")]
MaxPrecondDim = Annotated[int | None, Option(optional(COUNT), "a side that is longer has no factor. None: no limit.")]
NewtonSchulzSteps = Annotated[int, Option(COUNT, "Newton-Schulz steps, >= 1.")]
ScheduledCoefficients = Annotated[
    NSCoeffT, Option(one_of(*SCHEDULES), 'the coefficients of Newton-Schulz, as for `Muon`; not "custom".')
]
ScaleMode = Annotated[
    MuonScaleT,
    Option(
        one_of(*get_args(MuonScaleT)),
        '"spectral" sqrt(max(M, N)); "shape_scaling" sqrt(max(1, M / N)); "unit_rms_norm" sqrt(M / N).',
    ),
]


def _option_of(hint: Any) -> Option | None:
    return next((x for x in getattr(hint, "__metadata__", ()) if isinstance(x, Option)), None)


def _text_of(hint: Any) -> str:
    """The last text wins: an alias that is annotated again."""
    said = [x.text if isinstance(x, Option) else x for x in getattr(hint, "__metadata__", ())]
    return said[-1] if said else ""


def _default_of(hint: Any) -> Any:
    option = _option_of(hint)
    return inspect.Parameter.empty if option is None else option.default


def _line(name: str, text: str) -> str:
    return textwrap.fill(
        f"{name}: {text}",
        width=120,
        initial_indent=" " * 4,
        subsequent_indent=" " * 8,
        break_long_words=False,
        break_on_hyphens=False,
    )


def described(kind: ClassT) -> ClassT:
    """Class decorator: the options of a `TypedDict` in its documentation."""
    own = kind.__annotations__
    lines = [
        _line(name, f"{text} Default {default!r}." if (default := _default_of(hint)) is not inspect.Parameter.empty
              else text)
        for name, hint in get_type_hints(kind, include_extras=True).items()
        if name in own and (text := _text_of(hint))
    ]  # fmt: skip
    if kind.__doc__:
        kind.__doc__ = "\n".join([inspect.cleandoc(kind.__doc__), "", "Attributes:", *lines, ""])
    return kind


@described
class EngineOptions(TypedDict, total=False):
    """Keyword arguments that every optimizer takes."""

    maximize: Annotated[bool, Option(FLAG, "follow the gradient up instead of down; per group.", default=False)]
    spike_guard: Annotated[
        float | None,
        Option(
            optional(Check(lambda v: POSITIVE.holds(v) and v > 1, "a finite number > 1")),
            "scale a matrix's gradient down whose norm exceeds this many times the running mean of its norms (> 1); "
            "None: never. Per group.",
            default=None,
        ),
    ]
    nonfinite: Annotated[
        NonfiniteT,
        Option(
            one_of(*get_args(NonfiniteT)),
            'what a NaN or an infinity in a gradient does: "skip" (that matrix, or in an element-wise rule that '
            'parameter, sits the step out and no state sees the gradient), "raise" (before anything moves; reads the '
            'device) or "propagate". Per group.',
            default="skip",
        ),
    ]
    matrix_view: Annotated[
        MatrixViewT,
        Option(
            Check(is_view, ALLOWED),
            'how a parameter is cut into matrices; per group, for matrix optimizers: "auto" (a 3-D parameter is a '
            'batch), "flatten" ((out, rest)), "joined" (a batch as one matrix), "transposed" (stored as (in, out)), '
            '("heads", count), ("split", size, ...) or ("interleaved", size, ...); `engine/matrix_view.py` says all.',
            default="auto",
        ),
    ]
    state_dtype: Annotated[
        torch.dtype | Literal["int8"] | None,
        Option(
            Check(lambda v: v in (None, torch.bfloat16, INT8), 'None or torch.bfloat16 or "int8"'),
            "torch.bfloat16 keeps momentum and first moments (of decay up to some hundred steps), and the bases of the "
            'SOAP family, in half the memory; "int8" keeps momentum and first moments in a quarter, with a scale for '
            "each block of at most 256 elements of a row and an error of at most 0.8 % of its largest number "
            "(`linalg/eight_bits.py`), and bases in float32, as it does parameters of fewer than 4096 elements, rows "
            "of fewer than 16, vectors of fewer than 2^20 and what processes cut within a block. `state` then has them "
            'as "momentum_buffer_int8" and "momentum_buffer_scale". Everything is computed in float32 as before, and '
            "second moments and factors stay in it. Refused where an optimizer has neither. None: float32. Per group.",
            default=None,
        ),
    ]
    offload: Annotated[
        Literal["cpu"] | None,
        Option(
            one_of(None, "cpu"),
            '"cpu" keeps the state in the memory of the host (pinned, for CUDA) and copies it chunk by chunk to the '
            "device and back, beside the computation; all numbers are the same. Step counts and the guard's means stay "
            "on the device. Refused with capturable=True, and for sharded parameters on an accelerator. None: on the "
            "device. Per group.",
            default=None,
        ),
    ]
    weight_rounding: Annotated[
        WeightRoundingT,
        Option(
            one_of(*get_args(WeightRoundingT)),
            "what becomes of the part of an update that bfloat16 or float16 weights cannot hold: "
            '"nearest" drops it, and with it every update below half a unit in the last place; "stochastic" lets it '
            'decide by chance between the two neighbours, right on average; "compensated" (bfloat16) keeps it, as 16 '
            "more bits in the state: the weights learn as in float32, bitwise. Weights in float32 and float64 have "
            "nothing to round. Per group.",
            default="nearest",
        ),
    ]
    weight_update_hook: Annotated[
        WeightUpdateHookT,
        Option(
            Check(lambda v: not _wrong_with_hook(v), ALLOWED_HOOKS, _wrong_with_hook),
            'the law by which the weight moves: a name of `engine/hooks.py` ("hyperball", "radial_brake", '
            '"relative_update", "update_floor", "row_update_floor", "spectral_clip", "spectral_weight_decay"), (name, '
            "its arguments), or a `WeightUpdateHook`, which may be two functions of a parameter as published. None: "
            "W <- keep W - lr U. Per group.",
            default=None,
        ),
    ]
    cautious: Annotated[
        bool,
        Option(
            FLAG,
            "leave out the elements of an update whose sign is not the gradient's, and lengthen the rest for it "
            "(Liang et al. 2024, arXiv 2411.16085); refused where the optimizer rewrites the weight. Per group.",
            default=False,
        ),
    ]
    capturable: Annotated[
        bool,
        Option(
            FLAG,
            "steps can be recorded in a CUDA graph: the learning rate becomes a tensor on the parameters' device (fill "
            "it, as schedulers do; a number set later is taken over by the next step outside of a graph), and the host "
            "looks at nothing. Every step but the first few, which have to be taken before, is then the same; what "
            "needs the host is refused. Per group.",
            default=False,
        ),
    ]
    execution: Annotated[
        Execution,
        '"stacked" (matrices of one shape in one call), "per_matrix" (one matrix a call, the definition of correct) or '
        "\"compiled\" (the rule through torch.compile). Default 'stacked'.",
    ]


# ---- what a constructor declares ------------------------------------------------------------------------------------


class Declared(NamedTuple):
    """What the signature of a constructor says.

    Attributes:
        ranges: of the options.
        defaults: of the options in its `TypedDict`.
        arguments: each argument's name and text.
    """

    ranges: Mapping[str, Check] = MappingProxyType({})
    defaults: Mapping[str, Any] = MappingProxyType({})
    arguments: tuple[tuple[str, str], ...] = ()


def declared(constructor: Callable[..., Any], preset: Mapping[str, Any] = MappingProxyType({})) -> Declared:
    """Read a constructor's signature, and leave plain types in its annotations, as `inspect` is to see them.

    One whose annotations cannot be evaluated declares nothing. `preset` has defaults that are the class's own.
    """
    try:
        hints = get_type_hints(constructor, include_extras=True)
        plain = get_type_hints(constructor)
    except (NameError, TypeError):
        return Declared()
    ranges: dict[str, Check] = {}
    defaults: dict[str, Any] = {}
    arguments: list[tuple[str, str]] = []
    for name, parameter in inspect.signature(constructor).parameters.items():
        hint = hints.get(name)
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and get_origin(hint) is Unpack:
            (kind,) = get_args(hint)
            more = options_in(kind)
            ranges |= {key: option.check for key, option in more.items()}
            defaults |= {key: option.default for key, option in more.items()}
            everyones = EngineOptions.__annotations__
            arguments += [
                (key, f"{x.text} Default {preset.get(key, x.default)!r}.")
                for key, x in more.items()
                if key not in everyones
            ]
            arguments.append((f"**{name}", "see `EngineOptions`."))
            continue
        if option := _option_of(hint):
            ranges[name] = option.check
        if text := _text_of(hint):
            arguments.append((f"**{name}" if parameter.kind is inspect.Parameter.VAR_KEYWORD else name, text))
    constructor.__annotations__ = {**plain, "return": None}
    return Declared(ranges, defaults, tuple(arguments))


def options_in(kind: type) -> dict[str, Option]:
    """The options of parameter groups in a `TypedDict`."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: option for name, hint in hints.items() if (option := _option_of(hint))}


def with_arguments(doc: str | None, arguments: tuple[tuple[str, str], ...]) -> str | None:
    """A class's documentation with its arguments before "Raises", where it does not list them itself.

    It comes without the indentation of the source, which Python 3.13 and later take away themselves.
    """
    doc = inspect.cleandoc(doc or "")
    if not doc or not arguments or "\nArgs:\n" in doc:
        return doc or None
    before, raises, behind = doc.partition("\nRaises:\n")
    listed = "\n".join(["Args:", *(_line(name, text) for name, text in arguments)])
    return f"{before.rstrip()}\n\n{listed}\n{raises}{behind}"


def given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor for the next one: called with `locals()`, before anything else is in them.

    Raises:
        TypeError: an option that the class fixes.
    """
    options = {**arguments.get("engine", {}), **arguments.get("options", {})}
    cls: Any = type(arguments["self"])
    for name in options.keys() & cls.fixed.keys():
        free = next((c for c in cls.__mro__ if "rule" in vars(c) and name not in c.fixed), None)
        said = f"{name}={cls.fixed[name]!r}"
        why = f"it has {said}" if free is None else f"it is {free.__name__} with {said}; use {free.__name__} to choose"
        raise TypeError(f"{cls.__name__} has no argument {name!r}: {why}")
    named = {k: v for k, v in arguments.items() if k not in ("self", "engine", "options") and not k.startswith("__")}
    return {**named, **options}
