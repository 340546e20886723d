"""`eopt --version --json`: what a report of a fault has to say of the machine."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from emerging_optimizers._version import __version__

# Beside torch: what changes its numbers or its ways, and the frameworks of docs/frameworks.md.
PACKAGES = ("torch", "triton", "numpy", "transformers", "accelerate", "lightning", "peft", "tyro")


def versions() -> dict[str, Any]:
    """Versions of the package, of Python and of what is installed beside it, and the devices; no name, no path.

    Example:
        >>> sorted(versions())
        ['cpu threads', 'devices', 'eopt', 'packages', 'python', 'system']
    """
    import torch

    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "eopt": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": found,
        "devices": devices,
        "cpu threads": torch.get_num_threads(),
    }
