from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lightning_cap

ROOT = Path(lightning_cap.__file__).parent

# From high to low; a file imports only from files lower. A package stands where its first file stands.
ORDER_ROWS = [
    ("cli",),
    (
        "report.comparison",
        "report.pictures",
        "report.curves",
        "report.mask_plots",
        "report.planes",
        "report.rows",
        "report.style",
    ),
    ("oneshot",),
    (
        "comparison.compare",
        "comparison.work",
        "comparison.extras",
        "comparison.plan",
        "comparison.surface",
        "comparison.fisher_block",
        "comparison.rows",
        "comparison.identity",
        "comparison.measure",
        "comparison.results",
    ),
    ("module",),
    (
        "data.imagenet",
        "data.digits",
        "data.base",
        "data.reading",
        "data.augment",
        "data.recipes",
    ),
    ("callback",),
    (
        "summary",
        "event_log",
        "event",
    ),
    (
        "lr_cycles",
        "regrowth",
        "resume",
        "run",
        "cycle",
        "ema",
    ),
    (
        "stepping",
        "progress",
        "calibration",
    ),
    ("lr",),
    (
        "schedules.gradual",
        "schedules.recurrent",
    ),
    ("schedules.base",),
    ("storage",),
    (
        "pruners.cap",
        "pruners.woodfisher",
        "pruners.mfac",
        "pruners.layerwise",
        "pruners.blockwise",
        "pruners.fast_cap",
        "pruners.gradient",
        "pruners.obd",
        "pruners.drop_and_grow",
        "pruners.magnitude",
        "pruners.random",
        "pruners.scored",
    ),
    ("pruners.base",),
    ("sources",),
    ("planning",),
    ("ranking",),
    ("allocation",),
    ("patterns",),
    (
        "solver.eliminate",
        "solver.reconstruct",
        "solver.alone",
        "solver.backend",
        "solver.numba_backend",
        "solver.at_once",
        "solver.groups",
        "solver.torch_backend",
        "solver.triton_backend",
        "solver.triton_kernels",
    ),
    ("matrix_free",),
    (
        "fisher",
        "staging",
    ),
    ("layer_inputs",),
    (
        "gradients",
        "vmap_support",
    ),
    ("masks",),
    ("targets",),
    ("layout",),
    ("distributed",),
    ("linalg",),
    ("chunks",),
    (
        "cpu.blocks",
        "cpu.packed",
        "cpu.pools",
        "cpu.tile",
        "cpu.jit",
        "cpu.threads",
    ),
    ("rng",),
    ("hooks",),
    ("errors",),
    ("_version",),
]
ORDER = [name for row in ORDER_ROWS for name in row]
PACKAGES = {"report", "comparison", "data", "schedules", "pruners", "solver", "cpu"}
HEIGHT = {name: -index for index, name in enumerate(ORDER)}
HEIGHT |= {package: max(h for n, h in HEIGHT.items() if n.startswith(f"{package}.")) for package in PACKAGES}


def _module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _files() -> dict[str, Path]:
    return {_module_of(path): path for path in sorted(ROOT.rglob("*.py")) if path.name != "__init__.py"}


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _statements(node: ast.AST) -> list[ast.AST]:
    """All nodes but those that only the type checker sees."""
    found = [node]
    for child in ast.iter_child_nodes(node):
        found += [] if _is_type_checking(child) else _statements(child)
    return found


def _imports(source: str) -> set[str]:
    """Modules of the package that a source imports, functions' own imports included, without the package's name."""
    found = set()
    for node in _statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            deeper = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("lightning_cap.") in HEIGHT else str(node.module) for name in deeper]
        else:
            continue
        found |= {name for name in names if name.split(".")[0] == "lightning_cap"}
    return {name.removeprefix("lightning_cap").removeprefix(".") for name in found}


def test_every_file_has_its_place() -> None:
    assert set(_files()) == set(ORDER)
    assert {path.parent.name for path in ROOT.rglob("*/__init__.py") if path.parent != ROOT} == PACKAGES


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_down(name: str) -> None:
    imports = _imports(_files()[name].read_text())
    unknown = imports - HEIGHT.keys()
    assert not unknown, f"{name} imports {unknown}; the package's own __init__ is for users"
    upward = {other for other in imports if HEIGHT[other] >= HEIGHT[name]}
    assert not upward, f"{name} imports from {upward}, which are not lower"


def test_package_inits_only_export_their_own_files() -> None:
    for package in PACKAGES:
        assert all(name.startswith(f"{package}.") for name in _imports((ROOT / package / "__init__.py").read_text()))


def test_lightning_comes_from_one_place() -> None:
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] in ("pytorch_lightning", "lightning_fabric")], path


def test_the_reader_of_imports_sees_all_forms() -> None:
    source = """
from typing import TYPE_CHECKING
import lightning_cap.masks
from lightning_cap import rng, CAPPruningCallback
from lightning_cap.solver import Progress
def f():
    from lightning_cap.targets import Targets
if TYPE_CHECKING:
    from lightning_cap.callback import X
"""
    assert _imports(source) == {"masks", "rng", "", "solver", "targets"}
