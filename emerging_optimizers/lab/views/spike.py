"""The figures and tables of the spike experiment."""

from collections.abc import Callable

from emerging_optimizers.lab.palette import styles
from emerging_optimizers.lab.spike import SpikeArmResult, SpikeConfig, SpikeResult, SpikeRow
from emerging_optimizers.lab.spike_arms import RECOVERY
from emerging_optimizers.lab.views.describe import (
    OWN,
    Cell,
    Curve,
    Figure,
    Key,
    Number,
    Panel,
    Table,
    View,
    alone,
    number,
)

# The line of each variant of an optimizer.
DASHES = {"": "solid", "published": "dash", "guarded": "dot", "published-guarded": "dashdot"}


def spike_view(result: SpikeResult) -> View:
    """What `eopt spike` found."""
    config = result.config
    looks = styles([arm.arm.optimizer for arm in result.arms])
    warmup, sweep, aftershock, spectra = _warmup(result), _sweep(result), _aftershock(result), _spectra(result)
    recovery, largest = recovery_table(result), aftershock_table(result)
    return View(
        title="Gradient spikes",
        question="How does each optimizer answer one gradient that is far too large: how long until its updates are "
        "back at their usual size, and how large do they get on the way?",
        facts=f"{len(result.arms)} optimizers, a {config.shape[0]} × {config.shape[1]} matrix with i.i.d. Gaussian "
        f"gradients, {config.steps} steps, learning rate 1, seed {config.seed}.",
        keys=[Key(arm.name, looks[arm.arm.optimizer][0], DASHES[arm.variant]) for arm in result.arms],
        parts=(warmup, sweep, recovery, aftershock, largest, spectra),
        tables=(comparison_table(result), recovery, largest),
        pictures={
            "warmup": [[warmup]],
            "sweep": [[sweep]],
            "aftershock": [[aftershock]],
            "spectra": [[spectra]],
        },
    )


def _warmup(result: SpikeResult) -> Figure:
    steps = result.config.warmup_steps
    curves = [Curve(key=arm.name, y=arm.no_spike.rms[:steps]) for arm in result.arms]
    return Figure(title="Update RMS without a spike", views=alone(Panel("", curves)), x="step", y="update RMS", log="y")


def _sweep(result: SpikeResult) -> Figure:
    times, sizes = _spikes(result.config)
    panels = (
        Panel(
            _spike(at, scale),
            [Curve(key=arm.name, y=arm.trajectory((at, scale)).rms) for arm in result.arms],
            lines=(at + 1,),
        )
        for at in times
        for scale in sizes
    )
    return Figure(
        title="Update RMS around each spike",
        views=alone(*panels),
        x="step",
        y="update RMS",
        log="y",
        columns=len(sizes),
    )


def _aftershock(result: SpikeResult) -> Figure:
    times, sizes = _spikes(result.config)

    def curves(arm: SpikeArmResult, at: int) -> tuple[Curve, Curve]:
        rows = [row for row in arm.rows if row.spike_at == at]
        return (
            Curve(key=arm.name, x=sizes, y=[row.aftershock for row in rows], mark=OWN),
            Curve(key=arm.name, x=sizes, y=[row.before for row in rows], dash="dot", faint=True),
        )

    panels = (
        Panel(f"Spike after {at} steps", [curve for arm in result.arms for curve in curves(arm, at)]) for at in times
    )
    return Figure(
        title="Aftershock: largest update RMS after the spike’s own step (faint and dotted: before it)",
        views=alone(*panels),
        x="size of the spike",
        y="update RMS",
        log="xy",
        columns=len(times),
    )


def _spectra(result: SpikeResult) -> Figure:
    times, sizes = _spikes(result.config)
    views = {
        _spike(at, scale): [
            Panel(
                _when(step - at - 1),
                [Curve(key=arm.name, y=arm.trajectory((at, scale)).singular_values[step]) for arm in result.arms],
            )
            for step in result.config.spectrum_steps_around(at)
        ]
        for at in times
        for scale in sizes
    }
    return Figure(
        title="Singular values of the update around a spike",
        views=views,
        x="index",
        y="singular value",
        log="y",
        columns=3,
        printed=_spike(times[(len(times) - 1) // 2], sizes[(len(sizes) - 1) // 2]),
    )


def _spikes(config: SpikeConfig) -> tuple[list[int], list[float]]:
    """The times and the sizes of the spikes, rising."""
    return sorted(config.spike_at), sorted(config.spike_scale)


def _spike(at: int, scale: float) -> str:
    return f"×{scale:,g} after {at} steps"


def _when(shift: int) -> str:
    """A step as seen from the spike."""
    count = f"{abs(shift)} step{'s' * (abs(shift) > 1)}"
    return "the spike’s step" if shift == 0 else f"{count} {'before' if shift < 0 else 'after'} the spike"


def comparison_table(result: SpikeResult) -> Table:
    """The published measure: the notebook's numbers, then ours with its start, with the default, with the guard."""
    config = result.config
    times, sizes = _spikes(config)
    ours = {arm.name: arm.rows for arm in result.arms}
    optimizers = tuple(dict.fromkeys(arm.arm.optimizer for arm in result.arms))

    def found(name: str, at: int) -> Cell:
        rows = (row for row in ours.get(name, ()) if row.spike_at == at)
        return tuple(_steps(config, at, row.recovery) for row in rows) or "-"

    def published(optimizer: str, at: int) -> Cell:
        known = RECOVERY.get(optimizer, {}).get(at, {})
        return tuple(x for scale in sizes for x in number(known.get(scale), "d")) if known else "-"

    return Table(
        title="Steps after the spike until the update RMS is within 10 % of its last 30 steps; spikes of "
        + ", ".join(f"{scale:g}" for scale in sizes),
        head=("optimizer", "spike after", "published notebook (GPU)", "published start", "default", "guarded"),
        rows=[
            (
                *(optimizer, number(at, "d"), published(optimizer, at)),
                *(found(name, at) for name in (f"{optimizer}-published", optimizer, f"{optimizer}-guarded")),
            )
            for optimizer in optimizers
            for at in times
        ],
        grouped=True,
        between=" ",
    )


def recovery_table(result: SpikeResult) -> Table:
    """Both measures of recovery, a pair of numbers a spike."""
    config = result.config
    return _grid(
        result,
        "Steps after the spike until the update RMS first / for good is within 10 % of its steady state",
        lambda row: tuple(_steps(config, row.spike_at, count) for count in (row.recovery, row.settled)),
    )


def aftershock_table(result: SpikeResult) -> Table:
    """The largest update before and after each spike."""
    return _grid(
        result,
        "Aftershock: largest update RMS after the spike's step (before: in the 30 steps before it)",
        lambda row: number(row.aftershock, ".2f"),
        before=lambda row: number(row.before, ".2f"),
    )


def _grid(
    result: SpikeResult,
    title: str,
    cell: Callable[[SpikeRow], Cell],
    before: Callable[[SpikeRow], Cell] | None = None,
) -> Table:
    """A row for each optimizer and spike time, a column for each spike size."""
    times, sizes = _spikes(result.config)
    rows: list[tuple[Cell, ...]] = []
    for arm in result.arms:
        for at in times:
            found = [row for row in arm.rows if row.spike_at == at]
            edge = (before(found[0]),) if before else ()
            rows.append((arm.name, number(at, "d"), *edge, *map(cell, found)))
    return Table(
        title=title,
        head=("optimizer", "spike after", *(("before",) if before else ()), *(f"x{scale:g}" for scale in sizes)),
        rows=rows,
        keys=[arm.name for arm in result.arms for _ in times],
        grouped=True,
    )


def _steps(config: SpikeConfig, at: int, count: int | None) -> Number:
    return Number(count, f">{config.steps - at - 1}" if count is None else str(count))
