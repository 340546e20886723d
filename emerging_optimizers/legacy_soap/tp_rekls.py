"""TpRekls under the published path."""

from emerging_optimizers.published.soap_august import all_gather_grad_and_kronecker_factors_tp
from emerging_optimizers.soap.tp_rekls import TpRekls

__all__ = ["TpRekls", "all_gather_grad_and_kronecker_factors_tp"]
