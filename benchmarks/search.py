"""How long a search takes, and how much memory, against one product of two matrices in memory, and by an index.

    python benchmarks/search.py 1e6
    python benchmarks/search.py 1e5 --queries 8 -k 100

Synthetic score files of n rows, 10,000 a file, with embeddings of 512 numbers about sqrt(n) centres, captions and
scores. Each way is a process of its own, with as many threads; reported are the seconds from the question to the rows,
with all columns, and the peak memory of the process and what it takes when idle:

- exact: `search`, all rows, a partition at a time.
- numpy: all embeddings in one matrix, one product, one sort; reading them is counted, and told by itself.
- index: `search` by an index. Building it is told by itself, and so is the recall of what it finds.

The rows that the exact search and numpy find are the same, or the benchmark says so. Queries are rows of the table with
noise, so that none finds itself. The files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import pyarrow.parquet as pq
from made_scores import ROWS, WIDTH, write_file

WAYS = ("exact", "numpy", "index")


def centres(rows: int) -> np.ndarray:
    """Directions about which the rows lie."""
    return np.random.default_rng(5).standard_normal((round(rows**0.5), WIDTH), np.float32)


def about(rows: int, count: int, seed: list[int]) -> np.ndarray:
    """Unit vectors about the centres: the cosine of two of one centre is 0.5 in the mean."""
    rng, middles = np.random.default_rng(seed), centres(rows)
    x = middles[rng.integers(0, len(middles), count)] + rng.standard_normal((count, WIDTH), np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# --- ways -----------------------------------------------------------------------------------------


def brute_force(folder: str, asked: np.ndarray, k: int) -> tuple[list[list[str]], float]:
    """Read all embeddings into one matrix and multiply; returns the keys, and the seconds that reading took."""
    begin = time.perf_counter()
    paths = sorted(Path(folder).glob("*.parquet"))
    total = sum(pq.read_metadata(path).num_rows for path in paths)
    matrix, keys, n = np.empty((total, WIDTH), np.float32), [], 0
    for path in paths:
        table = pq.read_table(path, columns=["key", "embedding"])
        there = table["embedding"].is_valid()
        table = table.filter(there)
        matrix[n : n + len(table)] = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, WIDTH)
        keys += table["key"].to_pylist()
        n += len(table)
    read = time.perf_counter() - begin
    cosines = matrix[:n] @ asked.T
    best = np.argpartition(-cosines, k, axis=0)[:k]
    found = []
    for q in range(len(asked)):
        order = best[np.argsort(-cosines[best[:, q], q], kind="stable"), q]
        found.append([keys[i] for i in order])
    return found, read


def ask(way: str, folder: str, rows: int, queries: int, k: int, threads: int) -> dict[str, Any]:
    """Search in this process."""
    import dask
    import torch

    import dask_imgcurator as dic

    torch.set_num_threads(threads)
    asked = about(rows, queries, [9])
    table, index = f"{folder}/scores", f"{folder}/index"
    idle, found, more = common.peak_mb(), None, {}
    begin = time.perf_counter()
    with dask.config.set(num_workers=threads):
        if way == "build":
            built = dic.build_search_index(table, index)
            more = {name: built.about[name] for name in ("cells", "nprobe", "recall")}
        elif way == "numpy":
            found, more["reading_seconds"] = brute_force(table, asked, k)
        else:
            use = {"index": index} if way == "index" else {}
            rows_ = dic.search(table, embedding=asked, k=k, backend="pandas", **use)
            found = [rows_[rows_["query_number"] == q]["key"].tolist() for q in range(queries)]
    seconds = time.perf_counter() - begin
    return {"seconds": round(seconds, 2), "peak_mb": common.peak_mb(), "idle_mb": idle, "found": found, **more}


def measure(rows: int, queries: int, k: int, threads: int, scratch: str | None) -> dict[str, Any]:
    """Search a table of so many rows in every way."""
    result: dict[str, Any] = {"rows": rows, "queries": queries, "k": k}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        (Path(folder) / "scores").mkdir()
        for part in range(-(-rows // ROWS)):
            n = min(ROWS, rows - part * ROWS)
            write_file(Path(folder) / "scores", part, n, about(rows, n, [8, part]))
        result["bytes"] = sum(file.stat().st_size for file in (Path(folder) / "scores").iterdir())
        env = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
        for way in ("exact", "numpy", "build", "index"):
            how = ("--queries", str(queries), "-k", str(k), "--threads", str(threads))
            result[way] = common.in_child(str(rows), *how, "--ask", way, folder, env=env)
        result["index_bytes"] = sum(file.stat().st_size for file in (Path(folder) / "index").iterdir())
    exact, brute, by_index = (result[way].pop("found") for way in WAYS)
    result["same_as_numpy"] = exact == brute
    result["recall"] = float(np.mean([len(set(a) & set(b)) / k for a, b in zip(exact, by_index, strict=True)]))
    return result


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", metavar="N", nargs="*", type=float, default=[1e6], help="rows (default: 1e6)")
    parser.add_argument("--queries", type=int, default=1, help="in one pass (default: %(default)s)")
    parser.add_argument("-k", type=int, default=20, help="rows for each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(default: %(default)s)")
    parser.add_argument("--scratch", metavar="DIR", help="where the files go (default: the system's)")
    parser.add_argument("--ask", nargs=2, metavar=("WAY", "DIR"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ask:
        print(json.dumps(ask(*args.ask, int(args.rows[0]), args.queries, args.k, args.threads)))
        return
    tables = [measure(int(n), args.queries, args.k, args.threads, args.scratch) for n in args.rows]
    lines = []
    for table in tables:
        files = f"{table['bytes'] / 1e6:,.0f} MB in files, {table['index_bytes'] / 1e6:,.0f} MB of index"
        lines.append((f"{table['rows']:,} rows", f"{files}; {table['queries']} queries, k = {table['k']}"))
        for way in ("exact", "numpy", "index", "build"):
            one = table[way]
            more = f", of which {one['reading_seconds']:.2f} s reading" if "reading_seconds" in one else ""
            more += f", {one['nprobe']} of {one['cells']} cells" if "cells" in one else ""
            figures = f"{one['seconds']:>8.2f} s {one['peak_mb']:>8,.0f} MB (idle {one['idle_mb']:,.0f}){more}"
            lines.append((f"  {way}", figures))
        same = "the same rows in the same order" if table["same_as_numpy"] else "DIFFERENT rows"
        lines.append(("  exact and numpy", same))
        lines.append(("  recall of the index", f"{table['recall']:.1%}"))
    common.show({"machine": common.machine(), "versions": common.versions(), "tables": tables}, lines)


if __name__ == "__main__":
    main()
