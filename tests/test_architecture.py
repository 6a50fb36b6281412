"""The house rules of docs/architecture.md: folders, sizes, and which way imports go."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dask_imgcurator

PACKAGE = Path(dask_imgcurator.__file__).parent

#: Each imports only from those that stand before it, and from itself.
FLOORS = """
config schema json_fields results plugins monitor storage clusters engine images models steps select duplicates
similarity exports report runs jobs checks cli
""".split()

RAPIDS = {"cudf", "cupy", "rmm", "dask_cuda", "dask_cudf", "pylibcudf", "cuml", "cuvs", "raft", "kvikio", "numba_cuda"}

MOST_MODULES, MOST_LINES = 8, 400

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Modules that a file imports when it runs, at any level; ``.name`` is one of this package."""
    package = path.relative_to(PACKAGE).parts[:-1]
    found: set[str] = set()

    def add(name: str, names: list[str]) -> None:
        inside = [f"{name}.{n}" if name else n for n in names]
        found.update(f".{n if n in MODULES else name}" for n in inside if n in MODULES or name)

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                walk(child)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if node.level:
                base = package[: len(package) - node.level + 1]
                add(".".join([*base, *([node.module] if node.module else [])]), names)
            elif node.module and node.module.partition(".")[0] == "dask_imgcurator":
                add(node.module.partition(".")[2], names)
            else:
                found.add((node.module or "").partition(".")[0])
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(ast.parse(path.read_text()))
    return found


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def floor_of(module: str) -> str:
    return module.partition(".")[0]


def test_the_floors_name_every_folder_and_root_module() -> None:
    assert {floor_of(module) for module in MODULES} == set(FLOORS)


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_go_one_way(floor: str) -> None:
    allowed = FLOORS[: FLOORS.index(floor) + 1]
    upward = {
        f"{module} -> {name[1:]}"
        for module, names in IMPORTS.items()
        if floor_of(module) == floor
        for name in names
        if name.startswith(".") and floor_of(name[1:]) not in allowed
    }
    assert upward == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    left = {
        module: {n[1:] for n in names if n.startswith(".") and n[1:] != module} for module, names in IMPORTS.items()
    }
    while free := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in free:
            del left[module]
    assert left == {}


def test_folders_and_modules_are_small() -> None:
    folders = {path.parent for path in FILES if path.parent != PACKAGE}
    crowded = {
        f.name: n for f in folders if (n := len([p for p in f.glob("*.py") if p.stem != "__init__"])) > MOST_MODULES
    }
    lines = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert crowded == {}
    assert {module: n for module, n in lines.items() if n > MOST_LINES} == {}


def test_only_the_seam_imports_rapids() -> None:
    assert {module for module, names in IMPORTS.items() if names & RAPIDS} == {"engine.cudf"}
    assert {module for module, names in IMPORTS.items() if ".engine.cudf" in names} == {"engine.backend"}


def test_only_the_seam_asks_for_a_card() -> None:
    """Others get a device, or a frame, and act on that."""
    asking = {name for name, path in MODULES.items() if "cuda.is_available" in path.read_text()}
    assert asking == {"engine.backend", "checks.gpu"}  # the latter is there to tell
    by_name = {name for name, path in MODULES.items() if re.search(r"""[!=]= ["']cudf""", path.read_text())}
    assert {floor_of(name) for name in by_name} <= {"engine"}


def test_importing_the_package_and_help_are_light() -> None:
    code = (
        "import sys, dask_imgcurator, dask_imgcurator.cli.main\n"
        "heavy = {'torch', 'torchvision', 'open_clip', 'timm', 'nvidia', 'cudf', 'cupy', 'sklearn', 'skimage'}\n"
        "heavy |= {'distributed', 'pandas', 'pyarrow', 'scipy', 'dask', 'yaml', 'rich', 'importlib.metadata'}\n"
        "heavy |= {'urllib.request', 'asyncio', 'concurrent.futures'}\n"
        "for words in (['--help'], ['select', '--help'], ['nonsense']):\n"
        "    try:\n"
        "        dask_imgcurator.cli.main.cli(words)\n"
        "    except SystemExit:\n"
        "        pass\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Keep the rows of a score table" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
