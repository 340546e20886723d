"""The figure and the tables of an item of the gallery."""

import math
from statistics import median

from emerging_optimizers.lab.config import BASELINE
from emerging_optimizers.lab.gallery import ITEMS, GalleryResult
from emerging_optimizers.lab.palette import styles
from emerging_optimizers.lab.views.describe import Cell, Curve, Figure, Key, Panel, Table, View, alone, number


def gallery_view(result: GalleryResult) -> View:
    """What `eopt gallery ITEM` found."""
    item, names = ITEMS[result.config.item], [*result.recipes]
    by_step, by_second = _losses(result, "step"), _losses(result, "CPU second")
    form = ".2g" if item.log else ".3f"
    keys = [
        Key(name, color, mark=mark, note="{:{f}} ({:{f}} to {:{f}})".format(*result.last(name), f=form))
        for name, (color, mark) in styles(names).items()
    ]
    tables = (_final_losses(result, form), _recipes(result))
    own = result.config.text or result.config.images
    data = f" The data are those of {own}; the recipes were tuned on others." if own else ""
    seeds = sorted({run.seed for run in result.runs})
    return View(
        title=f"Gallery: {item.title[:1].lower()}{item.title[1:]}",
        question="How fast does each optimizer train it, tuned alike, by step and by CPU second?",
        facts=f"{result.runs[0].parameters:,} parameters are trained, for {result.steps[-1]} steps, with seeds "
        f"{', '.join(map(str, seeds))}: lines are medians, bands reach from the least to the most.{data}",
        keys=keys,
        parts=(by_step, by_second, *tables),
        tables=tables,
        pictures={"gallery": [[by_step, by_second]]},
    )


def list_of_items() -> Table:
    """What there is."""
    rows = [(name, item.title, f"--{item.takes}" if item.takes else "-", item.needs) for name, item in ITEMS.items()]
    return Table(title="eopt gallery ITEM", head=("item", "what", "takes", "needs"), rows=rows, labels=4)


def _losses(result: GalleryResult, what: str) -> Figure:
    """Medians and bands. The axis leaves out what lies above all medians after a quarter of the run."""
    item, curves, shown = ITEMS[result.config.item], [], []
    for name in result.recipes:
        at_steps, times = (result.by_step(name, x) for x in ("losses", "seconds"))
        medians = [median(x) for x in at_steps]
        shown += medians[len(medians) // 4 :]
        curves.append(
            Curve(
                key=name,
                x=result.steps if what == "step" else [median(x) for x in times],
                y=medians,
                band=([min(x) for x in at_steps], [max(x) for x in at_steps]),
            )
        )
    top = 1.05 * max(filter(math.isfinite, shown), default=1.0)
    return Figure(
        title=f"Held-out loss by {what}",
        views=alone(Panel("", curves)),
        x=what,
        y=item.unit,
        log="y" if item.log else "",
        limits=(None, None if item.log else top),
    )


def _final_losses(result: GalleryResult, form: str) -> Table:
    goal, _, _ = result.last(BASELINE)
    rows = []
    for name in result.recipes:
        middle, least, most = result.last(name)
        medians, seconds = ([*map(median, result.by_step(name, x))] for x in ("losses", "seconds"))
        there = next((k for k, loss in enumerate(medians) if loss <= goal), None)
        reached = (None, None) if there is None else (result.steps[there], seconds[there])
        spread = (*number(least, form), *number(most, form))
        costs = (number(seconds[-1], ".1f"), number(reached[0], "d"), number(reached[1], ".1f"))
        rows.append((name, number(middle, form), spread, *costs))
    return Table(
        title=f"Held-out loss at the end, {ITEMS[result.config.item].unit}",
        head=("optimizer", "median", "least to most", "CPU s", "steps to AdamW's loss", "CPU s to AdamW's loss"),
        rows=rows,
        keys=[*result.recipes],
        between=" to ",
    )


def _recipes(result: GalleryResult) -> Table:
    no_rest = ITEMS[result.config.item].only_matrices
    rows: list[tuple[Cell, ...]] = [
        (
            name,
            number(result.trials[name], "d"),
            *(number(x, ".2g") for x in (recipe.lr, None if no_rest else recipe.companion_lr)),
            *(number(x, "g") for x in (recipe.beta1, recipe.beta2, recipe.weight_decay, recipe.warmup)),
        )
        for name, recipe in result.recipes.items()
    ]
    return Table(
        title="The recipes, and from how many trials each was chosen",
        head=("optimizer", "trials", "rate, matrices", "rate, rest", "momentum", "beta2", "decay", "warm-up"),
        rows=rows,
        keys=[*result.recipes],
    )
