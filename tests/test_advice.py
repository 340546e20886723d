"""The pages that advise say no number that is not measured on a page to which they link."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def numbers(text: str) -> set[str]:
    """Numbers with a decimal point or an exponent; links and blocks of code are left out."""
    prose = re.sub(r"^```.*?^```|\]\([^)]*\)", "", text, flags=re.MULTILINE | re.DOTALL)
    return set(re.findall(r"(?<![\w.])\d+\.\d+(?:e-?\d+)?(?!\w)|(?<![\w.])\d+e-?\d+", prose))


@pytest.mark.parametrize("name", ["choose", "tune"])
def test_every_number_stands_on_a_page_that_is_linked(name: str) -> None:
    text = (DOCS / f"{name}.md").read_text()
    linked = set(re.findall(r"\]\(([\w/]+\.md)", text))
    assert linked
    measured = set().union(*(numbers((DOCS / page).read_text()) for page in linked))
    assert not numbers(text) - measured
