"""Nothing is unpickled that may come from others, nothing is evaluated, and what users type is text on every page."""

import ast
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for folder in ("emerging_optimizers", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
# It reads what it has just made itself, in memory.
ALLOWED = {"emerging_optimizers/testing/checks_of_state.py": {"pickle.loads"}}
UNSAFE = {
    "eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "yaml.unsafe_load", "marshal.loads",
    "shelve.open", "dill.load", "dill.loads", "joblib.load", "cloudpickle.load", "cloudpickle.loads",
}  # fmt: skip


def unsafe(path: Path) -> set[str]:
    """The calls of a file that run what they read."""
    found = set()
    for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)
        if name in UNSAFE or (name == "torch.load" and not safe):
            found.add(name)
    return found


def test_nothing_is_unpickled_or_evaluated() -> None:
    found = {str(path.relative_to(ROOT)): calls for path in FILES if (calls := unsafe(path))}
    assert found == ALLOWED


def test_a_checkpoint_that_would_run_code_is_not_loaded(tmp_path: Path) -> None:
    pytest.importorskip("tyro", reason="the extra 'lab' is not installed")
    import torch

    from emerging_optimizers.lab.runs import _load

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "sprung",)

    torch.save(Trap(), tmp_path / "checkpoint.pt")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        _load(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "sprung").exists()


class Tags(HTMLParser):
    """What a browser would take for a tag or an attribute."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.update(name for name, _ in attrs)


@pytest.mark.parametrize("typed", ["<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "{{ 7 * 7 }}"])
def test_what_users_type_is_text_on_the_page(typed: str) -> None:
    pytest.importorskip("plotly", reason="plotly of the extra 'lab' is not installed")
    from emerging_optimizers.lab.page import Section, render
    from emerging_optimizers.lab.views.describe import Curve, Figure, Key, Panel, Table, View, alone, number

    def page(words: str) -> str:
        figure = Figure(title=words, x=words, y=words, views=alone(Panel(words, (Curve(key=words, y=(1.0, 2.0)),))))
        table = Table(title=words, head=(words, "x"), rows=((words, number(1.0, ".1f")),), keys=(words,))
        view = View(
            title=words, question=words, facts=words, keys=(Key(words, "red", note=words),), parts=(table, figure),
            pictures={},
        )  # fmt: skip
        section = Section(id=words, view=view, command=words, environment={words: words})
        return render([section, replace(section, id=f"{words} 2")], [words])

    harmless, harmful = page("name"), page(typed)
    assert typed not in harmful or "<" not in typed
    assert Tags(harmful).tags == Tags(harmless).tags
    assert Tags(harmful).attributes == Tags(harmless).attributes
