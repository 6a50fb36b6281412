"""The public steps, on pandas and on Dask: meta, nulls, order, and frames that this library did not make."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from distributed import Client
from PIL import Image, ImageDraw

import dask_imgcurator as dic
from dask_imgcurator.engine.backend import backend_of, get_backend
from dask_imgcurator.models import ModelError
from dask_imgcurator.models.heads import HeadError
from dask_imgcurator.models.weights import WeightsError
from dask_imgcurator.schema import COLUMNS, arrow_schema
from dask_imgcurator.steps.score_table import write_score_file

BACKENDS = ["pandas", pytest.param("cudf", marks=pytest.mark.gpu)]


def rows(frame: Any, *names: str) -> list[Any]:
    """Values of columns, null as None; of a frame of any kind."""
    frame = frame.compute(scheduler="synchronous") if dask.is_dask_collection(frame) else frame
    found = backend_of(frame).to_host(frame, list(names))
    return (
        list(zip(*(found[name].to_pylist() for name in names), strict=True)) if len(names) > 1 else found[0].to_pylist()
    )


def assert_meta(df: dd.DataFrame) -> None:
    """Every partition has the columns and dtypes that the graph promised."""
    for part in dask.compute(*df.to_delayed(), scheduler="synchronous"):
        assert list(part.columns) == list(df.columns)
        assert list(part.dtypes) == list(df.dtypes)


# --- heads, on frames of any origin ---------------------------------------------------------------


def objects(x: list[Any]) -> pd.Series:
    return pd.Series(x, dtype=object)


def arrow(x: list[Any], type_: pa.DataType) -> pd.Series:
    return pd.Series(pd.array(x, dtype=pd.ArrowDtype(type_)))


FORMS: dict[str, Callable[[list[Any]], pd.Series]] = {
    "arrays": objects,
    "float64 arrays": lambda x: objects([None if v is None else v.astype(np.float64) for v in x]),
    "lists": lambda x: objects([None if v is None else v.tolist() for v in x]),
    "arrow": lambda x: arrow(x, pa.list_(pa.float32())),
    "arrow large": lambda x: arrow(x, pa.large_list(pa.float32())),
    "arrow float64": lambda x: arrow([None if v is None else v.astype(np.float64) for v in x], pa.list_(pa.float64())),
    "arrow fixed": lambda x: arrow(x, pa.list_(pa.float32(), len(x[0]))),
}


def with_gaps(x: np.ndarray) -> tuple[list[Any], list[int]]:
    """The vectors with nulls between, and where each went."""
    out: list[Any] = []
    where = []
    for i, row in enumerate(x):
        where.append(len(out))
        out.append(row)
        if i % 4 == 1:
            out.append(None)
    return out, where


def check(frame: Any, column: str, expected: np.ndarray, where: list[int], n: int, atol: float) -> None:
    scores = rows(frame, column)
    assert len(scores) == n
    assert [i for i, score in enumerate(scores) if score is not None] == where
    np.testing.assert_allclose([scores[i] for i in where], expected, rtol=0, atol=atol)


@pytest.fixture
def plain_objects() -> Any:
    """Dask leaves objects as they are; by default it makes text of them."""
    with dask.config.set({"dataframe.convert-string": False}):
        yield


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["pandas", "dask"])
@pytest.mark.usefixtures("plain_objects")
def test_published_outputs_on_any_frame(shared: Path, form: str, kind: str) -> None:
    for file, scores in (
        ("aesthetic_vit_l_14_ratings", {"aesthetic_v2": "auto", "aesthetic_v1": "aesthetic-v1-l14"}),
        ("aesthetic_vit_b_32_ratings", {"aesthetic_v1": "auto"}),
    ):
        refs = np.load(shared / "refs" / f"{file}.npz")
        vectors, where = with_gaps(refs["x"])
        frame: Any = pd.DataFrame({"id": range(len(vectors)), "clip": FORMS[form](vectors)})
        frame = dd.from_pandas(frame, npartitions=3, sort=False) if kind == "dask" else frame
        for reference, head in scores.items():
            out = dic.score_aesthetic(frame, head, embedding="clip", weights_dir=shared / "weights")
            assert list(out.columns) == ["id", "clip", "aesthetic_score"]
            check(out, "aesthetic_score", refs[reference], where, len(vectors), 1e-4)
            assert str(out["aesthetic_score"].dtype) == "float32"


@pytest.mark.parametrize("form", ["arrays", "arrow fixed", "arrow float64"])
@pytest.mark.parametrize("kind", ["pandas", "dask"])
@pytest.mark.parametrize("model", ["b_32", "l_14"])
@pytest.mark.usefixtures("plain_objects")
def test_keras_outputs_on_any_frame(shared: Path, form: str, kind: str, model: str) -> None:
    refs = np.load(shared / "refs" / f"nsfw_vit_{model}_keras.npz")
    vectors, where = with_gaps(refs["x"])
    frame: Any = pd.DataFrame({"embedding": FORMS[form](vectors)})
    frame = dd.from_pandas(frame, npartitions=4, sort=False) if kind == "dask" else frame
    exact = dic.score_nsfw(frame, weights_dir=shared / "weights", round_to=None)
    check(exact, "nsfw_score", refs["nsfw"], where, len(vectors), 1e-5)
    named = dic.score_nsfw(frame, f"nsfw-{model.replace('_', '')}", weights_dir=shared / "weights", round_to=None)
    assert rows(named, "nsfw_score") == rows(exact, "nsfw_score")
    # Rounding first is what an embedding gets that was rounded before.
    rounded = pd.DataFrame({"embedding": objects([None if v is None else v.astype(np.float16) for v in vectors])})
    expected = rows(dic.score_nsfw(rounded, weights_dir=shared / "weights", round_to=None), "nsfw_score")
    found = dic.score_nsfw(frame, weights_dir=shared / "weights")
    check(found, "nsfw_score", np.array([expected[i] for i in where]), where, len(vectors), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["frame", "dask"])
def test_scores_of_each_backend(shared: Path, backend: str, kind: str) -> None:
    refs = np.load(shared / "refs" / "aesthetic_vit_l_14_ratings.npz")
    vectors, where = with_gaps(refs["x"])
    table = pa.table({"embedding": pa.array(vectors, pa.list_(pa.float32()))})
    frame = get_backend(backend).from_arrow(table)
    if kind == "dask":
        pieces = [frame.iloc[:5], frame.iloc[5:5], frame.iloc[5:]]
        frame = dd.from_map(lambda i: pieces[i], range(3), meta=frame.iloc[:0])
    out = dic.score_nsfw(dic.score_aesthetic(frame, weights_dir=shared / "weights"), weights_dir=shared / "weights")
    check(out, "aesthetic_score", refs["aesthetic_v2"], where, len(vectors), 1e-4)
    assert all((score is not None) == (i in where) for i, score in enumerate(rows(out, "nsfw_score")))
    if kind == "dask":
        assert_meta(out)


def test_plain_expressions(shared: Path) -> None:
    refs = np.load(shared / "refs" / "aesthetic_vit_l_14_ratings.npz")
    vectors, where = with_gaps(refs["x"])
    frame = pd.DataFrame({"id": range(len(vectors)), "embedding": arrow(vectors, pa.list_(pa.float32()))})
    df = dd.from_pandas(frame, npartitions=3)
    df = dic.score_aesthetic(df, weights_dir=shared / "weights")
    df = dic.score_nsfw(df, weights_dir=shared / "weights")
    nsfw = dict(zip(df["id"].compute(), df["nsfw_score"].compute(), strict=True))
    good = [i for i, score in zip(where, refs["aesthetic_v2"], strict=True) if score >= 5 and nsfw[i] < 0.5]
    assert 0 < len(good) < len(where)
    kept = df[(df.aesthetic_score >= 5) & (df.nsfw_score < 0.5)]
    assert kept["id"].compute().tolist() == good
    assert df[~(df.aesthetic_score >= 5)]["id"].compute().tolist() == [
        i for i in range(len(vectors)) if i not in where or refs["aesthetic_v2"][where.index(i)] < 5
    ]
    threshold = float(np.sort(refs["aesthetic_v2"])[-3])
    assert len(df[df.aesthetic_score >= threshold]) == 3


@pytest.mark.parametrize("kind", ["pandas", "dask"])
def test_no_embedding_at_all(kind: str) -> None:
    """A partition in which every image failed costs nothing, and needs no weights."""
    for column in (objects([None, None]), arrow([None, None], pa.list_(pa.float32())), objects([])):
        frame: Any = pd.DataFrame({"embedding": column})
        with dask.config.set({"dataframe.convert-string": False}):
            frame = dd.from_pandas(frame, npartitions=1) if kind == "dask" else frame
        for step in (dic.score_aesthetic, dic.score_nsfw):
            out = step(frame, weights_dir="/nowhere")
            name = "aesthetic_score" if step is dic.score_aesthetic else "nsfw_score"
            assert rows(out, name) == [None] * len(column)
            assert str(out[name].dtype) == "float32"


def test_null_within_a_vector_gives_null() -> None:
    unit = np.full(512, 512**-0.5, np.float32)
    hole = [None, *unit[1:].tolist()]
    frame = pd.DataFrame({"embedding": arrow([unit.tolist(), hole], pa.list_(pa.float32()))})
    scores = rows(dic.score_aesthetic(frame, "aesthetic-starter"), "aesthetic_score")
    assert scores[0] is not None
    assert scores[1] is None


def unit_frame(width: int, kind: str = "pandas") -> Any:
    x = np.random.default_rng(0).normal(size=(4, width))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    frame = pd.DataFrame({"embedding": arrow(list(x.astype(np.float32)), pa.list_(pa.float32()))})
    return dd.from_pandas(frame, npartitions=2) if kind == "dask" else frame


@pytest.mark.parametrize("kind", ["pandas", "dask"])
def test_a_width_for_which_there_is_no_head(kind: str) -> None:
    frame = unit_frame(640, kind)
    with pytest.raises(HeadError, match=r"width 640; there are aesthetic-v2-l14 \(768\), .*aesthetic-v1-b16 \(512\)"):
        rows(dic.score_aesthetic(frame), "aesthetic_score")
    with pytest.raises(HeadError, match=r"width 640; there are nsfw-l14 \(768\), nsfw-b32 \(512\)"):
        rows(dic.score_nsfw(frame), "nsfw_score")
    with pytest.raises(HeadError, match=r"'nsfw-l14' takes embeddings of width 768 .*, these have 640"):
        rows(dic.score_nsfw(frame, "nsfw-l14"), "nsfw_score")


def test_mistakes_are_told_when_the_graph_is_built() -> None:
    """Nothing is computed in these lines: the rows would raise."""

    def fails(part: pd.DataFrame) -> pd.DataFrame:
        raise AssertionError("computed")

    frame = unit_frame(768, "dask")
    frame = frame.map_partitions(fails, meta=frame)
    with pytest.raises(HeadError, match=r"unknown aesthetic head 'aesthetic-v2' \(did you mean .*aesthetic-v2-l14"):
        dic.score_aesthetic(frame, "aesthetic-v2")
    with pytest.raises(HeadError, match="head 'nsfw-l14' gives nsfw_score; aesthetic heads are auto, aesthetic-v2-l14"):
        dic.score_aesthetic(frame, "nsfw-l14")
    with pytest.raises(
        ValueError, match=r"score_nsfw needs the column clip: make it with embed, .*available: embedding"
    ):
        dic.score_nsfw(frame, embedding="clip")
    with pytest.raises(ValueError, match="embed needs the columns shard, offset, nbytes, status, error_message: read"):
        dic.embed(frame, "starter")
    for wrong in ([1], None, {"embedding": [1]}, np.zeros((2, 768))):
        with pytest.raises(TypeError, match="expected a Dask, pandas or cuDF frame"):
            dic.score_aesthetic(wrong)
    # and what is right builds a graph without looking for weights
    out = dic.score_aesthetic(frame, weights_dir="/nowhere")
    assert list(out.columns) == ["embedding", "aesthetic_score"]
    with pytest.raises(AssertionError, match="computed"):
        out.compute(scheduler="synchronous")


@pytest.mark.parametrize("kind", ["pandas", "dask"])
def test_objects_that_dask_turned_into_text(kind: str) -> None:
    frame: Any = pd.DataFrame({"embedding": objects([np.ones(768), None])})
    if kind == "dask":
        frame = dd.from_pandas(frame, npartitions=1)
    else:
        frame["embedding"] = frame["embedding"].astype("string")
    with pytest.raises(TypeError, match=r"column 'embedding' holds text, not vectors.*dataframe\.convert-string"):
        dic.score_aesthetic(frame)


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no_such_folder"):
        rows(dic.score_aesthetic(unit_frame(768), weights_dir=tmp_path / "no_such_folder"), "aesthetic_score")


SCORE = """
import sys
import dask, numpy as np, pandas as pd, pyarrow as pa
import dask.dataframe as dd
import dask_imgcurator as dic
refs = np.load(sys.argv[1])
column = pd.array(list(refs["x"]), dtype=pd.ArrowDtype(pa.list_(pa.float32())))
df = dic.score_aesthetic(dd.from_pandas(pd.DataFrame({"embedding": column}), npartitions=2))
dask.config.set({"imgcurator.weights-dir": "/changed/after/the/graph/was/built"})
print(float(abs(df["aesthetic_score"].compute().to_numpy() - refs["aesthetic_v2"]).max()))
"""


def test_weights_dir_from_the_environment(shared: Path, tmp_path: Path) -> None:
    """Settled on the client, when the graph is built; nothing is looked for in a cache or in the network."""
    env = dict(os.environ, DASK_IMGCURATOR__WEIGHTS_DIR=str(shared / "weights"), XDG_CACHE_HOME=str(tmp_path))
    env |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    refs = shared / "refs" / "aesthetic_vit_l_14_ratings.npz"
    done = subprocess.run([sys.executable, "-c", SCORE, str(refs)], env=env, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1e-4
    assert list(tmp_path.iterdir()) == []


# --- score tables ---------------------------------------------------------------------------------


def score_table(shard: str, n: int) -> pa.Table:
    values: dict[pa.DataType, Callable[[int], Any]] = {
        pa.string(): lambda i: f"{shard}-{i}",
        pa.int64(): lambda i: 2**53 + i,
        pa.int32(): lambda i: i,
        pa.float32(): lambda i: i / 8,
        pa.list_(pa.float32()): lambda i: [i / 2, -i / 4],
    }
    schema = arrow_schema([*COLUMNS, "my_int", "my_float", "my_bool"], {
        "my_int": pa.int64(), "my_float": pa.float64(), "my_bool": pa.bool_(),
    })  # fmt: skip
    values |= {pa.float64(): lambda i: i / 3, pa.bool_(): lambda i: i % 2 == 0}
    columns = [
        pa.array([None if f.nullable and i % 3 == 1 else values[f.type](i) for i in range(n)], f.type) for f in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


@pytest.mark.parametrize("backend", BACKENDS)
def test_read_scores(tmp_path: Path, backend: str) -> None:
    """Partitions come in the order of the shards that they describe, whatever the files are called."""
    engine = get_backend(backend)
    names = {"b/1.tar": "zz", "a/2.tar": "mm", "b/0.tar": "kk", "a/10.tar": "aa"}
    for shard, name in names.items():
        frame = engine.from_arrow(score_table(shard, 5))
        write_score_file(frame, str(tmp_path / f"{name}.parquet"), {"shard": shard}, backend, {})
    (tmp_path / ".partial-0-x.parquet").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("no table")
    df = dic.read_scores(tmp_path, backend=backend)
    assert df.npartitions == 4
    order = sorted(names)
    assert order == ["a/10.tar", "a/2.tar", "b/0.tar", "b/1.tar"]
    expected = pa.concat_tables([score_table(shard, 5) for shard in order])
    whole = df.compute(scheduler="synchronous")
    assert engine.to_arrow(whole).equals(expected)
    assert_meta(df)
    assert list(df.dtypes) == list(engine.from_arrow(expected).dtypes)
    # files one by one, in any order; and columns chosen by Dask
    listed = dic.read_scores([str(tmp_path / f"{n}.parquet") for n in ("mm", "aa")], backend=backend)
    assert rows(listed[["key"]], "key") == [
        k for shard in ("a/10.tar", "a/2.tar") for k in score_table(shard, 5)["key"].to_pylist()
    ]
    assert rows(dic.read_scores(str(tmp_path / "zz.parquet"), backend=backend), "offset") == [
        2**53 + i for i in range(5)
    ]


def test_read_scores_of_other_origin(tmp_path: Path) -> None:
    """Files without our metadata come in the order of their names; and with the types that they have."""
    for name in ("b", "a"):
        pd.DataFrame({"n": [1, 2], "name": [name, None], "x": [0.5, np.nan]}).to_parquet(tmp_path / f"{name}.parquet")
    df = dic.read_scores(tmp_path, backend="pandas")
    assert rows(df, "n", "name", "x") == [(1, "a", 0.5), (2, None, None), (1, "b", 0.5), (2, None, None)]
    assert_meta(df)


def test_read_scores_where_there_are_none(tmp_path: Path) -> None:
    for wrong in (tmp_path, tmp_path / "nowhere", tmp_path / "x.parquet"):
        with pytest.raises(FileNotFoundError, match="no score table at"):
            dic.read_scores(wrong, backend="pandas")


# --- the whole chain ------------------------------------------------------------------------------


def picture(seed: int) -> bytes:
    """A drawing like no other, as PNG."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (230 + 20 * seed, 300 - 5 * seed), tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, r = rng.integers(0, 180), rng.integers(0, 180), rng.integers(10, 80)
        draw.ellipse((x, y, x + r, y + r), fill=tuple(rng.integers(0, 256, 3).tolist()))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


PER_SHARD = 4
IMAGES: dict[str, bytes] = {f"p{i}": picture(i) for i in range(3 * PER_SHARD)} | {"p6": b"no picture at all"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("shards")
    names = list(IMAGES)
    out = []
    for number in range(3):
        path = folder / f"{number}.tar"
        with tarfile.open(path, "w") as tar:
            for name in names[number * PER_SHARD : (number + 1) * PER_SHARD]:
                for member, data in ((f"{name}.png", IMAGES[name]), (f"{name}.txt", name.encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        out.append(str(path))
    return out


def embed(df: Any, **options: Any) -> Any:
    return dic.embed(df, "starter", **options)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Embedding of each picture, from a shard that holds no other: it can be nobody else's."""
    folder = tmp_path_factory.mktemp("alone")
    out = {}
    for name, data in IMAGES.items():
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            info = tarfile.TarInfo("only.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        frame = dic.read_webdataset(folder / f"{name}.tar", backend="pandas").compute(scheduler="synchronous")
        out[name] = rows(embed(frame), "embedding")[0]
    vectors = np.array([v for v in out.values() if v is not None])
    # They differ by far more than the comparisons below allow.
    assert np.abs(vectors[:, None] - vectors[None]).max(axis=2)[~np.eye(len(vectors), dtype=bool)].min() > 0.01
    return out


def check_rows(frame: Any, alone: dict[str, list[float]], keys: list[str], column: str = "embedding") -> None:
    found = rows(frame, "key", column, "status", "sha256", "width", "height")
    assert [row[0] for row in found] == keys
    for key, vector, status, sha256, width, height in found:
        assert sha256 == hashlib.sha256(IMAGES[key]).hexdigest()
        if alone[key] is None:
            assert (vector, status, width, height) == (None, "decode_error", None, None)
        else:
            assert (status, (width, height)) == ("ok", Image.open(io.BytesIO(IMAGES[key])).size)
            np.testing.assert_allclose(vector, alone[key], rtol=0, atol=1e-3)
            assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_row_has_its_own_embedding(shards: list[str], alone: dict[str, list[float]], backend: str) -> None:
    df = dic.read_webdataset(shards, backend=backend)
    keys = list(IMAGES)
    embedded = embed(df)
    check_rows(embedded, alone, keys)
    assert_meta(embedded)
    # partitions dropped, before and after
    check_rows(embed(df.partitions[1:]), alone, keys[PER_SHARD:])
    check_rows(embedded.partitions[[2, 0]], alone, [*keys[2 * PER_SHARD :], *keys[:PER_SHARD]])
    # rows filtered, and in another order, over all shards, in one frame
    frame = df.compute(scheduler="synchronous")
    order = np.random.default_rng(1).permutation(len(frame))
    check_rows(embed(frame.iloc[order], batch_size=5), alone, [keys[i] for i in order])
    chosen = ["p1", "p6", "p9"]
    check_rows(embed(df[df["key"].isin(chosen)]), alone, chosen)
    nothing = embed(df[df["key"] == "nobody"])
    check_rows(nothing, alone, [])
    assert_meta(nothing)


def test_rows_shuffled_by_dask(shards: list[str], alone: dict[str, list[float]]) -> None:
    df = dic.read_webdataset(shards, backend="pandas")
    backwards = df.sort_values("nbytes", ascending=False)
    by_size = sorted(IMAGES, key=lambda name: -len(IMAGES[name]))
    check_rows(embed(backwards), alone, by_size)
    check_rows(embed(df.repartition(npartitions=2)), alone, list(IMAGES))
    mixed = embed(df.shuffle("key")).compute(scheduler="synchronous")
    check_rows(mixed, alone, mixed["key"].tolist())
    assert sorted(mixed["key"]) == sorted(IMAGES)


def test_own_column_name(shards: list[str], alone: dict[str, list[float]]) -> None:
    df = embed(dic.read_webdataset(shards[0], backend="pandas"), column="preview")
    assert "embedding" not in df.columns
    check_rows(df, alone, list(IMAGES)[:PER_SHARD], column="preview")
    scored = dic.score_aesthetic(df, "aesthetic-starter", embedding="preview")
    assert_meta(scored)
    assert all(score is not None for score in rows(scored, "aesthetic_score"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_of_the_user_between_ours(shards: list[str], alone: dict[str, list[float]], backend: str) -> None:
    def area(part: Any) -> Any:
        return part.assign(area=part["width"] * part["height"])

    def number(part: Any) -> Any:
        return part.assign(number=part["key"].str[1:].astype("int64"))

    df = dic.read_webdataset(shards, backend=backend)
    df = df.map_partitions(number, meta=number(df.partitions[0].compute().iloc[:0]))
    df = df[df["number"] % 2 == 0]
    df = embed(df)
    df = df.map_partitions(area)
    df = dic.score_aesthetic(df, "aesthetic-starter")
    df["rounded"] = df["aesthetic_score"].round(1)
    df = dic.score_nsfw(df, "nsfw-starter")
    even = [key for key in IMAGES if int(key[1:]) % 2 == 0]
    check_rows(df, alone, even)
    found = rows(df, "key", "number", "area", "aesthetic_score", "rounded", "nsfw_score")
    for key, n, pixels, aesthetic, rounded, nsfw in found:
        assert n == int(key[1:])
        if alone[key] is None:
            assert (pixels, aesthetic, rounded, nsfw) == (None, None, None, None)
            continue
        width, height = Image.open(io.BytesIO(IMAGES[key])).size
        assert pixels == width * height
        assert rounded == pytest.approx(aesthetic, abs=0.051)
        assert 0 <= nsfw <= 1


def test_embed_settles_on_the_client_what_it_can(shards: list[str]) -> None:
    df = dic.read_webdataset(shards, backend="pandas")
    with pytest.raises(ModelError, match="ViT-L-41"):
        dic.embed(df, "ViT-L-41")
    with pytest.raises(ValueError, match="batch_size=0"):
        embed(df, batch_size=0)
    with dask.config.set({"imgcurator.max-pixels": 75_000}):
        small = embed(df)
    # The setting travelled in the graph.
    sizes = {key: Image.open(io.BytesIO(data)).size for key, data in IMAGES.items() if key != "p6"}
    expected = {key: "too_large" if w * h > 75_000 else "ok" for key, (w, h) in sizes.items()} | {"p6": "decode_error"}
    assert dict(rows(small, "key", "status")) == expected
    assert set(expected.values()) == {"ok", "too_large", "decode_error"}


def test_the_design_s_example_on_a_cluster(shards: list[str], tmp_path: Path) -> None:
    """Section 2.1 of the design, with the model and the heads that need no download; workers are threads here."""
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=":0"):
        df = dic.read_webdataset(shards, backend="pandas")
        df = dic.embed(df, model="starter")
        df = dic.score_aesthetic(df, "aesthetic-starter")
        df = dic.score_nsfw(df, "nsfw-starter")
        scores = df[["key", "aesthetic_score"]].compute().set_index("key")["aesthetic_score"]
        middle = float(scores.median())
        df = df[(df.aesthetic_score >= middle) & (df.nsfw_score <= 1)]
        stats = dic.to_webdataset(df, tmp_path / "curated", max_count=4)
    kept = [key for key in IMAGES if scores[key] >= middle]
    assert [s["count"] for s in stats] == [4, len(kept) - 4]
    members = []
    for path in sorted((tmp_path / "curated").glob("*.tar")):
        with tarfile.open(path) as tar:
            members += [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    assert members == [m for key in kept for m in ((f"{key}.png", IMAGES[key]), (f"{key}.txt", key.encode()))]
    table = dic.read_scores(tmp_path / "curated", backend="pandas").compute(scheduler="synchronous")
    assert table["key"].tolist() == kept
    assert table["aesthetic_score"].tolist() == [scores[key] for key in kept]
