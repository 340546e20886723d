"""A published path of `soap.preconditioners`."""

from emerging_optimizers.soap.preconditioners import (
    ShampooPreconditionerProtocol,
    SoapPreconditionerProtocol,
    TensorPair,
)

__all__ = ["ShampooPreconditionerProtocol", "SoapPreconditionerProtocol", "TensorPair"]
