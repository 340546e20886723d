"""The float32 matmul precision as a context, and what its "medium" stands for on a device.

"medium" is torch's word: bfloat16 where the device has fast products of it, else float32. torch forms its own float32
products so on an accelerator. Where this library casts by itself, in Newton-Schulz, `reduced_dtype` is the one place
that decides, and on a CPU torch's own products follow it:

====================================================  ==============================================================
device                                                "medium" is
====================================================  ==============================================================
CUDA and other accelerators                           bfloat16
x86 CPU with AMX or avx512_bf16                       bfloat16
x86 CPU without                                       float32
other CPUs; an x86 CPU whose instructions are         what one measurement says, a few products of 256 x 256 at the
limited by ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA    first need in the process
or DNNL_MAX_CPU_ISA
any CPU while oneDNN is off                           float32
`reduced_precision`, or the environment variable      the dtype that it names, on every device
EMERGING_OPTIMIZERS_REDUCED_PRECISION
====================================================  ==============================================================

The same hardware and settings give the same answer in every process, so that a resumed run goes on with the numbers
that it began with. After a measurement it is bfloat16 only where that takes at most `LONGEST_SHARE` of float32's time:
with matrix hardware it takes 0.13 to 0.5, without it 3 to 100, so noise moves nothing over that line. Processes on
unlike CPUs that train one model need `reduced_precision` or the variable; where they share parameters, a step says so.
"""

import os
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from typing import Literal, NamedTuple, get_args

import torch
from torch.utils._python_dispatch import _disable_current_modes

FP32MatmulPrecT = Literal["highest", "high", "medium"]
ReducedPrecisionT = Literal["auto", "bfloat16", "float32"]

VARIABLE = "EMERGING_OPTIMIZERS_REDUCED_PRECISION"
LONGEST_SHARE = 0.75
_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_ROUNDS = 7


@contextmanager
def fp32_matmul_precision(precision: FP32MatmulPrecT = "highest") -> Iterator[None]:
    """Run a block at a float32 matmul precision and put the caller's precision back after it.

    Inside a compiled graph this does nothing: the precision in force when the graph was entered holds.

    Args:
        precision: "highest" (float32), "high" (TF32 where the device has it) or "medium" (bfloat16 where the
            device has fast products of it, else float32; `reduced_precision` may say otherwise).

    Raises:
        ValueError: for any other name; nothing has been changed.

    Example:
        >>> with fp32_matmul_precision("high"):
        ...     torch.get_float32_matmul_precision()
        'high'
    """
    if precision not in get_args(FP32MatmulPrecT):
        raise ValueError(f"precision={precision!r} is not one of {', '.join(get_args(FP32MatmulPrecT))}")
    if torch.compiler.is_compiling():
        yield
        return
    with _precision("highest" if precision == "medium" and _asked.word == "float32" else precision):
        if precision == "medium" and reduced_dtype(torch.device("cpu")) == torch.float32:
            # Else torch takes another library's products, in float32 all the same: of 128 x 128 in 1.7 times the time.
            torch.backends.mkldnn.matmul.fp32_precision = "ieee"  # type: ignore[attr-defined]  # untyped in torch
        yield


class _Settings(NamedTuple):
    """torch's, of the whole process."""

    name: str
    cuda: str
    mkldnn: str


class _Block:
    """A block that runs at a precision of its own, and what comes back after it."""

    def __init__(self, before: _Settings) -> None:
        self.before = before


_blocks: list[_Block] = []  # of all threads, in the order in which they were entered
# Reentrant: an interrupt can arrive between two instructions of a `with`, and leave it held by the thread that goes on.
_switch = RLock()


@contextmanager
def _precision(precision: FP32MatmulPrecT) -> Iterator[None]:
    """torch has one precision for all threads. Blocks of several threads overlap; the last one out puts it back."""
    cuda, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # untyped in torch
    with _switch:
        saved = (cuda.fp32_precision, mkldnn.fp32_precision)
        try:
            previous = torch.get_float32_matmul_precision()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            # A backend was set by itself: torch names the global precision once they agree with it.
            cuda.fp32_precision = mkldnn.fp32_precision = "ieee"
            previous = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        block = _Block(_Settings(previous, *saved))
        _blocks.append(block)
    try:
        yield
    finally:
        with _switch:
            place = _blocks.index(block)
            if block is _blocks[-1]:
                torch.set_float32_matmul_precision(block.before.name)
                cuda.fp32_precision, mkldnn.fp32_precision = block.before.cuda, block.before.mkldnn
            else:  # one that was entered later, by another thread, goes on, and then leaves what was before this one
                _blocks[place + 1].before = block.before
            del _blocks[place]


class _Asked(NamedTuple):
    """What "medium" shall be, and who says so."""

    word: str
    by: str


def _from(word: str, by: str) -> _Asked:
    if word not in get_args(ReducedPrecisionT):
        raise ValueError(f"{by}={word!r} is not one of {', '.join(get_args(ReducedPrecisionT))}")
    return _Asked(word, by)


_asked = _from(os.environ.get(VARIABLE) or "auto", VARIABLE)
_lock = Lock()
_fast: tuple[bool, str] | None = None  # whether this CPU multiplies bfloat16 fast, and how that is known


@contextmanager
def reduced_precision(dtype: ReducedPrecisionT) -> Iterator[None]:
    """Say what "medium" is within a block, in the whole process and on every device.

    For the same numbers on two machines, and for measuring. For a whole program set the environment variable
    EMERGING_OPTIMIZERS_REDUCED_PRECISION to one of the same words before it starts.

    Args:
        dtype: "bfloat16": this library's Newton-Schulz multiplies in bfloat16, however slow that is (torch's own
            float32 products, those of SOAP say, still follow their backend). "float32": "medium" is "highest".
            "auto": bfloat16 where the device multiplies it fast, else float32; the default.

    Raises:
        ValueError: for any other word; nothing has been changed.

    Example:
        >>> with reduced_precision("float32"):
        ...     reduced_dtype(torch.device("cpu"))
        torch.float32
    """
    global _asked
    before, _asked = _asked, _from(dtype, "reduced_precision")
    try:
        yield
    finally:
        _asked = before


def reduced_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which this library multiplies on a device at "medium": bfloat16 or float32; see this module's table.

    May be called anywhere, in a graph that is being compiled, with fake tensors and in a CUDA capture too.

    Example:
        >>> with reduced_precision("bfloat16"):
        ...     reduced_dtype(torch.device("cpu"))
        torch.bfloat16
    """
    if _asked.word != "auto":
        return torch.bfloat16 if _asked.word == "bfloat16" else torch.float32
    return torch.bfloat16 if device.type != "cpu" or _multiplies_fast() else torch.float32


def reduced_in_words(device: torch.device) -> str:
    """`reduced_dtype` and the reason.

    Example:
        >>> with reduced_precision("float32"):
        ...     reduced_in_words(torch.device("cpu"))
        'float32 (reduced_precision asks for it)'
    """
    if _asked.word != "auto":
        why = f"{_asked.by} asks for it"
    else:
        why = _bfloat16_on_this_cpu()[1] if device.type == "cpu" else f"on {device.type}"
    return f"{str(reduced_dtype(device)).removeprefix('torch.')} ({why})"


def newton_schulz_in_words(devices: Iterable[torch.device]) -> str:
    """The last line of an optimizer, a plan or an estimate that is printed; a line for each kind of device, or none.

    Example:
        >>> with reduced_precision("float32"):
        ...     newton_schulz_in_words([torch.device("cpu")])
        '\\nNewton-Schulz at "medium" multiplies in float32 (reduced_precision asks for it)'
    """
    kinds = {device.type: device for device in devices}
    return "".join(f'\nNewton-Schulz at "medium" multiplies in {reduced_in_words(kinds[key])}' for key in sorted(kinds))


def _multiplies_fast() -> bool:
    return _bfloat16_on_this_cpu()[0]


# A graph that is being compiled calls it and takes its answer for a constant. torch.compiler.assume_constant_result
# sets the same mark, but would import dynamo with this module, a second or more.
_multiplies_fast._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions have no such attribute


def _bfloat16_on_this_cpu() -> tuple[bool, str]:
    """Whether it is fast, and how that is known; oneDNN may be switched at any time, the rest is found out once."""
    global _fast
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):  # type: ignore[no-untyped-call]  # in torch
        return False, "oneDNN, which has torch's fast bfloat16 products on a CPU, is off"
    if _fast is None:
        with _lock:
            if _fast is None:
                _fast = _find_out()
    return _fast


def _find_out() -> tuple[bool, str]:
    if (has := _hardware()) is not None:
        return has, f"this CPU has {'AMX or avx512_bf16' if has else 'no bfloat16 matrix hardware'}"
    fast = _measure() <= LONGEST_SHARE
    # No figure: processes that measure alike print the same plan.
    return fast, f"measured on this CPU: bfloat16 is {'' if fast else 'not '}faster than float32"


def _hardware() -> bool | None:
    """Whether the CPU has instructions for products of bfloat16; None: what it says does not settle it."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    has = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return None if has and any(os.environ.get(name) for name in _LIMITS) else has


def _measure() -> float:
    """The time of a bfloat16 product over that of a float32 one: of each the shortest, taken in turn.

    It ends as soon as bfloat16 is far behind: where it is, a product takes up to 60 ms.
    """
    with (
        _disable_current_modes(),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        _precision("highest"),
    ):
        wide = torch.ones(1, 256, 256, dtype=torch.float32, device="cpu")
        short = wide.to(torch.bfloat16)
        shortest = [float("inf"), float("inf")]
        for done in range(_ROUNDS):
            for i, x in enumerate((wide, short)):
                begun = time.perf_counter()
                torch.bmm(x, x)
                shortest[i] = min(shortest[i], time.perf_counter() - begun)
            if done > 1 and shortest[1] > 4 * shortest[0]:  # the first round makes the kernels
                break
    return shortest[1] / shortest[0]
