"""`public_api.py`, which mypy checks, holds every public name."""

import ast
from pathlib import Path

import pytest

import hfkd

PACKAGE = Path(hfkd.__file__).parent
PROGRAM = Path(__file__).with_name("public_api.py")


def used_names() -> set[str]:
    """Names in the program's code; those of its imports do not count."""
    return {node.id for node in ast.walk(ast.parse(PROGRAM.read_text())) if isinstance(node, ast.Name)}


def names_of_losses() -> set[str]:
    """What `__init__.py` publishes by `import A as A` or defines. Importing it would import torch."""
    names = set()
    for node in ast.parse((PACKAGE / "losses" / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names if alias.asname == alias.name}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def names_of_data() -> set[str]:
    for node in ast.parse((PACKAGE / "data" / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign):
            return set(ast.literal_eval(node.value))
    raise AssertionError("hfkd.data has no __all__")


def names_of_errors() -> set[str]:
    tree = ast.parse((PACKAGE / "errors.py").read_text())
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


PUBLIC = {
    "hfkd": set(hfkd.__all__),
    "hfkd.losses": names_of_losses(),
    "hfkd.data": names_of_data(),
    "hfkd.errors": names_of_errors(),
}


@pytest.mark.parametrize("room", PUBLIC)
def test_the_program_that_mypy_checks_uses_every_public_name(room):
    assert PUBLIC[room], f"{room} has no public names"
    assert PUBLIC[room] - used_names() == set()


def test_type_checkers_find_the_hints():
    assert (PACKAGE / "py.typed").is_file()
