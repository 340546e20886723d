"""What holds of the code itself: sizes, the contract of a rule, what the engine may name."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import emerging_optimizers
from emerging_optimizers.engine import Rule
from emerging_optimizers.engine.options import declared
from emerging_optimizers.engine.parts import parts_of
from emerging_optimizers.registry import OPTIMIZERS, entry

PACKAGE = Path(emerging_optimizers.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MEMBERS = 12  # of a rule: what a newcomer has to know at most


def test_no_file_is_longer_than_four_hundred_lines() -> None:
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in FILES}
    assert not {name: length for name, length in lengths.items() if length > 400}


def test_a_rule_has_few_members() -> None:
    tree = ast.parse(inspect.getsource(Rule))
    body = tree.body[0].body  # type: ignore[attr-defined]
    named = [n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    defined = [n.name for n in body if isinstance(n, ast.FunctionDef)]
    assert len([*named, *defined]) <= MEMBERS


@pytest.mark.parametrize("path", sorted((PACKAGE / "engine").glob("*.py")), ids=lambda path: path.name)
def test_the_engine_names_no_optimizer_and_no_key_of_a_state(path: Path) -> None:
    """Outside of docstrings, which give examples."""
    classes = {entry(name).load() for name in OPTIMIZERS}
    known = {cls.__name__ for cls in classes} | {cls.rule.__name__ for cls in classes}
    keys = {key for cls in classes for key in parts_of(getattr(cls.rule, "State", object)) if len(key) > 1}
    tree = ast.parse(path.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    words |= {
        n.value
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs
    }
    assert not words & (known | keys)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_help_says_every_option_and_the_signature_has_plain_types(name: str) -> None:
    cls = entry(name).load()
    doc = inspect.getdoc(cls) or ""
    missing = {option for option in cls.ranges if f"\n    {option}: " not in doc} - set(_everyones())
    documented_elsewhere = {"lr", "weight_decay", "weight_decay_method"}
    assert "Annotated" not in str(inspect.signature(cls))
    own = set(declared(cls.__init__).ranges)  # with those of its keywords
    assert not (missing & own) - documented_elsewhere


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_help_says_the_defaults_that_a_group_gets(name: str) -> None:
    cls = entry(name).load()
    arguments = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", inspect.getdoc(cls) or "", re.MULTILINE)
    for option, text in arguments:
        if option in cls.preset and (said := re.search(r"\sDefault (\S+)\.$", text)):
            assert said[1] == repr(cls.preset[option])


def _everyones() -> list[str]:
    from emerging_optimizers.engine import EngineOptions

    return list(EngineOptions.__annotations__)
