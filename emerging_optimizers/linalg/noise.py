"""Random numbers without a generator: a function of the seed, the step and the place in the matrix.

A generator's numbers depend on what was drawn before, so a stack and its matrices one by one, a run and its resumption,
a CPU and an accelerator would each see others. These do not: every number is the hash of where it stands, as in
Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

_MASK = 2**32 - 1
# Of Wellons 2018, lowbias32: shifts, and between them factors.
_SHIFTS, _FACTORS = (16, 15, 16), (0x7FEB352D, 0x846CA68B)


def run_seed() -> int:
    """A seed that the processes of a run share: they may hold copies of a weight, and torch's seed is each one's own.

    That of `torch.manual_seed`; 0 where torch.distributed has several processes.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return 0 if several else torch.initial_seed()


def counted_normal(like_BMN: Tensor, step_B11: Tensor, seed: int, stream: int) -> Tensor:
    r"""Standard normal numbers (B, M, N) of the dtype and on the device of `like_BMN`.

    .. math::
        k_b = h(h(h(\mathrm{seed}) + \mathrm{stream}) + \mathrm{step}_b), \qquad
        u_{ij} = \big(h(h(k_b + i) + j) + \tfrac12\big) / 2^{32}

    with a hash h of 32 bits, and from two of them two numbers by Box and Muller, :math:`\sqrt{-2 \ln u_{ij}}` times
    the cosine and the sine of :math:`2 \pi u_{i, j + \lceil N / 2 \rceil}`.

    Args:
        like_BMN: says shape, dtype and device.
        step_B11: (B, 1, 1), whole numbers; matrices at the same step have the same numbers.
        seed: >= 0.
        stream: other numbers for another use in the same step.

    Example:
        >>> z = counted_normal(torch.empty(1, 200, 200), torch.ones(1, 1, 1), seed=0, stream=0)
        >>> bool(z.mean().abs() < 0.05), bool((z.std() - 1).abs() < 0.05)
        (True, True)
    """
    z: Tensor = _counted_normal(like_BMN, step_B11, _hash((_hash_seed(seed) + stream) & _MASK))
    return z


# Opaque to torch.compile: as C++ these integers take twenty seconds a graph, and save nothing.
@torch.library.custom_op("emerging_optimizers::counted_normal", mutates_args=())
def _counted_normal(like_BMN: Tensor, step_B11: Tensor, key: int) -> Tensor:
    _, M, N = like_BMN.shape
    half = (N + 1) // 2
    key_B11 = hash_words_(words(step_B11.long() + key))
    row_BM1 = hash_words_(key_B11 + _count(M, like_BMN.device).unsqueeze(-1))
    bits = hash_words_(row_BM1 + _count(2 * half, like_BMN.device))
    u = ((bits.long() & _MASK).to(like_BMN.dtype) + 0.5) * 2.0**-32  # in (0, 1]
    radius, angle = (-2 * u[..., :half].log()).sqrt(), (2 * math.pi) * u[..., half:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)[..., :N].contiguous()


@_counted_normal.register_fake
def _(like_BMN: Tensor, step_B11: Tensor, key: int) -> Tensor:
    return torch.empty_like(like_BMN, memory_format=torch.contiguous_format)


def _hash_seed(seed: int) -> int:
    key = 0
    while seed:
        key, seed = _hash(key ^ (seed & _MASK)), seed >> 32
    return key


def _hash(x: int) -> int:
    """`hash_words_` of a number in [0, 2^32)."""
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return x ^ (x >> _SHIFTS[-1])


def words(x: Tensor) -> Tensor:
    """The lowest 32 bits of int64 numbers, as int32."""
    return ((x + 2**31) & _MASK).sub_(2**31).to(torch.int32)


def hash_words_(x: Tensor) -> Tensor:
    """32 bits to 32 bits (Wellons 2018, lowbias32), in place, of words as int32, whose products wrap around.

    Example:
        >>> hash_words_(torch.tensor([0, 1, 2], dtype=torch.int32)).tolist()
        [0, 1753845952, -787275391]
    """
    shifted = torch.empty_like(x)
    for shift, factor in zip(_SHIFTS, (*_FACTORS, None), strict=True):
        torch.bitwise_right_shift(x, shift, out=shifted)
        x.bitwise_xor_(shifted.bitwise_and_(_MASK >> shift))  # the sign is a bit like the others
        if factor is not None:
            x.mul_(factor if factor < 2**31 else factor - 2**32)
    return x


def _count(n: int, device: torch.device) -> Tensor:
    return torch.arange(n, dtype=torch.int32, device=device)
