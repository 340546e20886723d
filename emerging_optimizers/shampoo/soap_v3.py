"""A published path of `soap.kl_soap` and `soap.preconditioners`; only here and beside it does `shampoo` look across."""

from emerging_optimizers.soap.kl_soap import KlMSoap, KlSoapV3, ReklsV3, SoapBase
from emerging_optimizers.soap.preconditioners import KlSoapPreconditioner, ReklsPreconditioner

__all__ = ["KlMSoap", "KlSoapPreconditioner", "KlSoapV3", "ReklsPreconditioner", "ReklsV3", "SoapBase"]
