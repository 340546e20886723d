"""What the package is, under the published names."""

import re

from emerging_optimizers._version import __version__

__all__ = [
    "MAJOR",
    "MINOR",
    "PATCH",
    "PRE_RELEASE",
    "VERSION",
    "__description__",
    "__keywords__",
    "__license__",
    "__package_name__",
    "__shortversion__",
    "__version__",
]

_numbers = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)(.*)", __version__)
assert _numbers is not None
MAJOR, MINOR, PATCH = map(int, _numbers.groups()[:3])
PRE_RELEASE = _numbers[4]
VERSION = (MAJOR, MINOR, PATCH, PRE_RELEASE)
__shortversion__ = f"{MAJOR}.{MINOR}.{PATCH}"
__package_name__ = "emerging_optimizers"
__description__ = "Matrix-based optimizers for PyTorch"
__license__ = "Apache-2.0"
__keywords__ = "deep learning, optimizer, pytorch, muon, soap"
