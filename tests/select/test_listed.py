"""Rows named in a file, of every kind that people have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from test_score_files import write

import dask_imgcurator as dic
from dask_imgcurator.cli.main import cli
from dask_imgcurator.select.ranks import SelectionError

UIDS = [(i * 7919, 2**63 + i) for i in range(60)]


def table(folder: Path) -> pd.DataFrame:
    frame = write(folder, [30, 0, 30])
    extra = frame.assign(
        uid=[f"{a:016x}{b:016x}" for a, b in UIDS],  # as DataComp writes them
        number=pd.array([None if i % 10 == 0 else i for i in range(60)], "Int64"),
        kind=pd.Categorical(["a", "b"] * 30),
    )
    for path in folder.glob("*.parquet"):
        path.unlink()
    extra.iloc[:30].to_parquet(folder / "000.parquet", index=False)
    extra.iloc[30:].to_parquet(folder / "001.parquet", index=False)
    return extra


def named(folder: Path, frame: pd.DataFrame) -> dict[str, tuple[str, list[str]]]:
    """Files that name some rows: how they are given, and the keys of those rows."""
    some = frame.iloc[[0, 3, 31, 59]]
    (folder / "keys.txt").write_text("\n".join([*some["key"], "nobody", ""]))
    (folder / "windows.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(some["key"]).encode())
    some[["key", "status"]].to_parquet(folder / "keys.parquet")
    some[["key"]].rename(columns={"key": "name"}).astype("category").to_parquet(folder / "one.parquet", index=False)
    pairs = np.array([UIDS[i] for i in (0, 3, 31, 59)], "u8,u8")
    np.save(folder / "uids.npy", pairs)
    np.save(folder / "numbers.npy", np.array([3, 31, 59]))
    (folder / "numbers.txt").write_text("3\n31\n59\n")
    keys, numbered = some["key"].tolist(), some["key"].tolist()[1:]
    return {
        "text": (str(folder / "keys.txt"), keys),
        "with a mark": (str(folder / "windows.txt"), keys),
        "a table": (str(folder / "keys.parquet"), keys),
        "one column": (str(folder / "one.parquet"), keys),
        "DataComp's": (f"uid={folder / 'uids.npy'}", keys),
        "numbers": (f"number={folder / 'numbers.npy'}", numbered),
        "numbers as text": (f"number={folder / 'numbers.txt'}", numbered),
    }


def test_rows_are_kept_and_dropped_by_what_a_file_names(tmp_path: Path) -> None:
    (tmp_path / "scores").mkdir()
    frame = table(tmp_path / "scores")
    ok = frame[frame["status"] == "ok"]
    for kind, (given, keys) in named(tmp_path, frame).items():
        column, _, path = given.rpartition("=")
        for df in (frame, dic.read_scores(tmp_path / "scores")):
            found: Any = dic.apply_steps(df, dic.only(path, column or "key"), ok_only=False)
            assert [*found["key"]] == keys, kind
            rest: Any = dic.apply_steps(df, dic.exclude(path, column or "key"))
            assert len(rest) == (~ok["key"].isin(keys)).sum(), kind
        for option, expected in (("--only", ok["key"].isin(keys)), ("--exclude", ~ok["key"].isin(keys))):
            out = tmp_path / kind / option
            done = CliRunner().invoke(cli, ["select", str(tmp_path / "scores"), option, given, "--out", str(out)])
            assert done.exit_code == 0, done.output
            assert pd.read_parquet(out)["key"].tolist() == ok["key"][expected].tolist()


def test_before_anything_is_ranked(tmp_path: Path) -> None:
    frame = write(tmp_path, [50])
    (tmp_path / "seen.txt").write_text("\n".join(frame["key"][:25]))
    counts = dic.select_rows(tmp_path, tmp_path / "out", [dic.exclude(tmp_path / "seen.txt"), "top 50% by clip_score"])
    rest = frame[25:].query("status == 'ok'").dropna(subset="clip_score")
    assert counts.kept == len(rest) // 2
    assert counts.funnel[0].condition.startswith("key not in (25 values of seen.txt, ")


@pytest.mark.parametrize(
    ("content", "column", "message"),
    [
        (b"", "key", "bad.txt names no value of 'key': it is empty"),
        (b"\xff\xfe\x00\xd8", "key", "bad.txt is not text"),
        (b"a\nb\n", "keey", "no column 'keey'"),
        (b"a\nb\n", "score", "column 'score' holds int16"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, content: bytes, column: str, message: str) -> None:
    frame = write(tmp_path, [5])
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(SelectionError, match=message):
        dic.apply_steps(frame, dic.exclude(tmp_path / "bad.txt", column))


def test_pickled_arrays_are_not_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "keys.npy", np.array(["a", None], object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        dic.exclude(tmp_path / "keys.npy")
