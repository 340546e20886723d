r"""PSGD-Pro: momentum whitened by two factors that products alone fit; no inverse, no eigenvectors, no QR.

.. math::
    M_t &= \mu M_{t-1} + (1 - \mu)\, G_t, \qquad
    X_t = M_t + (\delta + 10^{-7} |M_t|) \circ Z_t, \quad Z_t \sim \mathcal N(0, 1) \\
    Y_t &= P_L X_t P_R, \qquad P_L = Q_L^\top Q_L, \quad P_R = Q_R^\top Q_R \\
    Q_L &\leftarrow Q_L - \frac{\eta_t}{\ell_L} (Y_t Y_t^\top - N I)\, Q_L, \qquad
    Q_R \leftarrow Q_R - \frac{\eta_t}{\ell_R} (Y_t^\top Y_t - M I)\, Q_R \\
    W_t &= (1 - \eta\lambda) W_{t-1} - \eta\, P_L M_t P_R

for an (M, N) matrix, the weight last, with the new factors. They rest where :math:`Y Y^\top` and :math:`Y^\top Y` are N
and M times the identity on average: then the whitened momentum has an RMS of 1 and no direction of its own. The step
size is :math:`\eta_t = \max(\eta_p / \sqrt{1 + (t - 1) / T}, \eta_\min)` over a bound of the curvature,

.. math::
    \ell \leftarrow \max(\beta \ell + (1 - \beta)\, \ell', \ell'), \qquad \ell' = \|Y Y^\top\|_2 + N

(and :math:`\|Y^\top Y\|_2 + M`), the norms from below by `norm_lower_bound`. Each factor then takes one step of
`procrustes_step` towards the symmetric positive matrix of the same P, and both are scaled to one largest entry.

The noise :math:`\delta` bounds P where there is no gradient: gradients much smaller than `damping_noise_scale` are
drowned in it, and the update is their momentum times a constant. Its default suits losses whose gradients have entries
of about one; for those of a language model give what their RMS is, or less.

A side longer than `max_precond_dim` has a diagonal factor, a vector q: of :math:`Y Y^\top` only the diagonal counts,
:math:`\ell' = \max_i (Y Y^\top)_{ii} + N`, and there is nothing to rotate.

.. math::
    P_L = \mathrm{diag}(q)^2, \qquad
    q \leftarrow q - \frac{\eta_t}{\ell} \left(\mathrm{diag}(Y Y^\top) - N\right) \circ q

For the hidden matrices of a network, where eigendecompositions are too dear or the hardware has products only. State
for an M x N matrix: MN + M^2 + N^2 numbers. The noise is a function of `seed` and of each matrix's step count, so a run
repeats itself, resumed or not, and no generator moves.

References:
    Li 2015, Preconditioned Stochastic Gradient Descent, arXiv 1512.04202.
    Li 2024, Stochastic Hessian Fittings with Lie Groups, arXiv 2402.11858, and his psgd_torch: the geometry
        dQ = Q^0.5 E Q^1.5 with Procrustes steps, and diagonal factors of long sides.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Unpack

import torch
from torch import Tensor

from emerging_optimizers.engine import EngineOptions, RuleOptimizer, Scalars, Step, lerp
from emerging_optimizers.engine.options import (
    COUNT,
    FRACTION,
    NON_NEGATIVE,
    POSITIVE,
    WHOLE,
    LearningRate,
    MatrixParams,
    MaxPrecondDim,
    MaxUpdateRms,
    Momentum,
    Option,
    WeightDecay,
    WeightDecayMethod,
    given,
)
from emerging_optimizers.engine.parts import Momentum_BMN, Part, before_first_step
from emerging_optimizers.engine.rule import TranslatesState
from emerging_optimizers.linalg.kernels.symmetric import gram
from emerging_optimizers.linalg.kronecker import project_in, project_out
from emerging_optimizers.linalg.noise import counted_normal, run_seed
from emerging_optimizers.linalg.power_iteration import norm_lower_bound
from emerging_optimizers.linalg.procrustes import procrustes_step
from emerging_optimizers.linalg.scaling import clip_rms

NORM_STARTS = 32  # K of `norm_lower_bound`; Li's value for float32


class PSGDState(NamedTuple):
    """Momentum, factors, curvature bounds. The published lists Q and L, entry by entry: 0 is the left one."""

    exp_avg: Momentum_BMN
    Q_0: Annotated[Tensor, Part("B M M", start="identity")]  # B M where it is diagonal
    Q_1: Annotated[Tensor, Part("B N N", start="identity")]  # B N
    L_0: Annotated[Tensor, Part("B", start=1.0)]
    L_1: Annotated[Tensor, Part("B", start=1.0)]


@dataclass(frozen=True, kw_only=True)
class PSGDRule(TranslatesState):
    """Momentum, one step of each factor, the whitened momentum."""

    State = PSGDState
    reads = ("momentum", "beta_lip", "precond_lr", "min_precond_lr", "warmup_steps", "damping_noise_scale", "step")
    precond_init_scale: float = 1.0
    max_update_rms: float = 0.0
    max_precond_dim: int | None = 10000
    seed: int = 0

    def init(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> PSGDState:
        """Factors at their initial scale, diagonal where a side is long."""
        limit = self.max_precond_dim or max(shape)
        long = [key for key, size in zip(("Q_0", "Q_1"), shape[1:], strict=True) if size > limit]
        state = before_first_step(PSGDState, shape, dtype, device, without=long)
        diagonals = {key: torch.ones(shape[0], shape[1 + (key == "Q_1")], dtype=dtype, device=device) for key in long}
        factors = {"Q_0": state.Q_0, "Q_1": state.Q_1, **diagonals}
        return state._replace(**{key: self.precond_init_scale * Q for key, Q in factors.items()})

    def translate(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        """The published lists of factors and bounds by index: {"Q": [a, b]} is {"Q_0": a, "Q_1": b}."""
        lists = {f"{key}_{i}": x for key in ("Q", "L") for i, x in enumerate(saved.get(key, ()))}
        return {**{key: value for key, value in saved.items() if key not in ("Q", "L")}, **lists}

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        s: PSGDState = state
        momentum_BMN = lerp(s.exp_avg, grad, 1 - t.momentum)

        noise_BMN = counted_normal(grad, t.step, self.seed, stream=0)
        damped_BMN = momentum_BMN + (t.damping_noise_scale + 1e-7 * momentum_BMN.abs()) * noise_BMN
        white_BMN = precondition(damped_BMN, s.Q_0, s.Q_1)

        M, N = grad.shape[-2:]
        starts = counted_normal(grad.new_empty(len(grad), NORM_STARTS, M + N), t.step, self.seed, stream=1)
        Q_0, L_0 = self.fit(s.Q_0, s.L_0, white_BMN, starts[..., :M], t)
        Q_1, L_1 = self.fit(s.Q_1, s.L_1, white_BMN.mT, starts[..., M:], t)
        Q_0, Q_1 = balance([Q_0, Q_1])

        update_BMN = clip_rms(precondition(momentum_BMN, Q_0, Q_1), self.max_update_rms)
        return Step(update_BMN, PSGDState(momentum_BMN, Q_0, Q_1, L_0, L_1))

    def fit(self, Q: Tensor, bound_B: Tensor, white_BKT: Tensor, starts: Tensor, t: Scalars) -> tuple[Tensor, Tensor]:
        """One step of the factor of K towards a Gram matrix of T times the identity, and its curvature bound."""
        target = white_BKT.size(-1)
        rate = (t.precond_lr / (1 + (t.step - 1) / t.warmup_steps).sqrt()).clamp_min(t.min_precond_lr).to(Q.dtype)
        if Q.ndim == 2:
            gram_BK = white_BKT.square().sum(dim=-1)
            bound_B = self.bound(gram_BK.amax(dim=-1) + target, bound_B, t)
            return Q - rate.view(-1, 1) / bound_B.view(-1, 1) * (gram_BK - target) * Q, bound_B
        gram_BKK = gram(white_BKT)
        bound_B = self.bound(norm_lower_bound(gram_BKK, starts) + target, bound_B, t)
        Q = Q - rate / bound_B.view(-1, 1, 1) * (gram_BKK @ Q - target * Q)
        return procrustes_step(Q, starts), bound_B

    def bound(self, seen_B: Tensor, bound_B: Tensor, t: Scalars) -> Tensor:
        """Of the curvature: it falls slowly and rises at once."""
        return torch.maximum(lerp(seen_B, bound_B, t.beta_lip), seen_B)


def precondition(x_BMN: Tensor, Q_0: Tensor, Q_1: Tensor) -> Tensor:
    r""":math:`Q_0^\top Q_0 \, X \, Q_1^\top Q_1`."""
    full = [Q if Q.ndim == 3 else None for Q in (Q_0, Q_1)]
    x_BMN = project_in(project_out(x_BMN, *full), *full)
    for Q, dim in ((Q_0, -1), (Q_1, -2)):
        if Q.ndim == 2:
            x_BMN = x_BMN * Q.square().unsqueeze(dim)
    return x_BMN


def balance(factors: list[Tensor]) -> list[Tensor]:
    """Factors (B, K, K) or (B, K) of any K scaled so that all have one largest entry; their Kronecker product stays."""
    peaks = [Q.abs().flatten(1).amax(dim=1) for Q in factors]
    mean = torch.stack([peak.log() for peak in peaks]).mean(dim=0).exp()
    return [Q * (mean / peak).view(-1, *(1 for _ in Q.shape[1:])) for Q, peak in zip(factors, peaks, strict=True)]


PSGDLearningRate = Annotated[
    LearningRate, "learning rate, >= 0; once the factors are fitted, about the RMS of the update."
]
PrecondLr = Annotated[float, Option(POSITIVE, "step size of the factors at the start, > 0; up to 0.5 is sensible.")]
PrecondInitScale = Annotated[float, Option(POSITIVE, "the factors start at this times the identity, > 0.")]
DampingNoiseScale = Annotated[
    float,
    Option(
        NON_NEGATIVE,
        "standard deviation of the noise that the factors see, >= 0. 0 is for gradients that are never zero: "
        "without any, the factors grow by `precond_lr` a step.",
    ),
]
MinPrecondLr = Annotated[float, Option(POSITIVE, "lower bound of the step size of the factors, > 0.")]
WarmupSteps = Annotated[
    int, Option(COUNT, "T; after 3 T steps the step size of the factors is half of the first, >= 1.")
]
Seed = Annotated[
    int | None,
    Option(
        WHOLE,
        "of the noise, >= 0. None: the seed of `torch.manual_seed`; 0 where torch.distributed has several processes: "
        "copies of a weight need the same noise. The checkpoint holds it.",
    ),
]


DiagonalFrom = Annotated[MaxPrecondDim, "a side that is longer has a diagonal factor. None: no limit."]


class PSGDPro(RuleOptimizer):
    """PSGD-Pro; the equations are in this module's docstring.

    Update: P_L m P_R; Q_L ← Q_L − η_p (Y Yᵀ − N I) Q_L / ℓ for Y = P_L (m + noise) P_R
    When to use it: whitening where eigendecompositions are too dear; `damping_noise_scale` at the size of the
        gradients
    When not to use it: gradients whose size you do not know: `damping_noise_scale` has to fit it

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(4, 2))
        >>> optimizer = PSGDPro([w], lr=0.1)
        >>> w.grad = torch.ones(4, 2)
        >>> optimizer.step()
        >>> bool((w < 1).all()), optimizer.state[w]["Q_0"].shape
        (True, torch.Size([4, 4]))
    """

    rule = PSGDRule

    def __init__(
        self,
        params: MatrixParams,
        lr: PSGDLearningRate = 3e-3,
        weight_decay: WeightDecay = 0.01,
        momentum: Momentum = 0.9,
        *,
        weight_decay_method: WeightDecayMethod = "decoupled",
        beta_lip: Annotated[float, Option(FRACTION, "beta, decay of the curvature bounds, in [0, 1).")] = 0.9,
        precond_lr: PrecondLr = 0.1,
        precond_init_scale: PrecondInitScale = 1.0,
        damping_noise_scale: DampingNoiseScale = 0.1,
        min_precond_lr: MinPrecondLr = 0.01,
        warmup_steps: WarmupSteps = 10000,
        max_update_rms: MaxUpdateRms = 0.0,
        max_precond_dim: DiagonalFrom = 10000,
        seed: Seed = None,
        **engine: Unpack[EngineOptions],
    ) -> None:
        options = given(locals())
        # Read here and kept, so that a run that goes on in another process goes on with the same noise.
        options["seed"] = run_seed() if seed is None else seed
        super().__init__(**options)
