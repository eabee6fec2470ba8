from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lightning_cap

ROOT = Path(lightning_cap.__file__).parent

# A room is a folder, or a file at the root. It may import from the rooms named here, and from all that those may import from.
MAY_IMPORT = {
    "cli": ["report", "callbacks", "classifier", "planning", "sweep"],
    "sweep": ["callbacks"],
    "planning": ["callbacks", "comparison", "classifier"],
    "callbacks": ["trainer", "export", "schedules", "_version"],
    "report": ["comparison"],
    "comparison": ["trainer", "export", "_version"],
    "trainer": ["pruners", "quantization"],
    "pruners": ["fisher", "healing"],
    "healing": ["solver", "calibration"],
    "fisher": ["solver", "calibration"],
    "solver": ["kernels", "sparsity"],
    "kernels": [],
    "calibration": ["sparsity"],
    "sparsity": ["utilities"],
    "schedules": ["utilities"],
    "data": ["utilities"],
    "export": ["quantization"],
    "quantization": ["sparsity"],
    "utilities": ["errors"],
    "oneshot": ["trainer"],
    "classifier": ["data", "schedules"],
    "tokens": ["classifier"],
    "errors": [],
    "_version": [],
}


def _module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = {_module_of(path): path for path in sorted(ROOT.rglob("*.py")) if path.name != "__init__.py"}
PACKAGES = {_module_of(path.parent): path for path in ROOT.rglob("*/__init__.py") if path.parent != ROOT}


def _reach(room: str) -> set[str]:
    return {room}.union(*(_reach(other) for other in MAY_IMPORT[room]))


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _statements(node: ast.AST) -> list[ast.AST]:
    """All nodes but those that only the type checker sees."""
    found = [node]
    for child in ast.iter_child_nodes(node):
        found += [] if _is_type_checking(child) else _statements(child)
    return found


def _imports(source: str) -> set[tuple[str, str]]:
    """``(module, name)`` that a source imports from the package, functions' own imports included; the name may be empty."""
    found = set()
    for node in _statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            found |= {(str(node.module), alias.name) for alias in node.names}
    ours = {(module, name) for module, name in found if module.split(".")[0] == "lightning_cap"}
    return {(module.removeprefix("lightning_cap").removeprefix("."), name) for module, name in ours}


def _file_of(module: str, name: str) -> str:
    """The file that ``from module import name`` reads it from; a package's re-export is that of the file behind it."""
    deeper = f"{module}.{name}".strip(".")
    if deeper in FILES or module in FILES:
        return deeper if deeper in FILES else module
    behind = (
        [m for m, exported in _imports(PACKAGES[module].read_text()) if exported == name] if module in PACKAGES else []
    )
    assert behind, f"{name} of {module or 'lightning_cap'}: the package's own __init__ is for users"
    return behind[0]


GRAPH = {name: {_file_of(*what) for what in _imports(path.read_text())} for name, path in FILES.items()}


def test_every_room_has_its_place() -> None:
    assert {name.split(".")[0] for name in FILES} == set(MAY_IMPORT)
    assert {path.parent for path in FILES.values()} - {ROOT} == {path.parent for path in PACKAGES.values()}


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down(name: str) -> None:
    room = name.split(".")[0]
    upward = {other for other in GRAPH[name] if other.split(".")[0] not in _reach(room)}
    assert not upward, f"{name} imports from {upward}; {room} may import from {sorted(_reach(room))}"


def test_report_reads_records_and_nothing_else() -> None:
    """Of what runs, trains and prunes, the tables and pictures know only what it leaves behind."""
    used = {other for name, others in GRAPH.items() if name.startswith("report.") for other in others}
    free = ("report", "utilities", "errors", "_version")
    others = {other for other in used if other.split(".")[0] not in free}
    assert others == {"comparison.records", "trainer.records", "trainer.run_records", "export.records"}


def test_no_files_import_each_other_in_a_circle() -> None:
    assert len(list(TopologicalSorter(GRAPH).static_order())) == len(FILES)


def test_package_inits_only_export_their_own_files() -> None:
    for package, path in PACKAGES.items():
        assert all(module.startswith(f"{package}.") for module, _ in _imports(path.read_text()))


def test_lightning_comes_from_one_place() -> None:
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] in ("pytorch_lightning", "lightning_fabric")], path


def _imports_of_tests(path: Path) -> set[str]:
    """What a file of the tests imports from other files of the tests, with the names."""
    found = set()
    for node in _statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "tests"}


def test_no_test_module_imports_another() -> None:
    """What two of them need is in `tests/support`, or a fixture in a `conftest.py`."""
    shared = ("tests.support", "tests.references")
    tests = Path(__file__).parent
    wrong = {
        str(path.relative_to(tests)): other
        for path in tests.rglob("*.py")
        for other in _imports_of_tests(path)
        if not other.startswith(shared)
    }
    assert not wrong


def test_the_reader_of_imports_sees_all_forms() -> None:
    source = """
from typing import TYPE_CHECKING
import lightning_cap.sparsity.masks
from lightning_cap import CAPPruningCallback
from lightning_cap.utilities import rng
from lightning_cap.solver import eliminate
def f():
    from lightning_cap.sparsity.targets import Targets
if TYPE_CHECKING:
    from lightning_cap.callbacks.pruning import X
"""
    assert _imports(source) == {
        ("sparsity.masks", ""),
        ("", "CAPPruningCallback"),
        ("utilities", "rng"),
        ("solver", "eliminate"),
        ("sparsity.targets", "Targets"),
    }
    assert _file_of("utilities", "rng") == "utilities.rng"
    assert _file_of("solver", "eliminate") == "solver.eliminate"
    with pytest.raises(AssertionError, match="for users"):
        _file_of("", "CAPPruningCallback")
