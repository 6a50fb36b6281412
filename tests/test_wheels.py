"""What we use of RAPIDS and DALI, looked up in the installed wheels; no card or driver is needed.

Skipped without the wheels. In an environment of its own, since RAPIDS brings another Dask::

    python3 -m venv .venv-wheels && .venv-wheels/bin/pip install -e ".[cu13]" mypy pytest pytest-xdist
    .venv-wheels/bin/python -m pytest -m wheels
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import dask_imgcurator

pytestmark = pytest.mark.wheels

cudf = pytest.importorskip("cudf")

PACKAGE = Path(dask_imgcurator.__file__).parent
BENCHMARKS = PACKAGE.parent / "benchmarks"

#: Where these libraries are used.
FILES = [PACKAGE / "engine" / "cudf.py", PACKAGE / "images" / "dali.py", *BENCHMARKS.glob("gpu*.py")]
LIBRARIES = {"cudf", "cupy", "cuvs", "dask_cuda", "dask_cudf", "nvidia", "pylibcudf", "rmm"}

#: What is used of their objects, which the source does not tell: names, and arguments by keyword.
METHODS = {
    "cudf.DataFrame": "from_arrow to_arrow(preserve_index) dtypes columns iloc assign reset_index __getitem__",
    "cudf.Series": "from_arrow to_arrow from_pylibcudf(metadata) null_count notna nans_to_nulls astype fillna dtype"
    " list values index name __getitem__ __len__",
    "cudf.ListDtype": "element_type to_arrow",
    "cudf.core.accessors.lists.ListMethods": "len leaves",
    "pylibcudf.Column": "from_cuda_array_interface from_array",
    "pylibcudf.Table": "columns",
    "dask_cuda.LocalCUDACluster": "__init__(n_workers threads_per_worker rmm_async rmm_allocator_external_lib_list)",
    "cuvs.cluster.kmeans.KMeansParams": "__init__(n_clusters hierarchical hierarchical_n_iters)",
    "nvidia.dali.pipeline.Pipeline": "__init__(batch_size num_threads device_id prefetch_queue_depth)"
    " feed_input run build set_outputs",
    "nvidia.dali.backend": "ReleaseUnusedMemory",
}


def used(path: Path) -> Iterator[str]:
    """Dotted names of these libraries in a file, as far as the source tells them."""
    tree = ast.parse(path.read_text())
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0]
                for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    ours = {name: full for name, full in names.items() if full.partition(".")[0] in LIBRARIES}
    yield from ours.values()
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if re.fullmatch(r"[\w.]+", text) and (first := text.partition(".")[0]) in ours:
            yield ours[first] + text[len(first) :]


def find(name: str) -> Any:
    """The object of a dotted name."""
    parts, found = name.split("."), None
    for i, part in enumerate(parts):
        if found is not None and hasattr(found, part):
            found = getattr(found, part)
        else:
            found = importlib.import_module(".".join(parts[: i + 1]))
    return found


NAMES = sorted({name for path in FILES for name in used(path)})


def test_names_are_found_in_the_source() -> None:
    assert {"cudf.Series.from_pylibcudf", "pylibcudf.copying.OutOfBoundsPolicy.NULLIFY", "nvidia.dali.fn.slice"} <= set(
        NAMES
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there(name: str) -> None:
    assert find(name) is not None


@pytest.mark.parametrize("owner", METHODS)
def test_every_method_is_there_with_its_arguments(owner: str) -> None:
    thing = find(owner)
    for name, arguments in re.findall(r"(\w+)(?:\(([\w ]*)\))?", METHODS[owner]):
        method = getattr(thing, name)
        if not arguments:
            continue
        try:
            there = inspect.signature(method).parameters
            text = " ".join(there) + (str(inspect.getdoc(thing)) if "kwargs" in there else "")
        except ValueError:  # of Cython
            text = str(inspect.getdoc(method)) + str(inspect.getdoc(thing))
        assert [a for a in arguments.split() if not re.search(rf"\b{a}\b", text)] == [], name


# --- types ----------------------------------------------------------------------------------------

#: pylibcudf, RMM and DALI ship their types. The code of the others has a few, which say little: what is used of them is
#: looked up above.
MYPY = """
[mypy]
check_untyped_defs = True
implicit_reexport = True
disable_error_code = import-untyped
[mypy-cudf.*,cupy.*,cuvs.*,dask_cuda.*,dask_cudf.*]
follow_untyped_imports = True
"""

#: Arguments that there are not: seen only if the types are.
WRONG = {
    "pylibcudf": "import pylibcudf as plc; plc.copying.gather(1, 2, 3)",
    "dali": "from nvidia.dali import fn; fn.resize(1, no_such=1)",
}


def test_what_lies_behind_the_seam_has_the_types_of_the_wheels(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "mypy.ini").write_text(MYPY)
    for name, call in WRONG.items():
        (tmp_path / f"wrong_{name}.py").write_text(call)
    options = ["--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", str(tmp_path / "cache")]
    files = [*FILES, *tmp_path.glob("*.py")]
    environment = {**os.environ, "MYPYPATH": os.pathsep.join(map(str, (PACKAGE.parent, BENCHMARKS)))}
    command = [sys.executable, "-m", "mypy", *options, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    # DALI makes the members of `nvidia.dali.types` when it is imported: they too are looked up above.
    errors = [e for e in done.stdout.splitlines() if ": error: " in e and "Module has no attribute" not in e]
    assert [e for e in errors if "wrong_" not in e] == []
    assert {name for name in WRONG if any(f"wrong_{name}.py" in e for e in errors)} == set(WRONG), done.stdout


# --- dtypes, which cuDF makes without a driver ----------------------------------------------------


def test_lists_keep_their_type() -> None:
    """Of lists that are all null or empty, cuDF makes lists of nulls, or nulls."""
    from dask_imgcurator.engine.cudf import arrow_field

    for item, type_ in (("float32", pa.float32()), ("int64", pa.int64()), ("object", pa.string())):
        dtype = cudf.ListDtype(item)
        for given in (pa.null(), pa.list_(pa.null()), pa.list_(type_)):
            assert arrow_field(pa.field("mine", given), dtype) == pa.field("mine", pa.list_(type_))
    nested = arrow_field(pa.field("mine", pa.null()), cudf.ListDtype(cudf.ListDtype("float32")))
    assert nested.type == pa.list_(pa.list_(pa.float32()))
    ours = arrow_field(pa.field("embedding", pa.null()), cudf.ListDtype("float64"))
    assert ours == pa.field("embedding", pa.list_(pa.float32()))
    # A user's column of that name and another kind stays the user's.
    assert arrow_field(pa.field("width", pa.null()), cudf.ListDtype("float32")).type == pa.list_(pa.float32())


def test_other_columns_go_by_their_arrow_type() -> None:
    import numpy as np

    from dask_imgcurator.engine.cudf import arrow_field

    assert arrow_field(pa.field("key", pa.large_string()), np.dtype("O")) == pa.field("key", pa.string())
    assert arrow_field(pa.field("status", pa.string()), np.dtype("O")) == pa.field("status", pa.string(), False)
    assert arrow_field(pa.field("mine", pa.int8()), np.dtype("int8")) == pa.field("mine", pa.int8())


@pytest.mark.parametrize(
    ("dtype", "holds"),
    [
        (lambda: cudf.ListDtype("float32"), True),
        (lambda: cudf.ListDtype("int8"), True),
        (lambda: cudf.ListDtype("object"), False),
        (lambda: cudf.ListDtype(cudf.ListDtype("float32")), False),
        (lambda: cudf.StructDtype({"x": "float32"}), False),
        (lambda: cudf.CategoricalDtype(), False),
        (lambda: cudf.Decimal64Dtype(5, 2), False),
        (lambda: "float32", False),
    ],
)
def test_what_holds_vectors(dtype: Any, holds: bool) -> None:
    from dask_imgcurator.engine.cudf import holds_vectors

    assert holds_vectors(dtype()) is holds


def test_the_backend_is_what_the_seam_asks_for() -> None:
    """Every method and attribute of the protocol, with its arguments."""
    from dask_imgcurator.engine.backend import Backend, get_backend

    made = get_backend("cudf")
    for name in (n for n in vars(Backend) | Backend.__annotations__ if not n.startswith("_")):
        assert hasattr(made, name), name
        if inspect.isfunction(asked := getattr(Backend, name, None)):
            (_, *wanted), there = inspect.signature(asked).parameters, inspect.signature(getattr(made, name)).parameters
            assert list(there)[: len(wanted)] == wanted, name
