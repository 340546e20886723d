"""A new optimizer, ready to be changed: momentum, in its file, with its rows and its reference.

    make new NAME=cautious_muon
    make new NAME=tiger KIND=elementwise

It writes four files and no other; what follows from them `make tables` writes, which comes behind it.
"""

import argparse
import keyword
import re
import sys
from pathlib import Path
from string import Template

import emerging_optimizers
from emerging_optimizers.registry import OPTIMIZERS

ROOT = Path(__file__).parents[1]
LONGEST = 28  # so that the path in the row of entries.py fits on a line
KINDS = {
    "matrix": {
        "family": "orthogonalized_optimizers",
        "in_row": "",
        "in_rule": "",
        "what": "Momentum, matrix by matrix.",
        "Params": "MatrixParams",
        "options": """(
    LearningRate,
    MatrixParams,
    Momentum,
    WeightDecay,
    WeightDecayMethod,
    given,
)""",
        "parts": "Momentum_BMN",
        "Annotated": "",
        "Part": "Momentum_BMN",
        "m": "momentum_BMN",
        "refused": "a value out of its range, or a parameter with fewer than two dimensions.",
    },
    "elementwise": {
        "family": "scalar_optimizers",
        "in_row": "        elementwise=True,\n",
        "in_rule": "    elementwise = True\n",
        "what": "Momentum, element by element.",
        "Params": "Params",
        "options": "LearningRate, Momentum, Params, WeightDecay, WeightDecayMethod, given",
        "parts": "Decay, Part",
        "Annotated": "Annotated, ",
        "Part": 'Annotated[Tensor, Part(rounds=True, averages=Decay("momentum"))]',
        "m": "momentum",
        "refused": "a value out of its range.",
    },
}

OPTIMIZER = r'''r"""$Class: momentum, the start from which its own law is written.

.. math::
    m_t &= \mu m_{t-1} + (1 - \mu) G_t \\
    W_t &= (1 - \eta\lambda) W_{t-1} - \eta \, m_t

The learning rate scales the gradient, whatever its size. State: one tensor, 4 bytes a parameter.

References:
    Sutskever et al. 2013, On the Importance of Initialization and Momentum in Deep Learning, ICML.
"""

from dataclasses import dataclass
from typing import ${Annotated}Any, NamedTuple, Unpack

from torch import Tensor

from emerging_optimizers.engine import EngineOptions, Rule, RuleOptimizer, Scalars, Step, lerp
from emerging_optimizers.engine.options import $options
from emerging_optimizers.engine.parts import $parts


class ${Class}State(NamedTuple):
    """The momentum."""

    momentum_buffer: $Part


@dataclass(frozen=True, kw_only=True)
class ${Class}Rule(Rule):
    """$what"""

    State = ${Class}State
    reads = ("momentum",)
$in_rule
    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        $m = lerp(state.momentum_buffer, grad, 1 - t.momentum)
        return Step($m, ${Class}State($m))


class $Class(RuleOptimizer):
    """$Class; the equations are in this module's docstring.

    Update: m
    When to use it: as the start of a law of its own
    When not to use it: as it is, since SGD has it

    Raises:
        ValueError: $refused

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = $Class([w], lr=0.1, momentum=0.5)
        >>> w.grad = torch.eye(2)
        >>> optimizer.step()
        >>> w.detach()
        tensor([[0.9500, 1.0000],
                [1.0000, 0.9500]])
    """

    rule = ${Class}Rule

    def __init__(
        self,
        params: $Params,
        lr: LearningRate = 0.5,
        momentum: Momentum = 0.9,
        weight_decay: WeightDecay = 0.0,
        *,
        weight_decay_method: WeightDecayMethod = "decoupled",
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(**given(locals()))
'''

ENTRY = """    "$name": Entry(
        path="emerging_optimizers.$family.$name:$Class",
        description="momentum, the start from which its own law is written",
        paper="Sutskever et al. 2013",
${in_row}        unit="it scales the gradient, whatever its size",
    ),
"""

CASE = """    *_rows(
        "$name",
        {"lr": 5.0},
        {"": {}, "l2": _DECAY["l2"]},
        state=("momentum_buffer",),
        scale_free=False,
    ),
"""

REFERENCE = '''"""$Class: momentum, the start from which its own law is written.

    M <- mu M + (1 - mu) G        W <- W - lr M

Sutskever et al., 2013. To be written from the paper, number by number, and not from the rule.
"""

import torch
from torch import Tensor

from .weight_decay import decay_gradient, decay_weight


class Reference$Class:
    """$Class on one matrix in float64."""

    def __init__(
        self,
        lr: float = 0.5,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        weight_decay_method: str = "decoupled",
    ) -> None:
        self.lr, self.momentum = lr, momentum
        self.weight_decay, self.weight_decay_method = weight_decay, weight_decay_method
        self.t = 0
        self.momentum_buffer = torch.zeros(0)

    def step(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The weight after one step."""
        W, G, mu = weight.double(), grad.double(), self.momentum
        if self.t == 0:
            self.momentum_buffer = torch.zeros_like(W)
        self.t += 1

        G = decay_gradient(G, W, self.weight_decay, self.weight_decay_method)
        W = decay_weight(W, self.lr, self.weight_decay, self.weight_decay_method)
        averages = [mu * m + (1 - mu) * g for m, g in zip(self.momentum_buffer.flatten(), G.flatten(), strict=True)]
        self.momentum_buffer = torch.stack(averages).reshape(W.shape)
        return W - self.lr * self.momentum_buffer
'''


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def refusal(name: str, kind: str) -> str | None:
    """Why there can be no new optimizer of this name; None: there can."""
    if kind not in KINDS:
        return f"KIND={kind} is none of {', '.join(KINDS)}"
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name) or len(name) > LONGEST:
        return f"NAME={name} is not a name of at most {LONGEST} small letters, digits and _, such as cautious_muon"
    taken = {_plain(known): known for known in (*emerging_optimizers.__all__, *OPTIMIZERS)}
    if _plain(name) in taken:
        return f"NAME={name} is taken by {taken[_plain(name)]}; give another"
    there = [str(path.relative_to(ROOT)) for path in _files(name, kind) if path.exists()]
    return f"NAME={name} is taken by {' and '.join(there)}; give another" if there else None


def _files(name: str, kind: str) -> tuple[Path, Path]:
    package = ROOT / "emerging_optimizers" / KINDS[kind]["family"]
    return package / f"{name}.py", ROOT / "tests" / "reference" / f"{name}.py"


def _insert(path: Path, row: str, before: str) -> None:
    text = path.read_text()
    at = text.rindex(before)
    path.write_text(text[:at] + row + text[at:])


def write(name: str, kind: str) -> list[Path]:
    """Write the optimizer, its reference and its two rows; the files that have changed."""
    words = {"name": name, "Class": "".join(word.capitalize() for word in name.split("_")), **KINDS[kind]}
    optimizer, reference = _files(name, kind)
    optimizer.write_text(Template(OPTIMIZER).substitute(words))
    reference.write_text(Template(REFERENCE).substitute(words))
    entries, cases = ROOT / "emerging_optimizers" / "entries.py", ROOT / "tests" / "cases.py"
    rows = re.findall(r'^    "(\w+)": Entry\(\n', entries.read_text(), re.MULTILINE)
    behind = next((f'    "{known}": Entry(\n' for known in rows if known > name), "}\n")
    _insert(entries, Template(ENTRY).substitute(words), before=behind)
    _insert(cases, Template(CASE).substitute(words), before="]\nSEEDS")
    return [optimizer, entries, cases, reference]


def main() -> None:
    """Write it, or say in a sentence why not."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name")
    parser.add_argument("kind", nargs="?", default="matrix")
    asked = parser.parse_args()
    if why := refusal(asked.name, asked.kind):
        sys.exit(f"new: {why}")
    for path in write(asked.name, asked.kind):
        print(f"new: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
