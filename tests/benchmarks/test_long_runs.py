"""Many steps: bases stay orthonormal, state does not grow, nothing becomes NaN."""

import pytest

from benchmarks.long_runs import STEPS, WHEN, both_precisions, long_run, tables
from tests.cases import SEEDS, OptimizerCase


def assert_sound(case: OptimizerCase, steps: int) -> None:
    found = long_run(case, steps)
    assert found["finite"]
    assert len(found["state_bytes"]) == 1
    assert found["events"] == 0
    assert found["from_orthonormal"] is None or found["from_orthonormal"] < 1e-4
    assert found["largest_weight"] < 10


@pytest.mark.parametrize("case", SEEDS, ids=str)
def test_two_hundred_steps(case: OptimizerCase) -> None:
    assert_sound(case, 200)


@pytest.mark.slow  # 200 steps are in every run
@pytest.mark.parametrize("case", SEEDS, ids=str)
def test_twenty_thousand_steps(case: OptimizerCase) -> None:
    assert_sound(case, STEPS)


def test_the_page_has_a_row_for_each() -> None:
    apart = both_precisions(SEEDS[0], (1, 2))
    assert 0 <= apart["1"] < 1e-4
    case = next(case for case in SEEDS if case.name == "soap")
    found = {
        "environment": {"torch": "2"},
        "runs": {"soap": long_run(case, 100)},
        "precisions": {"soap": dict.fromkeys(map(str, WHEN), 1e-6)},
    }
    assert "| `soap` | yes |" in tables(found)
