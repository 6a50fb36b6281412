"""How long it takes to decide anew on a score table, and how much memory, against DuckDB on the same files.

    python benchmarks/selection.py 1e6 1e7
    python benchmarks/selection.py 1e5 --embeddings

Synthetic score files of n rows, 10,000 a file, with every column that `score` writes except, without --embeddings, the
embedding (which is not read either way: with it, each file is twenty times as large). Each question is asked in a
process of its own, by Dask's threads and by DuckDB's, as many; reported are the seconds from the open table to the
answer, the peak memory of the process and what it takes when idle, and whether both answers are the same. The files are
in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import dask
import numpy as np
from made_scores import ROWS, WIDTH, write_file

WHERE = "aesthetic_score >= 5 and nsfw_score < 0.5 and width >= 512"


# --- questions ------------------------------------------------------------------------------------


def ours(folder: str, question: str) -> Any:
    """Ask this library."""
    from dask_imgcurator import export, funnel, quantile, read_scores, sample, top_fraction

    df = read_scores(folder, backend="pandas")
    if question == "where":
        return int(funnel(df, WHERE, ok_only=False)["left"].iloc[-1])
    if question == "quantile":
        return quantile(df, "clip_score", 0.7)
    if question == "top":
        kept = top_fraction(df, "clip_score", 0.3, where="aesthetic_score >= 5")["clip_score"]
        return [int(x) for x in dask.compute(kept.count(), (kept.astype("float64") * 1e6).astype("int64").sum())]
    if question == "sample":
        return len(sample(df, 10_000, where="status == 'ok'")["key"].compute())
    with tempfile.TemporaryDirectory() as out:
        return export(df[df["clip_score"] >= 0.3], Path(out) / "keys.txt", "list").rows


def theirs(folder: str, question: str, threads: int) -> Any:
    """Ask DuckDB."""
    import duckdb

    db = duckdb.connect()
    db.sql(f"set threads = {threads}")
    table = f"read_parquet('{folder}/*.parquet')"
    if question == "where":
        return db.sql(f"select count(*) from {table} where {WHERE}").fetchall()[0][0]
    if question == "quantile":
        return db.sql(f"select quantile_disc(clip_score, 0.7) from {table}").fetchall()[0][0]
    if question == "top":
        best = (
            f"select clip_score s from {table} where aesthetic_score >= 5 and s is not null order by s desc limit 30%"
        )
        return list(db.sql(f"select count(*), sum(trunc(s::double * 1e6)::bigint) from ({best})").fetchall()[0])
    if question == "sample":
        ok = f"(select key from {table} where status = 'ok')"
        return len(db.sql(f"select key from {ok} using sample reservoir(10000 rows) repeatable (0)").fetchall())
    with tempfile.TemporaryDirectory() as out:
        kept = f"select key from {table} where status = 'ok' and clip_score >= 0.3::float"
        db.sql(f"copy ({kept}) to '{out}/keys.csv' (header false)")
        return sum(1 for _ in (Path(out) / "keys.csv").open())


QUESTIONS = {
    "where": WHERE,
    "quantile": "the 0.7 quantile of clip_score",
    "top": "top 30% by clip_score among aesthetic_score >= 5",
    "sample": "10,000 rows at random",
    "list": "the keys of clip_score >= 0.3, in a file",
}


def ask(who: str, question: str, folder: str, threads: int) -> dict[str, Any]:
    """Ask one question in this process."""
    import duckdb  # noqa: F401

    import dask_imgcurator  # noqa: F401

    idle = common.peak_mb()
    asked: Callable[[], Any] = (
        (lambda: ours(folder, question)) if who == "ours" else (lambda: theirs(folder, question, threads))
    )
    with dask.config.set(scheduler="threads", num_workers=threads):
        begin = time.perf_counter()
        answer = asked()
    return {
        "seconds": round(time.perf_counter() - begin, 3),
        "peak_mb": common.peak_mb(),
        "idle_mb": idle,
        "answer": answer,
    }


def measure(rows: int, embeddings: bool, threads: int, scratch: str | None) -> dict[str, Any]:
    """Ask everything about a table of so many rows."""
    found: dict[str, Any] = {"rows": rows, "embeddings": embeddings}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        for part in range(-(-rows // ROWS)):
            n = min(ROWS, rows - part * ROWS)
            vectors = np.random.default_rng([8, part]).standard_normal((n, WIDTH), np.float32) if embeddings else None
            write_file(Path(folder), part, n, vectors)
        found["bytes"] = sum(file.stat().st_size for file in Path(folder).iterdir())
        for question in QUESTIONS:
            for who in ("ours", "duckdb"):
                answer = common.in_child("--ask", who, question, folder, "--threads", str(threads))
                found.setdefault(question, {})[who] = answer
            answers = [found[question][who]["answer"] for who in ("ours", "duckdb")]
            found[question]["same"] = answers[0] == answers[1]
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", metavar="N", nargs="*", type=float, default=[1e6], help="rows (default: 1e6)")
    parser.add_argument("--embeddings", action="store_true", help=f"with a column of {WIDTH} float32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(default: %(default)s)")
    parser.add_argument("--scratch", metavar="DIR", help="where the files go (default: the system's)")
    parser.add_argument("--ask", nargs=3, metavar=("WHO", "QUESTION", "DIR"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ask:
        print(json.dumps(ask(*args.ask, args.threads)))
        return
    tables = [measure(int(n), args.embeddings, args.threads, args.scratch) for n in args.rows]
    lines = [("", f"{'ours':>18}{'duckdb':>22}   same answer")]
    for table in tables:
        lines.append((f"{table['rows']:,} rows", f"{table['bytes'] / 1e6:,.0f} MB in files"))
        for question, about in QUESTIONS.items():
            sides = [table[question][who] for who in ("ours", "duckdb")]
            cells = "".join(f"{s['seconds']:>10.2f} s {s['peak_mb']:>7,.0f} MB" for s in sides)
            lines.append((f"  {about}", f"{cells}   {'yes' if table[question]['same'] else 'no'}"))
    common.show({"machine": common.machine(), "versions": common.versions(), "tables": tables}, lines)


if __name__ == "__main__":
    main()
