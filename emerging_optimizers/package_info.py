"""What the package is, under the published names."""

from emerging_optimizers._version import __version__

__all__ = [
    "__description__",
    "__keywords__",
    "__license__",
    "__package_name__",
    "__shortversion__",
    "__version__",
]

__shortversion__ = ".".join(__version__.split(".")[:3])
__package_name__ = "emerging_optimizers"
__description__ = "Matrix-based optimizers for PyTorch"
__license__ = "Apache-2.0"
__keywords__ = "deep learning, optimizer, pytorch, muon, soap"
