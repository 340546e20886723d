r"""The precision experiment: what reduced float32 matrix products do to eigenvalues and to the KL factor update.

A factor :math:`K = Q \Lambda Q^\top` with a known basis and eigenvalues that fall from 1 to 1 / range, evenly in their
logarithm, meets a gradient. Two questions, at each precision and range: how far is :math:`\mathrm{diag}(Q^\top K Q)`
from :math:`\Lambda`, and how far is the KL update that divides by it from the same update in float64? The update has
two forms (`lab/forms.py`). Each runs with eigenvalues at the precision of the other products and at "highest", with and
without SOAP's floor under them. All ranges and draws are rows of one stack.

Nothing here imports torch before an experiment runs, so that ``eopt --help`` answers at once.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from emerging_optimizers.cli import UsageError
from emerging_optimizers.lab.config import Names, require_positive
from emerging_optimizers.lab.experiment import from_json, reproducible, require_distinct, rounded, to_json
from emerging_optimizers.lab.forms import FORMS, ways, whitened_update

if TYPE_CHECKING:
    from torch import Tensor

# What the precisions of torch are on hardware that has them.
PRECISIONS = {"highest": "float32", "high": "TF32", "medium": "bfloat16"}
# SOAP's default.
EPS = 1e-8
# What rounding in float32 makes of an eigenvalue that is zero stays within this share of the largest.
ZERO = 1e-6
# Beyond it, rounding in float64 reaches 1e-4 of the smallest eigenvalue: no truth to compare with.
LARGEST_RANGE = 1e12


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """The experiment. Everything that can change a number is here."""

    precisions: Names = tuple(PRECISIONS)
    """Float32 matmul precisions; on the CPU "high" is emulated TF32 and "medium" emulated bfloat16."""
    ranges: tuple[float, ...] = tuple(10.0**k for k in range(9))
    """Largest over smallest eigenvalue of the factor."""
    relative_floors: tuple[float, ...] = (0.0, 1e-2)
    """Floors of the eigenvalues, as shares of their mean; 0: eps alone."""
    gradient: Literal["matched", "white"] = "matched"
    """Gradients whose covariance is the factor, as after many steps of one kind, or i.i.d. Gaussian ones, which the
    factor has not seen."""
    shape: tuple[int, int] = (64, 128)
    """Rows and columns of the gradient; the factor belongs to the columns, the update to the rows."""
    draws: int = 8
    """Random bases and gradients, the same ones at every range."""
    seed: int = 0
    """Seed of the draws."""
    threads: int = 1
    """Threads of torch."""

    def __post_init__(self) -> None:
        require_distinct(self, "precisions", "ranges", "relative_floors")
        require_positive(self, "draws", "threads")
        if unknown := sorted(set(self.precisions) - set(PRECISIONS)):
            raise UsageError(f"--precisions names {', '.join(unknown)}; known are {', '.join(PRECISIONS)}")
        for value in self.ranges:
            if not 1 <= value <= LARGEST_RANGE:
                raise UsageError(
                    f"--ranges {value:g} is not in 1 to {LARGEST_RANGE:g}, where float64 still knows the truth"
                )
        for floor in self.relative_floors:
            if not 0 <= floor < 1:
                raise UsageError(f"--relative-floors {floor:g} is not in [0, 1)")
        if min(self.shape) < 2:
            raise UsageError(f"--shape {self.shape[0]} {self.shape[1]} is too small; give two sizes of at least 2")


@dataclass(frozen=True, kw_only=True)
class EigenvalueRow:
    """diag(Q^T K Q) at one precision and range, over all draws."""

    precision: str
    range: float
    large_median: float
    """Median relative error of the eigenvalues within a factor of 10 of the largest."""
    large_worst: float
    small_median: float
    """Median relative error of the eigenvalues within a factor of 10 of the smallest."""
    small_worst: float
    negative: float
    """Share of all eigenvalues that come out below zero."""
    of_largest: float
    """Worst error of all, as a share of the largest eigenvalue."""


@dataclass(frozen=True, kw_only=True)
class UpdateRow:
    """One form of the KL update at one precision and range, over all draws."""

    precision: str
    eigenvalue_precision: str
    form: str
    relative_floor: float
    range: float
    error: float
    """Median relative error, in the Frobenius norm, against float64 with the same floor."""
    worst: float
    """Worst relative error."""
    asymmetry: float
    """Largest norm of A - A^T over that of A."""
    smallest: float
    """Lowest ratio of the smallest to the largest eigenvalue of the symmetric part."""

    @property
    def positive(self) -> bool:
        """Every draw is positive semi-definite, but for rounding in float32."""
        return self.smallest > -ZERO


@dataclass(frozen=True, kw_only=True)
class PrecisionResult:
    """Every measure."""

    config: PrecisionConfig
    eigenvalues: tuple[EigenvalueRow, ...]
    updates: tuple[UpdateRow, ...]

    def eigenvalues_at(self, precision: str) -> tuple[EigenvalueRow, ...]:
        """The rows of a precision, by rising range."""
        return tuple(row for row in self.eigenvalues if row.precision == precision)

    def updates_at(
        self, precision: str, eigenvalue_precision: str, form: str, relative_floor: float
    ) -> tuple[UpdateRow, ...]:
        """The rows of a way to form the update, by rising range."""
        way = (precision, eigenvalue_precision, form, relative_floor)
        return tuple(
            row
            for row in self.updates
            if (row.precision, row.eigenvalue_precision, row.form, row.relative_floor) == way
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return to_json(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "PrecisionResult":
        """The inverse of `to_json`."""
        stored = from_json(value)
        return cls(
            config=PrecisionConfig(**stored["config"]),
            eigenvalues=tuple(EigenvalueRow(**row) for row in stored["eigenvalues"]),
            updates=tuple(UpdateRow(**row) for row in stored["updates"]),
        )


def run_precision(config: PrecisionConfig) -> PrecisionResult:
    """Measures eigenvalues and updates at every precision and range.

    Args:
        config: The experiment.

    Returns:
        The measures; the same configuration gives the same numbers on one machine.

    Example:
        >>> config = PrecisionConfig(precisions=("high",), ranges=(1e7,), shape=(8, 16), draws=2)
        >>> (row,) = run_precision(config).eigenvalues
        >>> row.small_median > 1 > 1e-3 > row.large_median  # TF32 knows the large eigenvalues alone
        True
    """
    with reproducible(config):
        problem = _problem(config)
        return PrecisionResult(
            config=config,
            eigenvalues=tuple(_eigenvalue_rows(config, problem)),
            updates=tuple(_update_rows(config, problem)),
        )


class _Problem(NamedTuple):
    """Stacks over ranges and draws, in float64."""

    spectrum: "Tensor"  # R 1 N, falling from 1
    factor: "Tensor"  # R D N N
    basis: "Tensor"  # D N N
    grad: "Tensor"  # R D M N


def _problem(config: PrecisionConfig) -> _Problem:
    import torch

    from emerging_optimizers.linalg.kronecker import project_out

    M, N = config.shape
    basis = torch.linalg.qr(torch.randn(config.draws, N, N, dtype=torch.float64)).Q
    noise = torch.randn(config.draws, M, N, dtype=torch.float64)
    ranges = torch.tensor(sorted(config.ranges), dtype=torch.float64)
    spectrum = ranges.reshape(-1, 1, 1) ** -torch.linspace(0, 1, N, dtype=torch.float64)
    scale = spectrum.sqrt() if config.gradient == "matched" else torch.ones_like(spectrum)
    return _Problem(
        spectrum=spectrum,
        factor=project_out(torch.diag_embed(spectrum), basis, basis),
        basis=basis,
        grad=project_out(noise * scale.unsqueeze(-2), None, basis),
    )


@contextmanager
def _products(precision: str) -> Iterator[None]:
    """Float32 products as hardware with both reduced precisions forms them."""
    from emerging_optimizers.linalg.emulation import emulate_bf16, emulate_tf32
    from emerging_optimizers.linalg.precision import fp32_matmul_precision

    with emulate_tf32(), emulate_bf16(), fp32_matmul_precision(precision):  # type: ignore[arg-type]  # one of PRECISIONS
        yield


def _eigenvalue_rows(config: PrecisionConfig, problem: _Problem) -> Iterator[EigenvalueRow]:
    from emerging_optimizers.linalg.kronecker import conjugate_diagonal

    for precision in config.precisions:
        with _products(precision):
            found = conjugate_diagonal(problem.factor.float(), problem.basis.float()).double()
        for spread, values, (exact,) in zip(sorted(config.ranges), found, problem.spectrum, strict=True):
            error = (values - exact).abs()
            relative = error / exact
            large, small = relative[:, exact >= exact[0] / 10], relative[:, exact <= exact[-1] * 10]
            yield EigenvalueRow(
                precision=precision,
                range=spread,
                **_measures(
                    large_median=large.median(),
                    large_worst=large.max(),
                    small_median=small.median(),
                    small_worst=small.max(),
                    negative=(values < 0).double().mean(),
                    of_largest=error.max() / exact[0],
                ),
            )


def _update_rows(config: PrecisionConfig, problem: _Problem) -> Iterator[UpdateRow]:
    import torch

    from emerging_optimizers.linalg.kronecker import conjugate_diagonal

    def floored(values: "Tensor", floor: float) -> "Tensor":
        return torch.maximum(values, (values.mean(dim=-1, keepdim=True) * floor).clamp_min(EPS))

    norm = torch.linalg.matrix_norm
    factor, basis, grad = (x.float() for x in (problem.factor, problem.basis, problem.grad))
    for floor in config.relative_floors:
        exact = whitened_update(problem.grad, problem.basis, floored(problem.spectrum, floor))
        for precision in config.precisions:
            for _, own, form in ways(precision):
                with _products(own):
                    values = floored(conjugate_diagonal(factor, basis), floor)
                with _products(precision):
                    found = FORMS[form](grad, basis, values).double()
                error = norm(found - exact) / norm(exact)
                asymmetry = norm(found - found.mT) / norm(found)
                ends = torch.linalg.eigvalsh((found + found.mT) / 2)[..., [0, -1]]
                for r, spread in enumerate(sorted(config.ranges)):
                    yield UpdateRow(
                        precision=precision,
                        eigenvalue_precision=own,
                        form=form,
                        relative_floor=floor,
                        range=spread,
                        **_measures(
                            error=error[r].median(),
                            worst=error[r].max(),
                            asymmetry=asymmetry[r].max(),
                            smallest=(ends[r, :, 0] / ends[r, :, 1]).min(),
                        ),
                    )


def _measures(**values: "Tensor") -> dict[str, float]:
    return dict(zip(values, rounded(value.item() for value in values.values()), strict=True))
