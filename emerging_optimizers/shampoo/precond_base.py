"""A published path of what preconditioners of one's own have to be."""

from emerging_optimizers.engine.preconditioner import TensorPair
from emerging_optimizers.shampoo.preconditioners import ShampooPreconditionerProtocol
from emerging_optimizers.soap.preconditioners import SoapPreconditionerProtocol

__all__ = ["ShampooPreconditionerProtocol", "SoapPreconditionerProtocol", "TensorPair"]
