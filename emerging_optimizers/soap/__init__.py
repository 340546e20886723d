"""SOAP and its relatives: Adam in the eigenbasis of Shampoo's factors.

Layer 3: imports the engine, linalg and the element-wise steps, never another family of matrix optimizers.
"""

from emerging_optimizers.soap.kl_shampoo import KLShampoo
from emerging_optimizers.soap.kl_soap import KlMSoap, KlSoapV3, ReklsV3
from emerging_optimizers.soap.moso import MOSO
from emerging_optimizers.soap.rekls import REKLS
from emerging_optimizers.soap.soap import SOAP
from emerging_optimizers.soap.soap_muon import SOAPMuon
from emerging_optimizers.soap.stacked_soap import StackedSoap
from emerging_optimizers.soap.tp_rekls import TpRekls

__all__ = ["MOSO", "REKLS", "SOAP", "KLShampoo", "KlMSoap", "KlSoapV3", "ReklsV3", "SOAPMuon", "StackedSoap", "TpRekls"]
