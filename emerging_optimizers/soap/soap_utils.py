"""The published path of what `published.soap_june` has for eigenbases."""

from emerging_optimizers.published.soap_june import (
    get_eigenbasis_eigh,
    get_eigenbasis_qr,
    sort_eigenbasis_by_approx_eigvals,
)

__all__ = ["get_eigenbasis_eigh", "get_eigenbasis_qr", "sort_eigenbasis_by_approx_eigvals"]
