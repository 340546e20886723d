"""The published path of what `published.soap_august` has for eigenbases."""

from emerging_optimizers.published.soap_august import get_eigenbasis_eigh, get_eigenbasis_qr, get_eigenbasis_svd

__all__ = ["get_eigenbasis_eigh", "get_eigenbasis_qr", "get_eigenbasis_svd"]
