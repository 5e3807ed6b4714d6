"""The rooms of the package: each imports rooms below it alone, and no modules import one another in a circle."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hfkd

PACKAGE = Path(hfkd.__file__).parent
# From the ground up; a room imports those that stand before it.
ROOMS = (
    *("errors", "names", "plots", "losses", "models", "data", "recipe", "networks", "runs", "hub", "export"),
    *("teacher_cache", "comparison", "figures", "training", "search", "commands", "cli"),
)
# What a room must not import although it stands below.
FORBIDDEN = {
    "names": {"errors"},
    "plots": {"errors", "names"},
    "losses": {"names", "plots"},
    "models": {"losses"},
    "data": {"losses", "models"},
    "recipe": {"models"},
    "networks": {"recipe"},
    "runs": {"networks"},
    "export": {"recipe", "hub"},
    "cli": {*ROOMS} - {"errors", "commands"},
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below hfkd; a room by its own."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """The modules of the package that one imports, in functions and for type checkers too."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("hfkd")):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").removeprefix("hfkd").strip(".").split(".")]).strip(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".strip(".")
                yield inner if inner in MODULES else module


def room(name: str) -> str:
    return name.partition(".")[0]


ROOTS = {"", "__main__"}  # the public names, which are imported lazily, and `python -m hfkd`


def test_every_module_is_in_a_room():
    assert {room(name) for name in MODULES} - ROOTS == set(ROOMS)
    assert len([path for path in PACKAGE.glob("*.py")]) <= 6


@pytest.mark.parametrize("name", sorted(set(MODULES) - ROOTS))
def test_imports_go_down(name):
    own = room(name)
    allowed = {*ROOMS[: ROOMS.index(own) + 1], ""} - FORBIDDEN.get(own, set())
    assert {room(target) for target in imports(name)} - allowed == set()


def test_the_command_line_alone_imports_commands():
    importing = {room(name) for name in MODULES if any(room(target) == "commands" for target in imports(name))}
    assert importing == {"commands", "cli"}


def test_no_circle():
    """Of modules; imports within functions and for type checkers count, since they could hide one."""
    graph = {name: set(imports(name)) - {""} for name in MODULES if name not in ROOTS}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("name", [name for name in ROOMS if (PACKAGE / name).is_dir()])
def test_a_room_says_what_belongs_there(name):
    docstring = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text()))
    assert len(docstring.replace("\n", " ").split(". ")) >= 2 and "never" in docstring or "Only" in docstring


def test_imports_are_found(tmp_path, monkeypatch):
    """The reader itself: relative, absolute, in a function, of a submodule."""
    code = "from ..errors import HfkdError\nfrom . import fsdp\nfrom hfkd.data import x\n"
    code += "def f():\n    from .trainer import y\n"
    (tmp_path / "new.py").write_text(code)
    monkeypatch.setitem(MODULES, "training.new", tmp_path / "new.py")
    assert list(imports("training.new")) == ["errors", "training.fsdp", "data", "training.trainer"]
