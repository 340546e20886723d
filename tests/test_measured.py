"""`make coverage` and `make mutate`: what they make of a measurement, and which changes of a line are made."""

import ast
from pathlib import Path

import pytest

from tests.covered import judged
from tests.mutate import COMPARISONS, FOLDERS, PACKAGE, ROOT, Mutant, Seen, mutants, rounds, sample


def totals(lines: int, branches: int) -> dict[str, float]:
    return {"covered_lines": lines, "num_statements": 1000, "covered_branches": branches, "num_branches": 200}


def test_lines_and_branches_each_have_to_be_covered() -> None:
    assert judged(totals(950, 190)) == (0, "coverage: 950 of 1,000 lines (95.0 %); 190 of 200 branches (95.0 %)")
    status, words = judged(totals(1000, 189))
    assert (status, words.endswith("189 of 200 branches (94.5 %), fewer than 95 %")) == (1, True)
    status, words = judged(totals(949, 200))
    assert (status, "949 of 1,000 lines (94.9 %), fewer than 95 %;" in words) == (1, True)


def found(text: str, path: Path) -> set[str]:
    """The files that the mutants of a text make."""
    path.write_text(text)
    raw = text.encode()
    return {(raw[: m.start] + m.after.encode() + raw[m.end :]).decode() for m in mutants(path, "x.py")}


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("x = a < b", {"x = (a <= b)"}),
        ("x = a is None", {"x = (a is not None)"}),
        ("x = a + 1", {"x = (a - 1)", "x = a + (2)"}),
        ("x = a and b", {"x = (a or b)"}),
        ("x = not a", {"x = (a)"}),
        ("x = True", {"x = (False)"}),
        ("x = 0.0", {"x = (1.0)"}),
        ("x = b if a else c", {"x = (b if not a else c)"}),
        ("x = [b for b in c if b]", {"x = [b for b in c if (not (b))]"}),
        ("def f():\n    return a", {"def f():\n    return None"}),
        ("def f():\n    if a: b()", {"def f():\n    if (not (a)): b()", "def f():\n    if a: pass"}),
        ("self.a = b", {"pass"}),
        ('ä = "µ" if b < c else d', {'ä = "µ" if (b <= c) else d', "ä = ('µ' if not b < c else d)"}),
        # Nothing is changed where no test could tell: types, invariants, messages, what a module asks at import.
        ("x: int = a\nassert a < b\nif a:\n    b()", set()),
        ('def f(a: "int | None") -> "int | None":\n    """Words."""', set()),
        ('def f():\n    raise ValueError(f"{a + 1}")', {"def f():\n    pass"}),
    ],
)  # fmt: skip
def test_the_mutants_of_a_line(text: str, made: set[str], tmp_path: Path) -> None:
    assert found(text, tmp_path / "x.py") == made


def test_every_comparison_of_python_has_another() -> None:
    assert {*COMPARISONS} == {*ast.cmpop.__subclasses__()}


def test_every_mutant_of_the_package_is_python() -> None:
    for path in sorted(path for name in FOLDERS for path in (ROOT / PACKAGE / name).rglob("*.py"))[::7]:
        raw = path.read_bytes()
        for m in mutants(path, "x.py"):
            compile(raw[: m.start] + m.after.encode() + raw[m.end :], m.file, "exec", dont_inherit=True)


def test_a_sample_is_the_same_for_a_seed_and_leaves_out_what_is_not_counted() -> None:
    file = f"{PACKAGE}/engine/buckets.py"
    some = sample(20, 0, {file: set()})
    assert some == sample(20, 0, {file: set()})
    assert some != sample(20, 1, {file: set()})
    gone = {m.line for m in some}
    assert not gone & {m.line for m in sample(20, 0, {file: gone})}
    assert len(sample(10**6, 0, {f"{PACKAGE}/linalg/kronecker.py": set()})) < 10**6  # all that there are


def test_a_mutant_is_given_the_tests_that_run_its_line() -> None:
    file, shared = f"{PACKAGE}/engine/run.py", f"{PACKAGE}/distributed/plan.py"
    line, at_import = {"tests/a.py::test[1]", "tests/a.py::other"}, "tests/b.py::test"
    remote = "tests/distributed/test_plan.py::test"  # whose processes are not seen line by line
    lines = {3: line, 9: {at_import}}
    known = Seen({file: lines, shared: lines}, dict.fromkeys([*line, at_import, remote], 1.0), {})

    def given(file: str, number: int) -> set[str]:
        return known.tests(Mutant(file, number, number + 1, "constant", "1", "(2)", 0, 1))

    assert given(file, 3) == given(file, 2) == line
    assert given(file, 5) == {*line, at_import}
    assert given(shared, 3) == {*line, remote}


def test_every_test_is_looked_at_once_before_one_is_twice() -> None:
    some = rounds([["a1", "a2", "a3"], ["b"], [f"c{k}" for k in range(9)]])
    assert [name[0] for name in some] == [*"abc", *"ac", *"ac", *"cc"]
    assert len({*some}) == len(some)  # five of c's nine


def test_a_mutant_is_given_the_quick_tests_and_those_of_the_nearest_file_as_time_allows() -> None:
    file = f"{PACKAGE}/engine/guard.py"
    seconds = {"tests/a.py::quick": 1.0, "tests/a.py::slow": 9.0, "tests/engine/test_guard.py::test": 5.0}
    known = Seen({file: {3: {*seconds}}}, seconds, {})
    mutant = Mutant(file, 3, 3, "constant", "1", "(2)", 0, 1)
    near, quick, slow = "tests/engine/test_guard.py::test", "tests/a.py::quick", "tests/a.py::slow"
    assert known.chosen(mutant, 20.0) == [near, quick, slow]
    assert known.chosen(mutant, 6.0) == [near, quick]
    assert known.chosen(mutant, 0.1) == [near]
    assert Seen({file: {}}, {}, {}).chosen(mutant, 20.0) == []
