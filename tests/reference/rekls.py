"""REKLS: SOAP on Kullback-Leibler factors with a fresh eigendecomposition at every refresh.

Lin et al., 2025, arXiv 2509.03378. It is ``ReferenceSOAP`` with two switches set.
"""

from typing import Any

from .soap import ReferenceSOAP


class ReferenceREKLS(ReferenceSOAP):
    """SOAP with ``use_kl_shampoo`` and ``use_eigh``; every other option is SOAP's."""

    def __init__(self, lr: float, **options: Any) -> None:
        super().__init__(lr, use_kl_shampoo=True, use_eigh=True, **options)
