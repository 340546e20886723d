"""The precision experiment: what each precision leaves of eigenvalues and of the KL update, files."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from emerging_optimizers.engine.scalars import make_scalars
from emerging_optimizers.lab.__main__ import main
from emerging_optimizers.lab.config import UsageError
from emerging_optimizers.lab.forms import FORMS, ways
from emerging_optimizers.lab.precision import (
    PrecisionConfig,
    PrecisionResult,
    run_precision,
)
from emerging_optimizers.lab.present import show
from emerging_optimizers.lab.published import PublishedRule
from emerging_optimizers.lab.views.precision import precision_view
from emerging_optimizers.linalg.eigenbasis import floored
from emerging_optimizers.linalg.kronecker import conjugate_diagonal
from emerging_optimizers.soap.soap import SOAPRule, SOAPState

SMALL = PrecisionConfig(ranges=(1.0, 1e7), shape=(8, 16), draws=2)


@pytest.fixture(scope="module")
def result() -> PrecisionResult:
    return run_precision(PrecisionConfig(ranges=(1.0, 1e3, 1e7), draws=4))


# Operands round by at most 2^-11 in TF32 and 2^-8 in bfloat16; the sum over 128 entries averages that out.
@pytest.mark.parametrize(("precision", "least", "most"), [("high", 1e-5, 2**-11), ("medium", 1e-4, 2**-8)])
def test_a_reduced_product_loses_the_small_eigenvalues_and_keeps_the_large_ones(result, precision, least, most):
    flat, _, wide = result.eigenvalues_at(precision)
    for row in (flat, wide):
        assert least < row.of_largest < most
        assert row.large_worst < 10 * most
    assert flat.negative == 0
    assert wide.small_median > 1
    assert wide.negative > 0.05


def test_float32_keeps_all_but_the_last_digits(result):
    for row in result.eigenvalues_at("highest"):
        assert row.of_largest < 1e-6
        assert row.small_median < 0.02
        assert row.negative == 0


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_whitened_update_is_symmetric_and_positive_whatever_the_eigenvalues(result, precision):
    for floor in result.config.relative_floors:
        for own in {precision, "highest"}:
            for row in result.updates_at(precision, own, "whitened", floor):
                assert row.asymmetry < 1e-6
                assert row.positive


def test_under_tf32_the_published_update_is_neither(result):
    for own in ("high", "highest"):
        *_, wide = result.updates_at("high", own, "published", 0.0)
        assert wide.asymmetry > 0.5
        assert wide.smallest < -0.5


def test_without_a_floor_tf32_needs_the_whitened_form_and_float32_eigenvalues(result):
    errors = {way: result.updates_at(*way, 0.0)[-1].error for way in ways("high")}
    assert errors.pop(("high", "highest", "whitened")) < 0.1
    assert min(errors.values()) > 5


@pytest.mark.parametrize(("precision", "most"), [("highest", 2e-6), ("high", 4e-3), ("medium", 4e-2)])
def test_the_floor_makes_the_whitened_update_sound_at_any_range(result, precision, most):
    assert all(row.worst < most for row in result.updates_at(precision, precision, "whitened", 0.01))


@pytest.mark.parametrize(("form", "rule"), [("published", PublishedRule), ("whitened", SOAPRule)])
def test_the_forms_are_those_of_the_optimizers(form, rule):
    generator = torch.Generator().manual_seed(0)
    grad, left, right = (torch.randn(2, *shape, generator=generator) for shape in ((4, 6), (4, 4), (6, 6)))
    L, R = left @ left.mT, right @ right.mT
    bases = torch.linalg.eigh(L)[1], torch.linalg.eigh(R)[1]
    state = SOAPState(grad, grad, L, R, *bases, *map(conjugate_diagonal, (L, R), bases))
    kl = rule(use_kl_shampoo=True, first_step="eigenbasis")
    scalars = make_scalars(("shampoo_beta", "eps"), {"shampoo_beta": 0.0, "eps": 1e-8}, {"step": 1})
    eigenvalues = floored(state.eigvals_R, scalars.eps, kl.floor)
    found = kl.accumulate(grad, state, scalars).L
    torch.testing.assert_close(FORMS[form](grad, state.Q_R, eigenvalues), found, rtol=0, atol=0)


def test_white_gradients_meet_the_same_factors():
    matched, white = (run_precision(replace(SMALL, gradient=gradient)) for gradient in ("matched", "white"))
    assert matched.eigenvalues == white.eigenvalues
    assert matched.updates != white.updates


def test_the_same_configuration_gives_the_same_json_and_it_reads_back():
    result = run_precision(SMALL)
    text = json.dumps(result.to_json())
    assert json.dumps(run_precision(SMALL).to_json()) == text
    assert json.dumps(run_precision(replace(SMALL, seed=1)).to_json()) != text
    assert PrecisionResult.from_json(json.loads(text)) == result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precisions": ("low",)}, "names low; known are highest, high, medium"),
        ({"precisions": ()}, "--precisions must name at least one"),
        ({"ranges": (1.0, 1.0)}, "--ranges must name at least one value, and each of them once"),
        ({"ranges": (0.5,)}, "--ranges 0.5 is not in 1 to 1e\\+12"),
        ({"ranges": (float("nan"),)}, "--ranges nan is not in"),
        ({"relative_floors": ()}, "--relative-floors must"),
        ({"relative_floors": (1.0,)}, "--relative-floors 1 is not in"),
        ({"shape": (1, 4)}, "--shape 1 4 is too small"),
        ({"draws": 0}, "--draws is 0"),
    ],
)
def test_a_wrong_request_says_what_to_change(change, message):
    with pytest.raises(UsageError, match=message):
        replace(SMALL, **change)


def test_the_tables_fit_a_terminal():
    console = Console(record=True, width=80, file=io.StringIO())
    show(precision_view(run_precision(replace(SMALL, ranges=PrecisionConfig().ranges))).tables, console=console)
    text = console.export_text()
    # No label is broken over two lines: three tables of six measures, six of both forms, one of asymmetry.
    lines = [line for line in text.splitlines() if line[1:2].strip(" ─") and not line.startswith(" range")]
    assert len(lines) == 3 * 6 + 2 * (2 + 4 + 4) + 6
    assert "· float32 Λ" in text


@pytest.mark.parametrize("precisions", ["highest,high,medium", "medium", "highest"])
def test_the_command_writes_result_environment_and_figure(tmp_path, capsys, precisions):
    args = f"precision --shape 8 16 --ranges 1 1e7 --draws 2 --precisions {precisions}"
    main([*args.split(), "--out", str(tmp_path / "run")])
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {"result.json", "environment.json", "tables.md", "precision.png"}
    stored = PrecisionResult.from_json(json.loads((tmp_path / "run" / "result.json").read_text()))
    assert stored.config == replace(SMALL, precisions=tuple(precisions.split(",")))
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["command"][:3] == ["eopt", "precision", "--shape"]
    assert "relative error" in capsys.readouterr().out
