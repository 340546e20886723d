"""Colours, markers and line styles of the lab's figures, whatever draws them."""

from collections.abc import Sequence

from emerging_optimizers.lab.config import BASELINE

# Okabe and Ito's palette, which colour-blind readers can tell apart; the baseline is dark.
DARK = "#222222"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")


def styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker for each name; they repeat after six."""
    others = [name for name in dict.fromkeys(names) if name != BASELINE]
    found = {name: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(others)}
    return {name: found.get(name, (DARK, ".")) for name in names}
