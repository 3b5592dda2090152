"""The floors of the house: a room imports only downwards."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FLOORS = [
    {"cli"},
    {"ckpt_tools"},
    {"ckpt_tables"},
    {"ckpt_verbs", "ckpt_progress"},
    {"trainer"},
    {"launch"},
    {"comm", "checkpoint", "diagnostics"},
    {"config", "events", "errors"},
]
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
PACKAGE = Path(__file__).parent.parent / "outlast"
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "outlast":
                names = [f"outlast.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("outlast.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_downwards(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        assert imported_rooms(path) == set()
        return
    for other in imported_rooms(path) - {room}:
        same_ground = {room, other} <= FLOORS[-1]
        assert same_ground or ROOMS[other] > ROOMS[room], f"{room} -> {other}"


def test_the_ground_floor_has_no_cycle() -> None:
    ground = {name: imported_rooms(PACKAGE / f"{name}.py") for name in FLOORS[-1]}
    assert ground == {"config": {"errors"}, "events": {"errors"}, "errors": set()}


UNTRUSTED = PACKAGE / "checkpoint" / "_untrusted.py"
"""Reads pickles of others, for import."""
EXPORTER = PACKAGE / "checkpoint" / "_foreign_torch.py"


def test_pickles_of_others_are_read_by_name_of_what_is_admitted_only() -> None:
    used = {"pickle": set(), "torch": set()}
    for node in ast.walk(ast.parse(UNTRUSTED.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in used:
            used[node.value.id].add(node.attr)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
            said = {word.arg: word.value for word in node.keywords}
            assert not said or (isinstance(said["weights_only"], ast.Constant) and said["weights_only"].value is True)
        if isinstance(node, ast.ClassDef) and node.name == "_Unpickler":
            assert "find_class" in {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    assert used == {"pickle": {"Unpickler", "UnpicklingError"}, "torch": {"load", "dtype"}}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_pickled_and_nothing_swallowed(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
            found = {"pickle", "dill", "cloudpickle", "shelve", "marshal"} & {n.split(".")[0] for n in names}
            assert found <= ({"pickle"} if path == UNTRUSTED else set())
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("torch", "load") or path == UNTRUSTED
            assert (node.value.id, node.attr) != ("torch", "save") or path == EXPORTER
            assert not (node.value.id == "dist" and node.attr.endswith("_object_list")), node.attr
            assert (node.value.id, node.attr) not in {("dist", "all_gather_object"), ("dist", "gather_object")}
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path}:{node.lineno}: bare except"
            body = [n for n in node.body if not isinstance(n, ast.Pass)]
            broad = isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            assert body or not broad, f"{path}:{node.lineno}: swallows everything"


def test_importing_outlast_imports_no_room_and_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, outlast; print([m for m in sys.modules if m.startswith('outlast.') or m == 'torch'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_are_short() -> None:
    long = {str(p.relative_to(PACKAGE)): n for p in FILES if (n := len(p.read_text().splitlines())) > 500}
    assert not long


def test_the_loop_fits_on_one_screen() -> None:
    assert len((PACKAGE / "trainer" / "loop.py").read_text().splitlines()) <= 80
