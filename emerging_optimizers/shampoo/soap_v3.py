"""The published path of the KL-SOAP classes; they live in `soap`, and only `shampoo` looks across, here and beside."""

from emerging_optimizers.soap.kl_soap import KlMSoap, KlSoapV3, ReklsV3, SoapBase

__all__ = ["KlMSoap", "KlSoapV3", "ReklsV3", "SoapBase"]
