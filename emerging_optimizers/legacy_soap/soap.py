"""The published path of SOAP and of the parts of its step, `published.soap_august`."""

from emerging_optimizers.published.soap_august import (
    project_in,
    project_out,
    update_eigenbasis_and_exp_avgs,
    update_kronecker_factors_kl_shampoo,
)
from emerging_optimizers.published.soap_june import update_kronecker_factors
from emerging_optimizers.soap.soap import SOAP

__all__ = [
    "SOAP",
    "project_in",
    "project_out",
    "update_eigenbasis_and_exp_avgs",
    "update_kronecker_factors",
    "update_kronecker_factors_kl_shampoo",
]
