"""Sphinx extension: the pages that are made from the code, and formulas, drawings and pictures without a script.

The pages go to `docs/generated/`, which git does not know, so that none of them can be older than the code.
"""

import contextlib
import importlib
import inspect
import re
import sys
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import mmdr
import torch
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for `tests.tables`, which knows the cells of a row

from emerging_optimizers import estimate  # noqa: E402 - behind the line that makes it importable
from emerging_optimizers.engine.options import EngineOptions, options_in  # noqa: E402 - behind the line that makes it importable
from emerging_optimizers.lab import plots  # noqa: E402 - behind the line that makes it importable
from emerging_optimizers.lab.palette import styles  # noqa: E402 - behind the line that makes it importable
from emerging_optimizers.lab.record import read_json  # noqa: E402 - behind the line that makes it importable
from emerging_optimizers.lab.views.describe import Curve, Figure, Key, Panel, View, alone  # noqa: E402 - as above
from emerging_optimizers.registry import OPTIMIZERS, Entry  # noqa: E402 - behind the line that makes it importable
from tests import tables  # noqa: E402 - behind the line that makes it importable

GENERATED = ROOT / "docs" / "generated"
NOTEBOOKS = ROOT / "examples" / "gradient_spike"
STARTS = ROOT / "benchmarks" / "results" / "starts.json"
FAMILIES = {
    "scalar_optimizers": "Element-wise",
    "orthogonalized_optimizers": "Orthogonalized",
    "shampoo": "Shampoo",
    "soap": "SOAP",
    "psgd": "PSGD",
    "riemannian_optimizers": "Riemannian",
}


# ---- a page for each optimizer ---------------------------------------------------------------------------------------


def heading(text: str, line: str = "-") -> str:
    return f"{text}\n{line * len(text)}\n"


def linked(text: str) -> str:
    """Papers, with links to arXiv, and pages of this site that the code names."""
    text = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"`\1 <https://arxiv.org/abs/\1>`__", text)
    return re.sub(r"`?docs/([\w/]+)\.md`?", r":doc:`/\1`", text)


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def facts(name: str, entry: Entry) -> dict[str, str]:
    """What the declaration of an optimizer says, in words."""
    cls = entry.load()
    default = inspect.signature(cls).parameters["lr"].default
    start = "not measured" if entry.start is None else f"{entry.start:g}, measured on a small job"
    own = "none, so that it asks for one" if default is inspect.Parameter.empty else f"{default:g}"
    at = "" if entry.rms is None else ", at an update RMS of 1; for a shape it is divided by the RMS there"
    match = "not measured" if entry.match is None else f"{entry.match:g} times AdamW's rate{at}"
    return {
        "Name": f"``{name}``, of :class:`{entry.path.replace(':', '.')}`",
        "Update": f"{tables.said(cls, 'Update')} (:doc:`symbols </optimizers>`)",
        "Paper": linked(entry.paper),
        "Takes": "parameters of any shape" if entry.elementwise else "matrices, stacks of matrices, and convolutions",
        "State": f"{tables.state(name, unit=4)} bytes for each number of an M x N weight",
        "Learning rate to start from": start,
        "Learning rate of the class": own,
        "Unit of the learning rate": (
            "Adam's: elements move by 0.18 to 2.2 times it" if entry.in_adams_unit else entry.unit
        ),
        '``match="adamw"``': match,
    }


def cost(name: str, entry: Entry) -> str:
    """What a step on one matrix takes, counted, and how to ask for other matrices."""
    matrix = torch.nn.Parameter(torch.empty(768, 768, device="meta"))
    with warnings.catch_warnings(), contextlib.suppress(ValueError):
        warnings.simplefilter("ignore")  # about the learning rate, which changes no cost
        counted = estimate([matrix], lambda params: entry.load()(params, lr=1e-3), seconds=False)
        work = f"{counted.flops / 1e9:.3g} GFLOP of products and factorizations" if counted.flops else "no product"
        return (
            f"For one matrix of 768 x 768, counted: {counted.state_bytes / 1e6:.1f} MB of state, {work} in a step, "
            f"{counted.peak_bytes / 1e6:.1f} MB for a moment.\n\n"
            "On your machine, with the time, for matrices that you name::\n\n"
            f'   eopt estimate {name} --shapes "12*768x768,4*3072x768"\n'
        )
    return (
        "Its step looks at values of the weights, so that it cannot be counted without them: time one on your model.\n"
    )


def measured(name: str) -> dict[str, list[tuple[float, ...]]]:
    """Held-out losses of all seeds after each evaluation, of AdamW, Muon and this one; nothing where it has not run."""
    rows = read_json(STARTS)["runs"] if STARTS.exists() else []
    found = {
        key: [*zip(*(row["losses"] for row in rows if row["optimizer"] == key), strict=True)]
        for key in dict.fromkeys(("adamw", "muon", name))
    }
    return found if all(found.values()) else {}


def pictured(name: str) -> View | None:
    """The figure on its page."""
    losses = measured(name)
    if not losses:
        return None
    every = read_json(STARTS)["every"]
    curves = [
        Curve(
            key=key,
            x=[every * (k + 1) for k in range(len(at_steps))],
            y=[median(x) for x in at_steps],
            band=([min(x) for x in at_steps], [max(x) for x in at_steps]),
        )
        for key, at_steps in losses.items()
    ]
    keys = [
        Key(key, color, mark=mark, note=f"{median(losses[key][-1]):.3f}")
        for key, (color, mark) in styles([*losses]).items()
    ]
    top = max(loss for at_steps in losses.values() for loss in at_steps[2])  # the first steps are far above
    figure = Figure(
        title="Held-out loss by step", views=alone(Panel("", curves)), x="step", y="nats", limits=(None, top)
    )
    return View(title=name, keys=keys, pictures={name: [[figure]]})


def on_a_small_job(name: str) -> str:
    """The section with the figure."""
    if not measured(name):
        return ""
    return (
        heading("On a small job")
        + f"\n.. image:: {name}.png\n   :alt: Held-out loss by step of {name}, beside AdamW and Muon\n\n"
        "A character GPT of 115,904 parameters, 100 steps. Each optimizer is made by the line above and starts at its "
        "own rate; nothing is tuned. Lines are medians of three seeds, bands reach from the least to the most. "
        "``python -m benchmarks.starts`` repeats it. Tuned comparisons: :doc:`/gallery`, :doc:`/training`.\n"
    )


def cautions(entry: Entry) -> list[str]:
    """When not to use it: what its class says, and what follows from its declaration."""
    cls = entry.load()
    found = [sentence(tables.said(cls, "When not to use it"))]
    if not entry.elementwise:
        found.append("Vectors (norms, biases): ``create_optimizer`` gives them to AdamW (:doc:`/routing`).")
    if not entry.default_trains:
        found.append("At the learning rate that the class has by default: weights hardly move there (:doc:`/routing`).")
    if not entry.in_adams_unit:
        found.append(f"At a learning rate of AdamW's as it is: {entry.unit}.")
    if "max_precond_dim" in cls.ranges:
        found.append(
            "Matrices with a side longer than ``max_precond_dim``: that side has no factor, or a diagonal one."
        )
    if "precondition_frequency" in cls.ranges:
        found.append(
            "With ``precondition_frequency`` above 1, but without ``warmup=`` or ``refresh_ramp=`` (:doc:`/tune`)."
        )
    return found


def with_references(doc: str) -> str:
    """A module's docstring, its references as a list with links."""
    text, _, references = doc.partition("\nReferences:\n")
    one_line_each = re.sub(r"\n {5,}", " ", references)
    items = "".join(f"- {linked(line.strip())}\n" for line in one_line_each.splitlines() if line.strip())
    return linked(text) + (f"\n\nReferences:\n\n{items}" if items else "\n")


def optimizer_page(name: str, entry: Entry) -> str:
    """The page of one optimizer, from its row in the registry, its docstrings and its signature."""
    cls = entry.load()
    module = importlib.import_module(cls.__module__)
    rows = "".join(f"   * - {key}\n     - {value}\n" for key, value in facts(name, entry).items())
    bullets = "".join(f"- {line}\n" for line in cautions(entry))
    # The one without a rate of its own is SOAP on stacks.
    soap, adamw = OPTIMIZERS["soap"].start, OPTIMIZERS["adamw"].start
    rate = "" if entry.start is not None else f", lr={soap:g}, companion_lr={adamw:g}"
    return "\n".join(
        [
            heading(f"{cls.__name__} (``{name}``)", "="),
            sentence(entry.description) + "\n",
            "Give it a model, and it takes the parameters that it is made for::\n\n"
            "   from emerging_optimizers import create_optimizer\n\n"
            f'   optimizer = create_optimizer("{name}", model{rate})\n',
            f".. list-table::\n   :widths: 30 70\n\n{rows}",
            heading("When to use it"),
            sentence(tables.said(cls, "When to use it")) + "\n",
            heading("When not to use it"),
            bullets,
            heading("Cost"),
            cost(name, entry),
            "Measured beside other libraries: :doc:`/performance`.\n",
            on_a_small_job(name),
            heading("Equations and notes"),
            with_references(inspect.getdoc(module) or ""),
            heading("Class and arguments"),
            f".. autoclass:: {cls.__module__}.{cls.__qualname__}\n",
            "The :doc:`options that every optimizer has </generated/options>` are arguments too.\n",
        ]
    )


def index_page() -> str:
    """The list of all of them, by family."""
    parts = [heading("Every optimizer", "="), "One page each, made from its declaration in the code.\n"]
    for package, title in FAMILIES.items():
        mine = {n: e for n, e in OPTIMIZERS.items() if e.path.startswith(f"emerging_optimizers.{package}.")}
        rows = "".join(
            f"   * - :doc:`{entry.load().__name__} <{name}>`\n     - {entry.description}\n"
            for name, entry in sorted(mine.items())
        )
        tree = "".join(f"   {name}\n" for name in sorted(mine))
        parts += [
            heading(title),
            f".. list-table::\n   :widths: 30 70\n\n{rows}",
            f".. toctree::\n   :hidden:\n\n{tree}",
        ]
    return "\n".join(parts)


def options_page() -> str:
    """The options that every optimizer has, from where they are declared."""
    parts = [
        heading("Options that every optimizer has", "="),
        "Each is an argument of every optimizer's constructor and of ``create_optimizer``.\n",
    ]
    for name, option in options_in(EngineOptions).items():
        rows = f"   * - Default\n     - ``{option.default!r}``\n   * - Allowed\n     - {option.check.allowed}\n"
        text = sentence(option.text.rstrip("."))
        parts += [heading(f"``{name}``"), f"{text}\n", f".. list-table::\n   :widths: 20 80\n\n{rows}"]
    return "\n".join(parts)


def generate(app: Sphinx) -> None:
    """Write the pages of the optimizers and put the notebooks beside them; what has not changed keeps its time."""
    pages = {f"optimizers/{name}.rst": optimizer_page(name, entry) for name, entry in OPTIMIZERS.items()}
    pages["optimizers/index.rst"] = index_page()
    pages["options.rst"] = options_page()
    for path in NOTEBOOKS.glob("*.ipynb"):
        pages[f"notebooks/{path.name}"] = path.read_text()
    pictures = {f"optimizers/{name}.png": name for name in OPTIMIZERS if measured(name)}
    for old in GENERATED.rglob("*.*"):
        if old.is_file() and old.relative_to(GENERATED).as_posix() not in {*pages, *pictures}:
            old.unlink()
    for name, text in pages.items():
        path = GENERATED / name
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    for place, name in pictures.items():
        path, view = GENERATED / place, pictured(name)
        if view is not None and not (path.exists() and path.stat().st_mtime > STARTS.stat().st_mtime):
            plots.draw(view, name, path)


def as_shown(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """A docstring as a page shows it.

    A module's has its references as a list. A class's loses the cells of its table, which its page says above.
    """
    if what == "module":
        lines[:] = with_references("\n".join(lines)).splitlines()
    if what == "class":
        text = re.sub(
            r"^(Update|When to use it|When not to use it): .+(?:\n {4}.+)*\n?", "", "\n".join(lines), flags=re.MULTILINE
        )
        lines[:] = text.replace("; the equations are in this module's docstring", "").splitlines()
    lines[:] = [linked(line) for line in lines]


# ---- formulas as MathML, which every browser draws by itself -------------------------------------------------


def _mathml(self: Any, text: str, display: bool) -> None:
    try:
        self.body.append(tex2mathml(text, as_block=display))
    except Exception as error:  # its own kinds are not exported: the formula has to be named
        raise ValueError(f"a formula that cannot be drawn: {text!r}: {error}") from error
    raise nodes.SkipNode


def inline_math(self: Any, node: nodes.math) -> None:
    _mathml(self, node.astext(), False)


def displayed_math(self: Any, node: nodes.math_block) -> None:
    text = node.astext()
    _mathml(self, text.strip(), True)


# ---- drawings and pictures -------------------------------------------------------------------------------------------

# The ways of Mermaid in greys, which suit every page; a note is wrapped instead of growing over its neighbours.
DRAWN = (
    '%%{init: {"theme": "neutral", "look": "classic", "fontFamily": "DejaVu Sans, Verdana, sans-serif",'
    ' "themeVariables": {"fontFamily": "DejaVu Sans, Verdana, sans-serif", "fontSize": "13px",'
    ' "noteBkgColor": "#ffffff", "noteTextColor": "#000000", "noteBorderColor": "#888888"},'
    ' "sequence": {"wrap": true, "width": 230, "messageFontSize": 12, "noteFontSize": 12, "actorFontSize": 13}}}%%\n'
)


def drawn(app: Sphinx, doctree: nodes.document) -> None:
    """Blocks of Mermaid, which GitHub draws in the browser, as pictures that are part of the page."""
    for block in list(doctree.findall(nodes.literal_block)):
        if block.get("language") == "mermaid":
            svg = mmdr.render(DRAWN + block.astext()).svg()
            own = svg.replace("merman", f"drawing-{app.env.new_serialno('drawing')}")  # the names in it, once on a page
            block.replace_self(nodes.raw("", f'<div class="drawing">{own}</div>', format="html"))


def described(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """A picture that nobody describes, as those of a notebook are, is named by its section."""
    for image in doctree.findall(nodes.image):
        above = image.parent
        while not (above is None or isinstance(above, nodes.section)):
            above = above.parent
        if "alt" not in image and above is not None:
            image["alt"] = f"Figure: {above[0].astext()}"


def enlarged(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """A click on a picture opens it alone, as large as it is: the column is narrow, a telephone narrower."""
    if "body" in context:
        picture = r'(<img [^>]*src="([^"]*_images/[^"]+)"[^>]*>)'
        context["body"] = re.sub(picture, r'<a class="picture" href="\2">\1</a>', context["body"])


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("builder-inited", generate)
    app.connect("autodoc-process-docstring", as_shown, priority=100)  # before napoleon
    app.add_html_math_renderer("mathml", (inline_math, None), (displayed_math, None))
    app.connect("doctree-read", drawn)
    app.connect("doctree-resolved", described)
    app.connect("html-page-context", enlarged)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
