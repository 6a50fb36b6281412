"""What it costs to decide anew on a score table, against the engines that one would pick instead, on the same files.

    python benchmarks/selection.py 1e6 1e7
    python benchmarks/selection.py 1e5 --embeddings --rounds 1

Synthetic score files of n rows, 10,000 a file, with every column that `score` writes except, without --embeddings, the
embedding. Each question is asked in a process of its own, of each engine in turn, round after round, with as many
threads each; told are the CPU seconds from the folder's name to the answer (imports are not counted), the least of all
rounds, as a ratio to DuckDB's, and whether the answers are the same. The files are in the page cache. polars takes part
where it is installed; pyarrow and plain Dask (`dd.read_parquet`) where the question is short in them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
from made_scores import ROWS, WIDTH, write_file

WHERE = "aesthetic_score >= 5 and nsfw_score < 0.5 and width >= 512"
FUNNEL = ("status = 'ok'", "aesthetic_score >= 5", "nsfw_score < 0.5", "width >= 512", "height >= 384")
TOP, AMONG, MANY, SHARE = 10_000, "aesthetic_score >= 5", 10_000, 0.3

QUESTIONS = {
    "where": f"count: {WHERE}",
    "select": f"table: {WHERE}",
    "quantile": "the 0.7 quantile of clip_score",
    "top": f"count: top 30% by clip_score among {AMONG}",
    "best": f"rows: the {TOP:,} best by clip_score",
    "sample": f"rows: {MANY:,} at random, the same each time",
    "funnel": "counts of five conditions, alone and in turn",
    "exclude": "count: all but 100,000 keys of a file",
    "aggregates": "report's pass | histograms and counts in SQL",
}


def _excluded(folder: str) -> list[str]:
    """A hundredth of the keys, or 100,000."""
    files = sorted(Path(folder).glob("*.parquet"))
    every = max(1, len(files) * ROWS // 100_000)
    return [f"{part:05d}{i:05d}" for part in range(len(files)) for i in range(0, ROWS, every)][:100_000]


# --- the engines ----------------------------------------------------------------------------------


def ours(folder: str, question: str, out: str, threads: int) -> Any:
    """Ask this library."""
    import dask_imgcurator as dic
    from dask_imgcurator.report.survey import survey
    from dask_imgcurator.select.settle import settled_where
    from dask_imgcurator.select.where import parse_where
    from dask_imgcurator.steps.score_table import open_scores

    if question == "select":
        return dic.select_rows(folder, f"{out}/kept", WHERE, backend="pandas").kept
    if question == "exclude":
        listed = Path(out) / "keys.txt"
        listed.write_text("\n".join(_excluded(folder)))
        return dic.funnel(dic.read_scores(folder, backend="pandas"), dic.exclude(listed))["left"].iloc[-1].item()
    if question == "aggregates":
        found = survey(open_scores(folder), settled_where(parse_where(WHERE)))
        return found.counts.kept
    df = dic.read_scores(folder, backend="pandas")
    if question == "where":
        return dic.funnel(df, WHERE)["left"].iloc[-1].item()
    if question == "quantile":
        return dic.quantile(df, "clip_score", 0.7)
    if question == "top":
        return dic.funnel(df, [AMONG, f"top {SHARE:.0%} by clip_score"], ok_only=False)["left"].iloc[-1].item()
    if question == "best":
        return sorted(dic.top_count(df, "clip_score", TOP)["clip_score"].compute().tolist())[::1000]
    if question == "sample":
        return len(dic.sample(df, MANY, where="status == 'ok'")["key"].compute())
    return dic.funnel(df, " and ".join(FUNNEL[1:]))["left"].tolist()[1:]


def duckdb(folder: str, question: str, out: str, threads: int) -> Any:
    """Ask DuckDB."""
    import duckdb

    db = duckdb.connect()
    db.sql(f"set threads = {threads}")
    table = f"read_parquet('{folder}/*.parquet')"

    def one(query: str) -> Any:
        (row,) = db.sql(query).fetchall()
        return row[0] if len(row) == 1 else list(row)

    ok = f"status = 'ok' and {WHERE}"
    if question == "where":
        return one(f"select count(*) from {table} where {ok}")
    if question == "select":
        db.sql(f"copy (select * from {table} where {ok}) to '{out}/kept.parquet' (compression zstd)")
        return one(f"select count(*) from '{out}/kept.parquet'")
    if question == "quantile":
        return one(f"select quantile_disc(clip_score, 0.7) from {table}")
    if question == "top":
        best = f"select clip_score s from {table} where {AMONG} and s is not null order by s desc limit {SHARE:.0%}"
        return one(f"select count(*) from ({best})")
    if question == "best":
        best = f"select key, clip_score from {table} order by clip_score desc nulls last limit {TOP}"
        return sorted(score for _, score in db.sql(best).fetchall())[::1000]
    if question == "sample":
        some = f"select key from {table} where status = 'ok' order by hash(shard, sample_offset) limit {MANY}"
        return len(db.sql(some).fetchall())
    if question == "exclude":
        listed = Path(out) / "keys.txt"
        listed.write_text("\n".join(_excluded(folder)))
        keys = f"select column0 from read_csv('{listed}', header = false, all_varchar = true)"
        return one(f"select count(*) from {table} where status = 'ok' and key not in ({keys})")
    if question == "aggregates":
        names = ("aesthetic_score", "nsfw_score", "clip_score", "width", "height")
        parts = ", ".join(f"histogram(round({name}::double, 1))" for name in names)
        (row,) = db.sql(f"select count(*) filter ({ok}), {parts} from {table}").fetchall()
        return row[0]
    turns = [f"count(*) filter ({' and '.join(FUNNEL[: i + 1])})" for i in range(len(FUNNEL))]
    alone = [f"count(*) filter ({FUNNEL[0]} and {part})" for part in FUNNEL[1:]]
    return one(f"select {', '.join([*turns, *alone])} from {table}")[: len(FUNNEL)]


def polars(folder: str, question: str, out: str, threads: int) -> Any:
    """Ask polars."""
    import polars as pl

    table = pl.scan_parquet(f"{folder}/*.parquet")
    good = pl.sql_expr(WHERE)
    ok = pl.col("status") == "ok"
    if question == "where":
        return table.filter(ok & good).select(pl.len()).collect().item()
    if question == "select":
        table.filter(ok & good).sink_parquet(f"{out}/kept.parquet", compression="zstd")
        return pl.scan_parquet(f"{out}/kept.parquet").select(pl.len()).collect().item()
    if question == "quantile":
        return table.select(pl.col("clip_score").drop_nulls().quantile(0.7, "lower")).collect().item()
    if question == "top":
        some = table.filter(pl.col("aesthetic_score") >= 5).select(pl.col("clip_score").drop_nulls()).collect()
        return len(some.top_k(int(len(some) * SHARE), by="clip_score"))
    if question == "best":
        best = table.select("key", "clip_score").filter(pl.col("clip_score").is_not_null())
        return sorted(best.top_k(TOP, by="clip_score").collect()["clip_score"].to_list())[::1000]
    if question == "sample":
        some = table.filter(ok).select("key", pl.struct("shard", "sample_offset").hash(0).alias("h"))
        return len(some.bottom_k(MANY, by="h").collect())
    if question == "exclude":
        return table.filter(ok & ~pl.col("key").is_in(_excluded(folder))).select(pl.len()).collect().item()
    if question == "aggregates":
        return None
    parts = [pl.sql_expr(part) for part in FUNNEL]
    turns = [pl.all_horizontal(parts[: i + 1]).sum().alias(f"turn{i}") for i in range(len(parts))]
    alone = [(parts[0] & part).sum().alias(f"alone{i}") for i, part in enumerate(parts[1:])]
    return list(table.select(*turns, *alone).collect().row(0))[: len(FUNNEL)]


def pyarrow(folder: str, question: str, out: str, threads: int) -> Any:
    """Ask pyarrow's datasets."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.dataset as ds

    pa.set_cpu_count(threads)
    table = ds.dataset(folder, format="parquet")
    five = pa.scalar(5, pa.float32())
    good = (pc.field("aesthetic_score") >= five) & (pc.field("nsfw_score") < pa.scalar(0.5, pa.float32()))
    good &= (pc.field("width") >= 512) & (pc.field("status") == "ok")
    if question == "where":
        return table.count_rows(filter=good)
    if question == "select":
        ds.write_dataset(table.scanner(filter=good), f"{out}/kept", format="parquet")
        return ds.dataset(f"{out}/kept").count_rows()
    return None


def plain_dask(folder: str, question: str, out: str, threads: int) -> Any:
    """Ask plain Dask."""
    import dask.dataframe as dd

    df = dd.read_parquet(folder)
    good = (df["status"] == "ok") & (df["aesthetic_score"] >= 5) & (df["nsfw_score"] < 0.5) & (df["width"] >= 512)
    if question == "where":
        return int(good.sum().compute())
    if question == "select":
        df[good].to_parquet(f"{out}/kept")
        return len(dd.read_parquet(f"{out}/kept")[["key"]])
    return None


ENGINES: dict[str, Callable[[str, str, str, int], Any]] = {
    "ours": ours,
    "duckdb": duckdb,
    "polars": polars,
    "pyarrow": pyarrow,
    "dask": plain_dask,
}


# --- asking ---------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """CPU seconds of this process and its children so far."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(item.ru_utime + item.ru_stime for item in used)


def ask(who: str, question: str, folder: str, threads: int) -> dict[str, Any]:
    """Ask one question in this process."""
    import dask.dataframe
    import duckdb  # noqa: F401
    import pyarrow.dataset  # noqa: F401

    if who == "ours":
        import dask_imgcurator as dic

        for name in ("select_rows", "funnel", "read_scores", "quantile", "exclude"):
            getattr(dic, name)
        import dask_imgcurator.report.survey  # noqa: F401
    if who == "polars":
        import polars  # noqa: F401
    idle = common.peak_mb()
    with tempfile.TemporaryDirectory() as out, dask.config.set(scheduler="threads", num_workers=threads):
        begin = cpu_seconds()
        answer = ENGINES[who](folder, question, out, threads)
        used = cpu_seconds() - begin
    return {"cpu_seconds": round(used, 3), "peak_mb": common.peak_mb(), "idle_mb": idle, "answer": answer}


def measure(rows: int, embeddings: bool, args: argparse.Namespace) -> dict[str, Any]:
    """Ask everything about a table of so many rows."""
    found: dict[str, Any] = {"rows": rows, "embeddings": embeddings, "rounds": args.rounds}
    env = {"POLARS_MAX_THREADS": str(args.threads), "OMP_NUM_THREADS": str(args.threads)}
    engines = [name for name in ENGINES if name != "polars" or importlib.util.find_spec("polars")]
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        for part in range(-(-rows // ROWS)):
            n = min(ROWS, rows - part * ROWS)
            vectors = np.random.default_rng([8, part]).standard_normal((n, WIDTH), np.float32) if embeddings else None
            write_file(Path(folder), part, n, vectors)
        found["bytes"] = sum(file.stat().st_size for file in Path(folder).iterdir())
        for question in QUESTIONS:
            asked: dict[str, list[dict[str, Any]]] = {}
            for _ in range(args.rounds):
                for who in engines:
                    told = common.in_child("--ask", who, question, folder, "--threads", str(args.threads), env=env)
                    if told["answer"] is not None:
                        asked.setdefault(who, []).append(told)
            best = {who: min(told, key=lambda item: item["cpu_seconds"]) for who, told in asked.items()}
            answers = {json.dumps(item["answer"]) for item in best.values()}
            found[question] = {**best, "same": len(answers) == 1}
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", metavar="N", nargs="*", type=float, default=[1e6], help="rows (default: 1e6)")
    parser.add_argument("--embeddings", action="store_true", help=f"with a column of {WIDTH} float32")
    parser.add_argument("--rounds", type=int, default=2, help="how often each is asked (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(default: %(default)s)")
    parser.add_argument("--scratch", metavar="DIR", help="where the files go (default: the system's)")
    parser.add_argument("--ask", nargs=3, metavar=("WHO", "QUESTION", "DIR"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ask:
        print(json.dumps(ask(*args.ask, args.threads)))
        return
    tables = [measure(int(n), args.embeddings, args) for n in args.rows]
    lines = [("", "".join(f"{name:>16}" for name in ENGINES) + "   same answer")]
    for table in tables:
        lines.append((f"{table['rows']:,} rows", f"{table['bytes'] / 1e6:,.0f} MB in files; CPU s, ratio to DuckDB"))
        for question, about in QUESTIONS.items():
            told, base = table[question], table[question]["duckdb"]["cpu_seconds"]
            cells = "".join(
                f"{told[who]['cpu_seconds']:>8.2f} ({told[who]['cpu_seconds'] / base:>4.1f})"
                if who in told
                else " " * 16
                for who in ENGINES
            )
            lines.append((f"  {about}", f"{cells}   {'yes' if told['same'] else 'no'}"))
    common.show({"machine": common.machine(), "versions": common.versions(), "tables": tables}, lines)


if __name__ == "__main__":
    main()
