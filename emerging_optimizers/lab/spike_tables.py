"""The tables of the spike experiment."""

from collections.abc import Callable

from emerging_optimizers.lab.experiment import Table
from emerging_optimizers.lab.published import RECOVERY
from emerging_optimizers.lab.spike import SpikeConfig, SpikeResult, SpikeRow


def spike_tables(result: SpikeResult) -> tuple[Table, ...]:
    """Recovery beside the published one, both measures of recovery, and the aftershock."""
    return comparison_table(result), recovery_table(result), aftershock_table(result)


def comparison_table(result: SpikeResult) -> Table:
    """The published measure: the notebook's numbers, then ours with its start, with the default, with the guard."""
    config = result.config
    ours = {arm.name: arm.rows for arm in result.arms}
    optimizers = tuple(dict.fromkeys(arm.arm.optimizer for arm in result.arms))

    def cells(name: str, at: int) -> str:
        rows = (row for row in ours.get(name, ()) if row.spike_at == at)
        return " ".join(_steps(config, at, row.recovery) for row in rows) or "-"

    def published(optimizer: str, at: int) -> str:
        found = RECOVERY.get(optimizer, {}).get(at, {})
        return " ".join(str(found.get(scale, "-")) for scale in sorted(config.spike_scale)) if found else "-"

    return Table(
        title="Steps after the spike until the update RMS is within 10 % of its last 30 steps; spikes of "
        + ", ".join(f"{scale:g}" for scale in sorted(config.spike_scale)),
        head=("optimizer", "spike after", "published notebook (GPU)", "published start", "default", "guarded"),
        rows=tuple(
            (
                *("" if k else optimizer, str(at), published(optimizer, at)),
                *(cells(name, at) for name in (f"{optimizer}-published", optimizer, f"{optimizer}-guarded")),
            )
            for optimizer in optimizers
            for k, at in enumerate(sorted(config.spike_at))
        ),
    )


def recovery_table(result: SpikeResult) -> Table:
    """Both measures of recovery, a pair of numbers a spike."""
    config = result.config
    return _grid(
        result,
        "Steps after the spike until the update RMS first / for good is within 10 % of its steady state",
        lambda row: " / ".join(_steps(config, row.spike_at, count) for count in (row.recovery, row.settled)),
    )


def aftershock_table(result: SpikeResult) -> Table:
    """The largest update before and after each spike."""
    return _grid(
        result,
        "Aftershock: largest update RMS after the spike's step (before: in the 30 steps before it)",
        lambda row: f"{row.aftershock:.2f}",
        before=lambda row: f"{row.before:.2f}",
    )


def _grid(
    result: SpikeResult,
    title: str,
    cell: Callable[[SpikeRow], str],
    before: Callable[[SpikeRow], str] | None = None,
) -> Table:
    """A row for each optimizer and spike time, a column for each spike size."""
    rows = []
    for arm in result.arms:
        for k, at in enumerate(sorted(result.config.spike_at)):
            found = [row for row in arm.rows if row.spike_at == at]
            edge = (before(found[0]),) if before else ()
            rows.append(("" if k else arm.name, str(at), *edge, *map(cell, found)))
    scales = (f"x{scale:g}" for scale in sorted(result.config.spike_scale))
    head = ("optimizer", "spike after", *(("before",) if before else ()), *scales)
    return Table(title=title, head=head, rows=rows)


def _steps(config: SpikeConfig, at: int, count: int | None) -> str:
    return f">{config.steps - at - 1}" if count is None else str(count)
