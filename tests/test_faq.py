"""The page of messages quotes what the code says."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import emerging_optimizers

PAGE = Path(__file__).parents[1] / "docs" / "faq.md"
QUOTES = re.findall(r"^```text\n(.*?)\n```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@cache
def texts() -> frozenset[str]:
    """Every text in the code; what is filled in when it is said is "..."."""
    found = set()
    for path in Path(emerging_optimizers.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(x.value if isinstance(x, ast.Constant) else "..." for x in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return frozenset(found)


def test_there_are_quotes() -> None:
    assert len(QUOTES) > 15


@pytest.mark.parametrize("quote", QUOTES, ids=lambda quote: quote[:50])
def test_a_quoted_message_stands_in_the_code(quote: str) -> None:
    assert any(quote in text for text in texts()), "the code says something else by now: quote that in docs/faq.md"
