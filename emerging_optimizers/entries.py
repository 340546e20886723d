"""The table of optimizers: name, import path, one line, paper, learning rate to start from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from math import sqrt
from typing import Any

ADAMS = "Adam's"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One optimizer.

    Attributes:
        path: module and class, "package.module:Class".
        description: one line.
        paper: author, year, arXiv number.
        elementwise: it takes parameters of any shape; otherwise matrices only.
        start: the learning rate to start from: the best of a small grid on the lab's default job (a character
            GPT, `eopt grid`); None: not measured.
        unit: what the learning rate is: "Adam's": elements move by 0.18 to 2.2 times it, whatever the gradient's size;
            otherwise in words what it is.
        default_trains: whether weights move enough at the learning rate that the published constructor has by default.
            False: the loss of a small MLP falls by under 4 % in 400 steps, at every other default by 10 to 100 %
            (`tests/test_starting_rates.py` measures it).
        match: what AdamW's learning rate is multiplied by with `match="adamw"`, and its weight decay divided by: the
            ratio of the two best rates, as the geometric mean over three tasks (`make match`, docs/migrate.md). None:
            not measured.
        rms: the RMS of an update of an (M, N) matrix at learning rate 1, where it is a matter of the shape; `match` is
            then the factor at an RMS of 1, and is divided by it. None: it is not.
        of_rows: options with which it takes a table whose rows are what has a norm of its own, an embedding's tokens.
        cls: the class of an entry that was registered while the program ran.
    """

    path: str
    description: str
    paper: str
    elementwise: bool = False
    start: float | None = None
    unit: str = ADAMS
    default_trains: bool = True
    match: float | None = None
    rms: Callable[[int, int], float] | None = None
    of_rows: Mapping[str, Any] = field(default_factory=dict, hash=False)
    cls: type | None = field(default=None, repr=False)

    @property
    def in_adams_unit(self) -> bool:
        """Whether the learning rate of AdamW is one for it too, within a small factor."""
        return self.unit == ADAMS

    def load(self) -> Any:
        """The class."""
        if self.cls is not None:
            return self.cls
        module, name = self.path.split(":")
        return getattr(import_module(module), name)


def _spectral_rms(rows: int, columns: int) -> float:
    """sqrt(M/N) U V^T has min(M, N) singular values of sqrt(M/N)."""
    return sqrt(rows / columns / max(rows, columns))


def _shampoo_rms(rows: int, columns: int) -> float:
    """Gradients of independent entries of size g have factors N g^2 and M g^2; p = 4 takes their fourth roots."""
    return (rows * columns) ** -0.25


OPTIMIZERS: dict[str, Entry] = {
    "adamw": Entry(
        path="emerging_optimizers.scalar_optimizers.adamw:AdamW",
        description="Adam with decoupled weight decay, equal to torch.optim.AdamW",
        paper="Loshchilov and Hutter 2019, arXiv 1711.05101",
        elementwise=True,
        start=0.002,
        match=1.0,
    ),
    "adaptive_muon": Entry(
        path="emerging_optimizers.orthogonalized_optimizers.adaptive_muon:AdaptiveMuon",
        description="Muon with a second moment: AdaMuon, NorMuon or NAMO",
        paper="Si et al. 2025, arXiv 2507.11005; Li et al. 2025, arXiv 2510.05491; Zhang et al. 2026, arXiv 2602.17080",
        start=0.004,
    ),
    "ademamix": Entry(
        path="emerging_optimizers.scalar_optimizers.ademamix:AdEMAMix",
        description="Adam with a second, much slower momentum",
        paper="Pagliardini et al. 2024, arXiv 2409.03137",
        elementwise=True,
        start=0.002,
    ),
    "dion2": Entry(
        path="emerging_optimizers.orthogonalized_optimizers.dion2:Dion2",
        description="Muon of the rows or columns whose momentum is longest, the others wait; fewer products",
        paper="Ahn et al. 2025, arXiv 2512.16928",
        start=0.002,
    ),
    "dion3": Entry(
        path="emerging_optimizers.orthogonalized_optimizers.dion3:Dion3",
        description="Dion2 by rows with NorMuon's second moment (NorDion2)",
        paper="Amsel et al. 2026, arXiv 2608.11612",
        start=0.002,
    ),
    "iso": Entry(
        path="emerging_optimizers.riemannian_optimizers.isospectral:Iso",
        description="moves the singular vectors of a weight and keeps its singular values",
        paper="ISO: An RLVR-Native Optimization Stack 2026, arXiv 2607.19331",
        start=0.1,
        unit="it scales a rotation by the gradient's size",
        default_trains=False,
    ),
    "kl_m_soap": Entry(
        path="emerging_optimizers.soap.kl_soap:KlMSoap",
        description="SOAP with KL factors and MAdam in the eigenbasis",
        paper="Lin et al. 2025, arXiv 2509.03378; NVIDIA 2026, Emerging-Optimizers",
        start=0.009,
    ),
    "kl_shampoo": Entry(
        path="emerging_optimizers.soap.kl_shampoo:KLShampoo",
        description="momentum whitened by two factors fitted to each other; SOAP without Adam's second moment",
        paper="Lin et al. 2025, arXiv 2509.03378",
        start=0.009,
    ),
    "kl_soap": Entry(
        path="emerging_optimizers.soap.kl_soap:KlSoapV3",
        description="SOAP with KL factors",
        paper="Lin et al. 2025, arXiv 2509.03378",
        start=0.009,
    ),
    "laprop": Entry(
        path="emerging_optimizers.scalar_optimizers.laprop:LaProp",
        description="Adam that normalises the gradient before the momentum; forgets a spike in a few steps",
        paper="Ziyin et al. 2020, arXiv 2002.04839",
        elementwise=True,
        start=0.002,
    ),
    "lion": Entry(
        path="emerging_optimizers.scalar_optimizers.lion:Lion",
        description="sign of an interpolated momentum; one state tensor",
        paper="Chen et al. 2023, arXiv 2302.06675",
        elementwise=True,
        start=0.0003,
    ),
    "madam": Entry(
        path="emerging_optimizers.scalar_optimizers.madam:MAdam",
        description="Adam without epsilon, for gradients of any size",
        paper="Kingma and Ba 2015, arXiv 1412.6980; NVIDIA 2026, Emerging-Optimizers",
        elementwise=True,
        start=0.002,
    ),
    "mars": Entry(
        path="emerging_optimizers.scalar_optimizers.mars:MARS",
        description="AdamW for matrices on a gradient corrected by the previous one",
        paper="Yuan et al. 2024, arXiv 2411.10438",
        start=0.002,
    ),
    "mop": Entry(
        path="emerging_optimizers.orthogonalized_optimizers.mop:MOP",
        description="momentum orthogonalized exactly, scaled by its nuclear norm",
        paper="Lau et al. 2025, arXiv 2505.21799",
        start=0.1,
        unit="an update is as large as the gradient's nuclear norm makes it",
        default_trains=False,
    ),
    "moso": Entry(
        path="emerging_optimizers.soap.moso:MOSO",
        description="RMSProp of the momentum in the eigenbasis of its shorter side",
        paper="NVIDIA 2026, Emerging-Optimizers",
        start=0.004,
    ),
    "muon": Entry(
        path="emerging_optimizers.orthogonalized_optimizers.muon:Muon",
        description="momentum orthogonalized by Newton-Schulz; one state tensor",
        paper="Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982",
        start=0.004,
        match=0.8,
    ),
    "muon_hyperball": Entry(
        path="emerging_optimizers.orthogonalized_optimizers.muon_hyperball:MuonHyperball",
        description="Muon on a sphere: every matrix keeps its norm",
        paper="Wen et al. 2026, arXiv 2606.16899",
        start=0.05,
        unit="it is a part of the weight's norm",
        default_trains=False,
    ),
    "muon_mix": Entry(
        path="emerging_optimizers.orthogonalized_optimizers.muon_mix:MuonMix",
        description="Muon with a fast and a slow momentum, mixed",
        paper="modded-nanogpt 2026, pull requests 339 and 340; Pagliardini et al. 2024, arXiv 2409.03137",
        start=0.004,
    ),
    "muown": Entry(
        path="emerging_optimizers.orthogonalized_optimizers.muown:Muown",
        description="Muon for the directions of rows, Adam for their norms",
        paper="Lion et al. 2026, arXiv 2605.10797",
        start=0.004,
    ),
    "oblique_adam": Entry(
        path="emerging_optimizers.riemannian_optimizers.normalized_optimizer:ObliqueAdam",
        description="Adam along the spheres of columns or rows of unit norm",
        paper="Boumal 2023; Karras et al. 2024, arXiv 2312.02696",
        start=0.01,
        of_rows={"dim": 1},
    ),
    "oblique_sgd": Entry(
        path="emerging_optimizers.riemannian_optimizers.normalized_optimizer:ObliqueSGD",
        description="heavy-ball SGD along the spheres of columns or rows of unit norm",
        paper="Boumal 2023; Raman and Yang 2019, arXiv 1909.06463",
        start=1,
        unit="it scales the gradient, whatever its size",
        of_rows={"dim": 1},
    ),
    "oblique_steepest_adam": Entry(
        path="emerging_optimizers.riemannian_optimizers.normalized_optimizer:ObliqueSteepestAdam",
        description="Adam along spheres, every column or row by one angle",
        paper="Cesista 2025, Heuristic Solutions for Steepest Descent on the Stiefel Manifold",
        start=0.01,  # of benchmarks/zipf.py, rows of tokens
        of_rows={"dim": 1},
    ),
    "oblique_steepest_sgd": Entry(
        path="emerging_optimizers.riemannian_optimizers.normalized_optimizer:ObliqueSteepestSGD",
        description="momentum along spheres, every column or row by one angle; for embeddings",
        paper="Cesista 2025, Heuristic Solutions for Steepest Descent on the Stiefel Manifold",
        start=0.01,  # of benchmarks/zipf.py, rows of tokens
        of_rows={"dim": 1},
    ),
    "polargrad": Entry(
        path="emerging_optimizers.orthogonalized_optimizers.polargrad:PolarGrad",
        description="orthogonalized momentum scaled by its nuclear norm, so that updates shrink with gradients",
        paper="Lau et al. 2025, arXiv 2505.21799",
        start=0.1,
        unit="an update is as large as the gradient's nuclear norm makes it",
        default_trains=False,
    ),
    "psgd_pro": Entry(
        path="emerging_optimizers.psgd.psgd:PSGDPro",
        description="momentum whitened by two factors that products alone fit",
        paper="Li 2015, arXiv 1512.04202; Li 2024, arXiv 2402.11858",
        start=0.001,
        unit="updates are whitened where gradients are well above damping_noise_scale, and shrink with them below it",
    ),
    "rekls": Entry(
        path="emerging_optimizers.soap.rekls:REKLS",
        description="SOAP with KL factors and a fresh eigendecomposition at every refresh",
        paper="Lin et al. 2025, arXiv 2509.03378",
        start=0.009,
        match=4.0,
    ),
    "rekls_v3": Entry(
        path="emerging_optimizers.soap.kl_soap:ReklsV3",
        description="REKLS under the name of a later release",
        paper="Lin et al. 2025, arXiv 2509.03378",
        start=0.009,
    ),
    "rmsprop": Entry(
        path="emerging_optimizers.scalar_optimizers.rmsprop:RMSProp",
        description="gradient over its running root mean square, equal to torch.optim.RMSprop",
        paper="Tieleman and Hinton 2012, lecture 6.5",
        elementwise=True,
        start=0.001,
    ),
    "scion": Entry(
        path="emerging_optimizers.orthogonalized_optimizers.scion:Scion",
        description="steepest descent in a norm chosen by layer; trains a whole model without Adam",
        paper="Pethick et al. 2025, arXiv 2502.07529",
        start=0.004,
        unit="it is a part of the radius of a norm ball",
        default_trains=False,
        match=0.8,
        rms=_spectral_rms,
    ),
    "shampoo": Entry(
        path="emerging_optimizers.shampoo.shampoo:Shampoo",
        description="momentum between the inverse roots of Shampoo's factors",
        paper="Gupta et al. 2018, arXiv 1802.09568",
        start=0.1,
        unit="an update is as large as the roots of Shampoo's factors make it",
        match=3.0,
        rms=_shampoo_rms,
    ),
    "signum": Entry(
        path="emerging_optimizers.scalar_optimizers.signum:Signum",
        description="sign of the momentum; one state tensor",
        paper="Bernstein et al. 2018, arXiv 1802.04434",
        elementwise=True,
        start=0.0003,
    ),
    "sim_ademamix": Entry(
        path="emerging_optimizers.scalar_optimizers.sim_ademamix:SimplifiedAdEMAMix",
        description="AdEMAMix with Adam's memory: one slow momentum and the gradient itself",
        paper="Morwani et al. 2025, arXiv 2502.02431",
        elementwise=True,
        start=0.001,
    ),
    "sinkhorn": Entry(
        path="emerging_optimizers.orthogonalized_optimizers.sinkhorn:Sinkhorn",
        description="momentum with rows and columns of one norm; for embeddings, one state tensor",
        paper="DeepSeek-AI 2026, DeepSeek-V4.1 technical report; Scetbon et al. 2025, arXiv 2502.06742",
        start=0.003,  # on the demo's table of tokens, Muon for the rest (docs/routing.md)
    ),
    "soap": Entry(
        path="emerging_optimizers.soap.soap:SOAP",
        description="Adam in the eigenbasis of Shampoo's factors, plain or KL",
        paper="Vyas et al. 2024, arXiv 2409.11321",
        start=0.009,
        match=3.0,
    ),
    "soap_muon": Entry(
        path="emerging_optimizers.soap.soap_muon:SOAPMuon",
        description="SOAP's update, orthogonalized by Newton-Schulz",
        paper="modded-nanogpt 2026, pull request 278; Vyas et al. 2024, arXiv 2409.11321",
        start=0.004,
    ),
    "spectron": Entry(
        path="emerging_optimizers.orthogonalized_optimizers.spectron:Spectron",
        description="weights of low rank, W = A B^T, with a bounded spectral norm of the update",
        paper="Janson et al. 2026, arXiv 2602.12429",
        start=0.1,
        unit="it is the spectral norm of the update of a product of factors",
        default_trains=False,
    ),
    "spel": Entry(
        path="emerging_optimizers.orthogonalized_optimizers.spel:Spel",
        description="Muon on orthogonal matrices: the weight is orthogonalized after every step",
        paper="Yang and Lai 2026, Manifold Constrained Steepest Descent, arXiv 2601.21487",
        start=0.03,
        unit="it is the spectral norm of an update of an orthogonal matrix",
        default_trains=False,
    ),
    "splus": Entry(
        path="emerging_optimizers.soap.splus:SPlus",
        description="sign of the momentum in the eigenbasis of Shampoo's factors, which may be old",
        paper="Frans et al. 2025, arXiv 2506.07254",
        start=0.1,
        unit="an update of an (M, N) matrix has an RMS of 2 / (M + N)",
    ),
    "stacked_soap": Entry(
        path="emerging_optimizers.soap.stacked_soap:StackedSoap",
        description="SOAP with KL factors that a stack of matrices shares",
        paper="NVIDIA 2026, Emerging-Optimizers; Vyas et al. 2024, arXiv 2409.11321",
    ),
    "tp_rekls": Entry(
        path="emerging_optimizers.soap.tp_rekls:TpRekls",
        description="REKLS on matrices whose rows or columns lie on several processes",
        paper="Lin et al. 2025, arXiv 2509.03378; NVIDIA 2026, Emerging-Optimizers",
        start=0.009,
    ),
}
