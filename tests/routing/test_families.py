"""Every parameter of some eighty models has the role that an expert gives it (`families.py`)."""

import pytest

from emerging_optimizers import plan_parameters
from tests.routing.families import FAMILIES, Family, expected, installed

EVERY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@EVERY
@pytest.mark.parametrize("called", [False, True], ids=["by itself", "by a call"])
def test_every_parameter_has_the_role_that_the_models_code_gives_it(family: Family, called: bool) -> None:
    if not installed(family):
        pytest.skip(f"{family.package} is not installed")
    if called and family.example is None:
        pytest.skip("no example of a call")
    model = family.build()
    example = family.example() if called and family.example is not None else None
    plan = plan_parameters(model, "muon", lr=0.01, example=example)
    assert {route.name: route.role for route in plan} == expected(family, model)
