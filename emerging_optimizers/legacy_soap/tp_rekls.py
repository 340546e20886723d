"""A published path of `soap.tp_rekls`."""

from emerging_optimizers.soap.tp_rekls import TpRekls, all_gather_grad_and_kronecker_factors_tp

__all__ = ["TpRekls", "all_gather_grad_and_kronecker_factors_tp"]
