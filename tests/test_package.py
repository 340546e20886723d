"""What importing costs, what is exported, and what every registered optimizer documents."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import emerging_optimizers
from emerging_optimizers.registry import OPTIMIZERS

ROOT = Path(__file__).parents[1]


def python(code: str) -> str:
    """The output of a fresh interpreter, which has imported nothing yet."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_no_torch_no_optimizer_and_no_extra():
    loaded = set(python("import sys, emerging_optimizers; print(*sys.modules)").split())
    assert "emerging_optimizers.registry" in loaded
    assert not loaded & {"torch", "numpy", "triton", "matplotlib", "tyro", "rich", "jinja2"}
    assert not loaded & {entry.path.split(":")[0] for entry in OPTIMIZERS.values()}


def test_optimizers_import_and_step_without_triton_and_load_no_extra():
    loaded = python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from emerging_optimizers import create_optimizer, list_optimizers\n"
        "for name in list_optimizers():\n"
        "    p = torch.nn.Parameter(torch.ones(4, 3)); p.grad = torch.eye(4, 3)\n"
        "    create_optimizer(name, [p], lr=0.1).step()\n"
        "    assert not p.equal(torch.ones(4, 3)), name\n"
        "print(*sys.modules)\n"
    ).split()
    assert not set(loaded) & {"matplotlib", "tyro", "rich", "emerging_optimizers.lab"}
    published = ("published", "utils", "mixin", "legacy_soap", "weight_update_hooks", "contrib", "soap.soap_utils")
    assert not set(loaded) & {f"emerging_optimizers.{name}" for name in published}


def test_every_exported_name_resolves_and_stands_once_and_in_order():
    names = emerging_optimizers.__all__
    assert names == sorted(set(names))
    assert all(getattr(emerging_optimizers, name) is not None for name in names)
    assert dir(emerging_optimizers) == names
    with pytest.raises(AttributeError, match="no attribute 'Moun'"):
        emerging_optimizers.Moun  # noqa: B018  # looking is what raises


def test_type_checkers_see_the_names_that_are_exported():
    tree = ast.parse(Path(emerging_optimizers.__file__).read_text())
    imported = [name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names]
    assert sorted(name.name for name in imported if name.asname == name.name) == emerging_optimizers.__all__


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_registered_optimizer_loads_and_is_exported(name):
    cls = OPTIMIZERS[name].load()
    assert getattr(emerging_optimizers, cls.__name__) is cls


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_registered_optimizer_documents_every_argument_its_errors_and_an_example(name):
    cls = OPTIMIZERS[name].load()
    doc = inspect.getdoc(cls)
    for section in ("Args:", "Raises:", "Example:"):
        assert f"\n{section}\n" in doc
    arguments = doc.partition("\nArgs:\n")[2].partition("\nRaises:\n")[0]
    for parameter in inspect.signature(cls).parameters:
        # `stream_list` is accepted for old calls, has no effect, and says so when it is given
        assert parameter == "stream_list" or re.search(rf"^ +\**{parameter}: ", arguments, re.MULTILINE), parameter


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_module_of_a_registered_optimizer_has_its_equation_and_its_reference(name):
    doc = inspect.getmodule(OPTIMIZERS[name].load()).__doc__
    assert re.search(r"References:\n +\w.* (19|20)\d\d, ", doc)
    if ".. math::" not in doc:  # a class part only, which names the module that has them
        home = re.search(r"equations are those of `([\w.]+)`", doc)[1]
        assert ".. math::" in importlib.import_module(f"emerging_optimizers.{home}").__doc__


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_registry_entry_says_in_one_line_what_it_is_and_where_it_is_from(name):
    entry = OPTIMIZERS[name]
    assert entry.description
    assert "\n" not in entry.description
    assert re.search(r"\w+ .*20\d\d", entry.paper)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("OBLIQUE_S*", ["oblique_sgd", "oblique_steepest_adam", "oblique_steepest_sgd"]),
        ("soap", ["soap"]),
        ("none", []),
    ],
)
def test_list_optimizers_matches_shell_patterns_in_order(pattern, names):
    assert emerging_optimizers.list_optimizers(pattern) == names
    described = emerging_optimizers.list_optimizers(pattern, with_description=True)
    assert described == [(name, OPTIMIZERS[name].description) for name in names]
