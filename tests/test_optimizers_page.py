"""The tables of optimizers are those that `make tables` writes, and their state column is what an optimizer keeps."""

import re

import pytest
import torch

from emerging_optimizers.registry import OPTIMIZERS, entry
from emerging_optimizers.soap import SOAP
from tests import tables


@pytest.mark.parametrize("path", tables.files(), ids=lambda path: path.name)
def test_a_file_has_what_follows_from_the_optimizers(path):
    assert path.read_text() == tables.files()[path], f"make tables writes {path.name} anew"


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda path: path.name)
def test_a_page_has_a_row_of_every_optimizer(page):
    names = re.findall(r"^\| `(\w+)` \| .+ \|$", page.read_text(), re.MULTILINE)
    assert sorted(names) == sorted(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_its_class_says_its_update_and_when_to_use_it_and_its_row_where_it_is_from(name):
    cells = {cell: tables.CELLS[cell](name, entry(name)) for cell in ("update", "when to use it", "paper")}
    assert not [cell for cell in cells.values() if "|" in cell]  # which would end the cell
    assert tables.said(entry(name).load(), "When not to use it")  # on its page of the site
    assert re.search(r"arxiv\.org/abs/\d{4}\.\d{4,5}|(19|20)\d\d|pull request \d+", cells["paper"])


def numbers(text: str, M: int, N: int) -> float:
    """What the state column says for an M x N matrix: "2 + 2 M/N + 2 N/M", "2 S/T", "2 r/M"."""
    assert re.fullmatch(r"[\d MNSTr+/]+", text), text
    product = re.sub(r"(?<=\d) (?=[MNSTr])", "*", text)
    return float(eval(product, {"M": M, "N": N, "S": min(M, N), "T": max(M, N), "r": min(M, N, 64)}))


@pytest.mark.parametrize(("M", "N"), [(192, 192), (128, 240)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_its_state_column_is_what_it_keeps(name, M, N):
    """Numbers of state for each number of the weight; the vectors and counts beside it are less than 4 % here."""
    p = torch.nn.Parameter(0.02 * torch.randn(M, N, generator=torch.Generator().manual_seed(0)))
    optimizer = entry(name).load()([p], lr=1.0, **tables.OPTIONS.get(name, {}))
    optimizer._init_group(optimizer.param_groups[0], skip_non_grad_params=False)
    assert all(x.dtype == torch.float32 for x in optimizer.state[p].values())
    kept = sum(x.numel() for x in optimizer.state[p].values())
    assert kept / (M * N) == pytest.approx(numbers(tables.state(name), M, N), rel=0.04)


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
