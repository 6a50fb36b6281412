"""How many duplicates `dedup` finds, how fast, and in how much memory.

    python benchmarks/dedup.py 1e5 1e6
    python benchmarks/dedup.py 1e5 --probe 1 2 3 --all-pairs --pairs pairs.npz

Synthetic embeddings of n rows, a tenth of which are near copies of rows of other partitions, made partition by
partition from seeds. Each search is a process of its own. Reported are its seconds, CPU seconds and peak memory (files
in the page cache), the balance of the cells with its own estimate of recall, the recall of the planted pairs, and the
recall of all pairs that a sample of the rows has (by comparing it with every row); a pair counts if both are in one
group. With --parts, what each part of a search among n rows would cost, scaled up from some of the rows: for more
than fit. With --all-pairs, the same without cells. With --pairs, real embeddings too, in forced cells. With --scores
and --manifest, how many of the duplicates that `make_sample_shards` planted are found, by tier.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import common
import dask
import numpy as np
import pandas as pd

import dask_imgcurator as dic

WIDTH = 512
EPS = [0.02, 0.05, 0.1]
ROWS = 10_000  # a partition


# --- data -----------------------------------------------------------------------------------------


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of unit length."""
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def originals(part: int, rows: int, modes: int) -> np.ndarray:
    """Rows of a partition: all share a direction and many a mode, as CLIP's embeddings of photographs do."""
    rng = np.random.default_rng([1, part])
    shared, centres = (unit(np.random.default_rng([2, k]).standard_normal((k, WIDTH))) for k in (1, modes))
    noise = unit(rng.standard_normal((rows, WIDTH)))
    return unit(0.6 * shared + 0.5 * centres[rng.integers(0, modes, rows)] + 0.62 * noise)


def copied(part: int, parts: int) -> int:
    """The partition that a partition's copies are of."""
    return (part * 7 + 3) % parts


def make_part(part: int, parts: int, rows: int, modes: int) -> pd.DataFrame:
    """One partition: nine tenths originals, then near copies of the first rows of another one."""
    copies = rows // 10
    values = originals(part, rows, modes)
    source = originals(copied(part, parts), rows, modes)[:copies]
    rng = np.random.default_rng([3, part])
    across = rng.standard_normal((copies, WIDTH))
    across = unit(across - (across * source).sum(1, keepdims=True) * source)
    cosine = 1 - rng.uniform(0.001, 0.12, (copies, 1))
    values[-copies:] = cosine * source + np.sqrt(1 - cosine**2) * across
    keys = [f"{part:05d}{i:06d}" for i in range(rows)]
    frame = pd.DataFrame({"key": keys, "shard": f"{part:05d}.tar", "sample_offset": np.arange(rows) * 1024})
    frame["embedding"] = list(unit(values))
    return frame


def write_part(path: Path, part: int, parts: int, rows: int, modes: int) -> None:
    """Write one partition as the score table of a shard."""
    from dask_imgcurator.steps.score_table import write_score_file

    frame = make_part(part, parts, rows, modes)
    write_score_file(frame, str(path / f"{part:05d}.parquet"), {}, "pandas", {})


def planted(n_parts: int, rows: int, modes: int) -> pd.DataFrame:
    """Pairs of keys that were planted, and their cosine."""
    copies, found = rows // 10, []
    for part in range(n_parts):
        frame = make_part(part, n_parts, rows, modes)
        copy = np.stack(frame["embedding"].to_numpy()[-copies:])
        of = originals(copied(part, n_parts), rows, modes)[:copies]
        left = frame["key"].to_numpy()[-copies:]
        right = [f"{copied(part, n_parts):05d}{i:06d}" for i in range(copies)]
        found.append(pd.DataFrame({"a": left, "b": right, "cosine": (copy * of).sum(1)}))
    return pd.concat(found, ignore_index=True)


# --- measures -------------------------------------------------------------------------------------


def together(groups: pd.DataFrame, a: Any, b: Any) -> np.ndarray:
    """Whether two keys are in one group."""
    group = pd.Series(groups["group"].to_numpy(), groups["key"].to_numpy())
    left, right = group.reindex(a).to_numpy(), group.reindex(b).to_numpy()
    return left == right  # NaN is not NaN


def share(hits: np.ndarray) -> float | None:
    """Mean, or None of nothing."""
    return round(float(hits.mean()), 5) if len(hits) else None


def sampled_pairs(folder: Path, queries: int) -> pd.DataFrame:
    """All pairs of a cosine of at least 1 - max(EPS) that a sample of the rows has, by comparing it with every row."""
    files = sorted(folder.glob("*.parquet"))
    rng, per = np.random.default_rng(0), -(-queries // len(files))
    picks = [(k[take], v[take]) for k, v in map(load, files) for take in [rng.choice(len(k), per, False)]]
    keys, values = np.concatenate([k for k, _ in picks]), np.concatenate([v for _, v in picks])
    found = []
    for other, theirs in map(load, files):
        cosine = values @ theirs.T
        i, j = np.nonzero((cosine >= 1 - max(EPS)) & (keys[:, None] != other[None, :]))
        found.append(pd.DataFrame({"a": keys[i], "b": other[j], "cosine": cosine[i, j]}))
    return pd.concat(found, ignore_index=True)


def load(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Keys and vectors of a file."""
    import pyarrow.parquet as pq

    table = pq.read_table(file, columns=["key", "embedding"])
    values = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, WIDTH)
    return np.array(table["key"].to_pylist()), values


def search(folder: str, **options: Any) -> dict[str, Any]:
    """Search a folder in this process; the groups are left beside it."""
    idle, begin, before = common.peak_mb(), time.perf_counter(), os.times()
    found = dic.find_duplicates(dic.read_scores(folder), ["semantic"], eps=EPS, **options)
    counts = found.counts()
    after = os.times()
    result = {
        "seconds": round(time.perf_counter() - begin, 1),
        "cpu_seconds": round(sum(after[:2]) - sum(before[:2]), 1),
        "peak_mb": common.peak_mb(),
        "idle_mb": idle,
        "cells": None if found.cells is None else asdict(found.cells),
        "dropped": counts["dropped"].tolist(),
    }
    for eps in EPS:
        found.groups(eps).to_parquet(f"{folder}/../groups_{eps}.parquet")
    return result


def measure(n: int, args: argparse.Namespace) -> dict[str, Any]:
    """Everything for one size."""
    parts = max(1, n // ROWS)
    rows, modes = n // parts, max(10, n // 500)
    result: dict[str, Any] = {"rows": parts * rows, "width": WIDTH}
    with tempfile.TemporaryDirectory(dir=args.scratch) as temporary:
        folder = Path(temporary) / "scores"
        folder.mkdir()
        for part in range(parts):
            write_part(folder, part, parts, rows, modes)
        truth, sample = planted(parts, rows, modes), sampled_pairs(folder, args.queries)
        variants: dict[str, dict[str, Any]] = {f"probe_{probe}": {"probe": probe} for probe in args.probe}
        if args.all_pairs:
            variants["all_pairs"] = {"n_cells": 1}
        for name, options in variants.items():
            one = common.in_child("--ask", str(folder), json.dumps(options))
            one["eps"] = {}
            for eps, dropped in zip(EPS, one.pop("dropped"), strict=True):
                groups = pd.read_parquet(f"{temporary}/groups_{eps}.parquet")
                pairs, some = (p[p["cosine"] >= 1 - eps] for p in (truth, sample))
                one["eps"][eps] = {
                    "dropped": dropped,
                    "planted_pairs": len(pairs),
                    "planted_recall": share(together(groups, pairs["a"], pairs["b"])),
                    "sampled_pairs": len(some),
                    "sampled_recall": share(together(groups, some["a"], some["b"])),
                }
            result[name] = one
            say(result["rows"], name, one)
    return result


def say(*what: Any) -> None:
    """Print as it comes."""
    print(*what, file=sys.stderr, flush=True)


def real(path: Path) -> dict[str, Any]:
    """Recall on real CLIP embeddings, in as many cells as a large set would have for each row, and one cell."""
    values = unit(np.load(path)["clip_b32"].astype(np.float32))
    frame = pd.DataFrame({"key": [f"{i:05d}" for i in range(len(values))], "embedding": list(values)})
    cosine = values @ values.T
    i, j = np.nonzero(np.triu(cosine >= 1 - max(EPS), 1))
    truth = pd.DataFrame({"a": frame["key"].to_numpy()[i], "b": frame["key"].to_numpy()[j], "cosine": cosine[i, j]})
    result: dict[str, Any] = {"rows": len(values)}
    for cells, probe in ((1, 1), (35, 1), (35, 2), (35, 3)):
        found = dic.find_duplicates(frame, ["semantic"], eps=EPS, n_cells=cells, probe=probe)
        lines = {}
        for eps in EPS:
            pairs = truth[truth["cosine"] >= 1 - eps]
            lines[eps] = {"pairs": len(pairs), "recall": share(together(found.groups(eps), pairs["a"], pairs["b"]))}
        result[f"cells_{cells}_probe_{probe}"] = lines
        say("real", cells, probe, lines)
    return result


def planted_in_shards(scores: str, manifest: Path) -> dict[str, Any]:
    """Which of the duplicates among sample shards go, by tier and eps."""
    kinds = {key: about for key, about in json.loads(manifest.read_text()).items() if about["of"]}
    df = dic.read_scores(scores)
    found = dic.find_duplicates(df, eps=EPS)
    result: dict[str, Any] = {"tiers": json.loads(found.counts().to_json(orient="records"))}
    for eps in EPS if "semantic" in set(found.counts()["tier"]) else [None]:
        groups = found.groups(eps)
        tier = groups.set_index("key")["tier"]
        for kind in ("duplicate", "near_duplicate"):
            keys = [key for key, about in kinds.items() if about["kind"] == kind]
            hit = together(groups, keys, [kinds[key]["of"] for key in keys])
            by = tier.reindex(np.array(keys)[hit]).fillna("stays").value_counts().to_dict()
            result[f"{kind}_eps_{eps}"] = {"planted": len(keys), "found": int(hit.sum()), "tier": by}
    return result


def parts(n: int, cells_tried: int = 12) -> dict[str, Any]:
    """CPU seconds of the parts of a search among n rows, measured on as many rows as k-means sees and scaled up."""
    import dask.dataframe as dd

    from dask_imgcurator.duplicates import cells as c
    from dask_imgcurator.duplicates.rows import Source, gather
    from dask_imgcurator.engine.backend import get_backend

    backend, k = get_backend("pandas"), c.default_cells(n)
    m = -(-32 * k // ROWS) * ROWS
    found: dict[str, Any] = {"rows": n, "cells": k, "rows_measured": m}

    def timed(name: str, scale: float, work: Callable[[], Any]) -> Any:
        before = os.times()
        out = work()
        found[name] = round((sum(os.times()[:2]) - sum(before[:2])) * scale, 1)
        return out

    with tempfile.TemporaryDirectory() as folder:
        for part in range(m // ROWS):
            write_part(Path(folder), part, m // ROWS, ROWS, max(10, n // 500))
        df = dic.read_scores(folder)
        assert isinstance(df, dd.DataFrame)
        rows = timed("gather", n / m, lambda: gather([Source(df, {"embedding": "embedding"})]))
    there = rows.with_vector
    centroids = timed("train", 1, lambda: c.train(rows, there, backend, k, 0))
    cells, _ = timed("assign", n / m, lambda: c.assign(rows, there, centroids, "cpu", 3))
    # Cells as n rows would fill them; a few are compared, of rows that lie anywhere: the products are the work.
    homes, visits = (np.bincount(cells[:, i].ravel(), minlength=len(centroids)) * n // m for i in (0, slice(1, None)))
    work, rng = homes * (homes / 2 + visits), np.random.default_rng(0)
    tried = rng.choice(len(work), cells_tried, replace=False, p=work / work.sum())
    fits = tried[(homes + visits)[tried] <= m]

    def compare() -> None:
        how = partial(rows.tensor, "cpu"), 1 - max(EPS), False
        for cell in fits:
            some = c.Cell(rng.choice(there, int(homes[cell] + visits[cell]), replace=False), 0, int(homes[cell]))
            list(c.on_threads(lambda task: c.near_pairs(*task, *how), some.tasks(), "cpu"))

    timed("compare", float(work.sum() / work[fits].sum()), compare)
    found["cells"] = len(centroids)
    found["cell_sizes"] = {"median": int(np.median(homes)), "largest": int(homes.max())}
    found["sum"] = round(sum(found[name] for name in ("gather", "train", "assign", "compare")), 1)
    return found


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", metavar="N", nargs="*", type=lambda text: int(float(text)), help="rows, e.g. 1e4 1e5")
    parser.add_argument("--probe", type=int, nargs="+", default=[3], metavar="N", help="cells a row (default: 3)")
    parser.add_argument("--queries", type=int, default=2000, metavar="N", help="rows compared with all others")
    parser.add_argument("--all-pairs", action="store_true", help="also without cells: n² products")
    parser.add_argument("--parts", type=float, nargs="+", metavar="N", help="what the parts of n rows would cost")
    parser.add_argument("--scratch", metavar="DIR", help="where the files go (default: the system's)")
    parser.add_argument("--ask", nargs=2, metavar=("DIR", "OPTIONS"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--pairs", type=Path, metavar="FILE", help="real embeddings, as tools/fit_starter.py reads them"
    )
    parser.add_argument("--scores", metavar="DIR", help="score table of sample shards")
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="their manifest.json")
    args = parser.parse_args()
    if args.ask:
        print(json.dumps(search(args.ask[0], **json.loads(args.ask[1]))))
        return
    if bool(args.scores) != bool(args.manifest):
        parser.error("--scores and --manifest go together")
    result: dict[str, Any] = {"machine": common.machine(), "versions": common.versions(), "eps": EPS, "sizes": []}
    with dask.config.set({"dataframe.convert-string": False}):
        if args.pairs:
            result["real"] = real(args.pairs)
        if args.scores:
            result["planted"] = planted_in_shards(args.scores, args.manifest)
            say("planted", result["planted"])
    result["parts"] = [parts(int(n)) for n in args.parts or ()]
    result["sizes"] = [measure(n, args) for n in args.sizes]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
