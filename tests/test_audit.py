"""What `make audit` makes of an answer: a finding fails, and what could not be asked is said."""

import json

from tests.audit import judged

SOUND = {"name": "tqdm", "version": "4.70.1", "vulns": []}
SKIPPED = {"name": "rich", "skip_reason": "Dependency not found on PyPI"}
HOLE = {"name": "jinja2", "version": "3.1.5", "vulns": [{"id": "GHSA-1", "fix_versions": ["3.1.6"]}]}


def answer(*packages: object) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


def test_a_finding_is_a_failure() -> None:
    status, words = judged(1, answer(SOUND, HOLE), "")
    assert status == 1
    assert words.startswith("audit: jinja2 3.1.5: GHSA-1, mended in 3.1.6\naudit: 1 known")


def test_nothing_found_is_none() -> None:
    assert judged(0, answer(SOUND), "") == (0, "audit: 0 known vulnerabilities in 1 packages")


def test_packages_of_which_nothing_is_known_are_counted() -> None:
    status, words = judged(0, answer(SOUND, SKIPPED), "")
    assert (status, "in 1 packages; of 1 others the index knows nothing" in words) == (0, True)


def test_no_answer_is_no_failure_and_says_why() -> None:
    status, words = judged(1, "", "Traceback\nConnectionError: pypi.org did not answer\n")
    assert (status, words) == (
        0,
        "audit: left out, pip-audit gave no answer (ConnectionError: pypi.org did not answer)",
    )
