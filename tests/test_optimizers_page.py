"""docs/optimizers.md has a whole row for every optimizer, and its state column is what the optimizer keeps."""

import re
from pathlib import Path

import pytest
import torch

from emerging_optimizers.registry import OPTIMIZERS, entry
from emerging_optimizers.soap import SOAP

PAGE = Path(__file__).parents[1] / "docs" / "optimizers.md"
CELLS = ("update", "paper", "when to use it", "state")


def table() -> dict[str, dict[str, str]]:
    """The cells of each row, by name."""
    rows: dict[str, dict[str, str]] = {}
    for line in PAGE.read_text().splitlines():
        if found := re.match(r"\| `(\w+)` \| (.*) \|$", line):
            cells = found[2].split(" | ")
            assert len(cells) == len(CELLS), line
            assert found[1] not in rows, line
            rows[found[1]] = dict(zip(CELLS, map(str.strip, cells), strict=True))
    return rows


ROWS = table()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_has_a_row_with_equation_paper_and_when_to_use_it(name):
    assert name in ROWS, f"docs/optimizers.md has no row for {name}"
    row = ROWS[name]
    assert all(row.values())
    assert re.search(r"arxiv\.org/abs/\d{4}\.\d{4,5}|(19|20)\d\d|pull request \d+", row["paper"])


def test_it_has_no_row_of_an_optimizer_that_does_not_exist():
    assert ROWS.keys() <= OPTIMIZERS.keys()


def numbers(text: str, M: int, N: int) -> float:
    """What the state column says for an M x N matrix: "2 + 2 M/N + 2 N/M", "2 S/T for sides S <= T", "1 + 4/N"."""
    formula = re.split(r",| for | \((?=[a-z])", text)[0]
    assert re.fullmatch(r"[\d MNSTr+/()]+", formula), text
    product = re.sub(r"(?<=[\dr]) +(?=[MNSTr(])", "*", formula)
    return float(eval(product, {"M": M, "N": N, "S": min(M, N), "T": max(M, N), "r": min(M, N, 64)}))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_its_state_column_is_what_it_keeps(name):
    """Numbers of state for each number of the weight; the vectors and counts beside it are less than 3 % here."""
    M, N = (192, 192) if "square" in ROWS[name]["state"] else (224, 160)
    p = torch.nn.Parameter(0.02 * torch.randn(M, N, generator=torch.Generator().manual_seed(0)))
    options = {} if name != "spectron" else {"truncation_tolerance": 1.0}
    optimizer = entry(name).load()([p], lr=1e-3, **options)
    optimizer._init_group(optimizer.param_groups[0], skip_non_grad_params=False)
    assert all(x.dtype == torch.float32 for x in optimizer.state[p].values())
    kept = sum(x.numel() for x in optimizer.state[p].values())
    assert kept / (M * N) == pytest.approx(numbers(ROWS[name]["state"], M, N), rel=0.03)


def test_a_stack_of_soap_and_stacked_soap_is_what_their_docstring_says():
    """2 b R C + 2 b (S^2 + T^2), and 2 b R C + 2 T^2 + 2 (b S)^2 + T + b S: less where T^2 > b S^2."""
    b, T, S = 2, 24, 8
    kept = {}
    for cls in (SOAP, entry("stacked_soap").load()):
        p = torch.nn.Parameter(torch.ones(b, T, S))
        optimizer = cls([p], lr=1e-3)
        optimizer._init_group(optimizer.param_groups[0])
        kept[cls.__name__] = sum(x.numel() for key, x in optimizer.state[p].items() if key != "step")
    assert kept == {
        "SOAP": 2 * b * T * S + 2 * b * (S**2 + T**2),
        "StackedSoap": 2 * b * T * S + 2 * T**2 + 2 * (b * S) ** 2 + T + b * S,
    }
