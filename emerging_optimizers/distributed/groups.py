"""A process group: how large it is, where this process stands in it, and what its processes hold together."""

import torch
import torch.distributed as dist
from torch import Tensor


def get_pg_size(group: dist.ProcessGroup | None = None) -> int:
    """How many processes a group has; 1 for None, or where torch.distributed has not been set up.

    Example:
        >>> get_pg_size()
        1
    """
    return 1 if group is None or not dist.is_initialized() else group.size()


def get_pg_rank(group: dist.ProcessGroup | None = None) -> int:
    """This process's place in a group; 0 for None, or where torch.distributed has not been set up.

    Example:
        >>> get_pg_rank()
        0
    """
    return 0 if group is None or not dist.is_initialized() else group.rank()


def gather(x: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    """The whole of which every process has an equal part along `dim`, on every process."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(get_pg_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=dim)
