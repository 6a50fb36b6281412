"""Search, against a product of two matrices and against open_clip by hand; in Python and by the command line."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import open_clip
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from distributed import Client
from PIL import Image

import dask_imgcurator as dic
from dask_imgcurator.checks.samples import SampleShards, make_sample_shards
from dask_imgcurator.cli.main import cli
from dask_imgcurator.engine.backend import get_backend
from dask_imgcurator.models import ModelError
from dask_imgcurator.models.encoders import load_encoder, resolve_encoder
from dask_imgcurator.schema import METADATA_KEY
from dask_imgcurator.select.syntax import WhereError
from dask_imgcurator.similarity.scan import SearchError
from dask_imgcurator.steps.score_table import write_score_file

WIDTH = 16
#: The smallest architecture among those that open_clip lists.
MODEL, WEIGHTS = "ViT-S-32-alt", "random:0"

needs_faiss = pytest.mark.skipif(find_spec("faiss") is None, reason="the search extra is not installed")


def vectors(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, WIDTH)).astype(np.float32)


def make(rows: int, seed: int = 0, captions: list[str | None] | None = None) -> pa.Table:
    """A score table with rows that failed, rows that are equal to others, and rows without a vector."""
    x = vectors(rows, seed)
    x[rows // 2 :: 3] = x[: len(x[rows // 2 :: 3])]  # some vectors twice
    ok = np.arange(rows) % 7 != 3
    absent = ~ok | (np.arange(rows) % 11 == 5)
    rng = np.random.default_rng(seed + 1)
    columns = {
        "key": pa.array([f"{i % 1000:03d}" for i in rng.permutation(rows)], pa.string()),
        "shard": pa.array([f"/data/{i % 3}.tar" for i in range(rows)], pa.string()),
        "offset": pa.array(np.arange(rows) * 1024 + 512, pa.int64()),
        "nbytes": pa.array(np.full(rows, 100), pa.int64()),
        "sample_offset": pa.array(np.arange(rows) * 1024, pa.int64()),
        "caption": pa.array(captions or [None if i % 5 else f"row {i}" for i in range(rows)], pa.string()),
        "status": pa.array(np.where(ok, "ok", "decode_error"), pa.string()),
        "width": pa.array(rng.integers(100, 1000, rows), pa.int32(), mask=~ok),
        "embedding": pa.array([None if a else v for a, v in zip(absent, x.tolist(), strict=True)]).cast(
            pa.list_(pa.float32())
        ),
        "nsfw_score": pa.array(rng.random(rows), pa.float32(), mask=~ok),
    }
    return pa.table(columns)


def by_hand(table: pa.Table, query: np.ndarray, k: int, kept: np.ndarray | None = None) -> pd.DataFrame:
    """The same by one product of matrices and one sort."""
    frame = table.to_pandas()
    there = frame["embedding"].notna() & (frame["status"] == "ok")
    frame = frame[there if kept is None else there & kept]
    x = np.stack(frame["embedding"]).astype(np.float64)
    cosine = (x @ query) / np.linalg.norm(x, axis=1) / np.linalg.norm(query)
    frame = frame.assign(similarity=cosine.astype(np.float32), order=-cosine.round(12))
    return frame.sort_values(["order", "shard", "key", "sample_offset"]).head(k).reset_index(drop=True)


def same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    assert found["sample_offset"].tolist() == expected["sample_offset"].tolist()
    assert found["key"].tolist() == expected["key"].tolist()
    np.testing.assert_allclose(found["similarity"], expected["similarity"], rtol=0, atol=2e-7)


def frame_of(table: pa.Table) -> Any:
    return get_backend("pandas").from_arrow(table)


# --- what is found --------------------------------------------------------------------------------


def test_like_one_product_of_matrices() -> None:
    table, query = make(500), vectors(2, 9)
    found = dic.search(frame_of(table), embedding=query, k=30)
    for number in (0, 1):
        own = found[found["query_number"] == number]
        same(own, by_hand(table, query[number], 30))
        assert own["query"].unique().tolist() == [f"embedding {number + 1}"]
        assert own["rank"].tolist() == list(range(1, 31))
    # All columns but the vectors, with the values of their rows.
    assert list(found.columns[:4]) == ["query", "query_number", "rank", "similarity"]
    assert list(found.columns[4:]) == [name for name in table.column_names if name != "embedding"]
    assert found["similarity"].dtype == np.float32
    rows = table.to_pandas().set_index("sample_offset")
    for row in found.to_dict("records"):
        original = rows.loc[row["sample_offset"]]
        assert (row["shard"], row["offset"], row["width"]) == (original.shard, original.offset, original.width)
        assert row["caption"] == original.caption or (pd.isna(row["caption"]) and pd.isna(original.caption))
    # The table has equal vectors, so ties stood to be broken.
    assert found.duplicated(["query_number", "similarity"]).any()


def test_neither_partitions_nor_the_order_of_rows_matter() -> None:
    table, query = make(300), vectors(1, 5)
    whole = dic.search(frame_of(table), embedding=query, k=40)
    for seed, parts in ((0, 1), (1, 7), (2, 40), (3, 300)):
        order = np.random.default_rng(seed).permutation(300)
        df = dd.from_pandas(frame_of(table.take(order)), npartitions=parts, sort=False)
        with dask.config.set(scheduler="sync" if seed % 2 else "threads"):
            found = dic.search(df, embedding=query, k=40)
        pd.testing.assert_frame_equal(found, whole)  # to the last bit


@pytest.fixture(scope="module")
def score_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty files, of whose columns Dask reads several as one partition where few are wanted."""
    out = tmp_path_factory.mktemp("scores")
    for part in range(30):
        table = make(400, seed=part, captions=[f"row {i} of {part}, which takes some space" for i in range(400)])
        shards = pa.array([f"/data/{part:02d}.tar"] * 400, pa.string())
        pq.write_table(table.set_column(1, "shard", shards), out / f"{part:02d}.parquet")
    return out


@pytest.mark.parametrize("kind", ["files", "shuffled", "persisted", "on a client"])
def test_rows_are_known_by_what_they_are_and_not_by_where(score_files: Path, kind: str, client: Client) -> None:
    """Partitions of one projection of a frame are not those of another."""
    whole = pa.concat_tables([pq.read_table(path) for path in sorted(score_files.glob("*.parquet"))])
    queries = vectors(8, 77)
    rows = whole.to_pandas().set_index(["shard", "sample_offset"])
    df = dd.read_parquet(score_files)
    assert len(df[["key"]].map_partitions(len, meta=("rows", int)).compute()) < df.npartitions  # several files are one
    with dask.config.set(scheduler="sync"):
        if kind == "shuffled":
            df = df.repartition(npartitions=7)
            df = df.map_partitions(lambda part: part.sample(frac=1, random_state=0), meta=df)
        elif kind == "persisted":
            df = df.persist()
        place = {"client": client} if kind == "on a client" else {}
        found = dic.search(df, embedding=queries, k=9, where="width >= 300", **place)
    kept = (whole.to_pandas()["width"] >= 300).to_numpy()
    for number, query in enumerate(queries):
        own = found[found["query_number"] == number]
        same(own, by_hand(whole, query, 9, kept))
    for row in found.to_dict("records"):
        original = rows.loc[(row["shard"], row["sample_offset"])]
        assert (row["key"], row["offset"], row["width"]) == (original.key, original.offset, original.width)
        assert row["caption"] == original.caption or (pd.isna(row["caption"]) and pd.isna(original.caption))
    like = dic.search(df, like=f"{found['shard'][0]}:{found['key'][0]}", k=2)
    assert (like["similarity"] < 1).all() or like["sample_offset"][0] != found["sample_offset"][0]


def test_length_of_vectors_does_not_matter_and_no_direction_is_not_found() -> None:
    x = np.array([[3, 0], [0, 5], [1, 1], [0, 0], [np.nan, 1], [np.inf, 1], [-2, 0]], np.float32)
    frame = pd.DataFrame({"key": list("abcdefg"), "embedding": list(x)})
    found = dic.search(frame, embedding=[10.0, 0.0])
    assert found["key"].tolist() == ["a", "c", "b", "g"]
    np.testing.assert_allclose(found["similarity"], [1, 0.5**0.5, 0, -1], atol=1e-7)


def test_only_what_where_takes() -> None:
    table, query = make(400), vectors(1, 3)[0]
    df = dd.from_pandas(frame_of(table), npartitions=5, sort=False)
    found = dic.search(df, embedding=query, k=25, where="width >= 500 and nsfw_score < 0.5")
    data = table.to_pandas()
    same(found, by_hand(table, query, 25, (data["width"] >= 500) & (data["nsfw_score"] < 0.5)))
    assert len(dic.search(df, embedding=query, where="width > 100000")) == 0
    assert list(dic.search(df, embedding=query, where="width > 100000").columns) == list(found.columns)
    with pytest.raises(WhereError, match="widht"):
        dic.search(df, embedding=query, where="widht >= 500")


def test_more_than_there_is() -> None:
    table = make(50)
    there = sum(v is not None for v in table["embedding"].to_pylist())
    found = dic.search(dd.from_pandas(frame_of(table), npartitions=4, sort=False), embedding=vectors(1), k=1000)
    assert len(found) == there < 50
    assert (found["status"] == "ok").all()
    empty = dic.search(frame_of(table.slice(0, 0)), embedding=vectors(1))
    assert len(empty) == 0
    assert list(empty.columns) == list(found.columns)


def test_like_a_row() -> None:
    table = make(200)
    frame = frame_of(table)
    row = next(i for i in range(200) if table["embedding"][i].is_valid)
    key, shard = table["key"][row].as_py(), table["shard"][row].as_py()
    found = dic.search(frame, like=key, k=10)
    query = np.array(table["embedding"][row].as_py())
    data = table.to_pandas()
    same(found, by_hand(table, query, 10, data["sample_offset"] != data["sample_offset"][row]))
    assert found["query"].unique().tolist() == [f"{shard}:{key}"]
    # Beside another query, which finds k rows too, this one among them.
    both = dic.search(dd.from_pandas(frame, npartitions=3, sort=False), like=key, embedding=query, k=10)
    assert both.groupby("query_number").size().tolist() == [10, 10]
    assert both["key"].tolist()[:10] == found["key"].tolist()
    same(both[10:], by_hand(table, query, 10))


def test_keys_that_several_rows_have() -> None:
    table = pa.concat_tables([make(20).slice(0, 3), make(20).slice(1, 1)])
    column = pa.array(["/data/a.tar", "/data/b.tar", None, "/data/c.tar"])
    frame = frame_of(table.set_column(1, "shard", column).set_column(0, "key", pa.array(["x", "y:1", "z", "y:1"])))
    with pytest.raises(SearchError, match=r"2 rows have that key: say which, as /data/b.tar:y:1 or /data/c.tar:y:1"):
        dic.search(frame, like="y:1")
    for name in ("/data/b.tar:y:1", "b.tar:y:1"):
        assert dic.search(frame, like=name, k=1)["query"].tolist() == ["/data/b.tar:y:1"]
    assert dic.search(frame, like="z", k=1)["rank"].tolist() == [1]
    with pytest.raises(SearchError, match="like='w': no row"):
        dic.search(frame, like=["x", "w"])
    with pytest.raises(SearchError, match="the row has no embedding"):
        dic.search(frame_of(make(20)), like=make(20)["key"][3].as_py())


def test_columns_that_are_called_as_ours_are() -> None:
    frame = frame_of(make(20)).assign(similarity=0.25, rank="first")
    found = dic.search(frame, embedding=vectors(1), k=3)
    assert found["table_similarity"].tolist() == [0.25] * 3
    assert found["table_rank"].tolist() == ["first"] * 3
    assert found["rank"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to search for: give text="),
        ({"embedding": vectors(1), "k": 0}, "k=0: it must be at least 1"),
        ({"embedding": [1.0, 2.0]}, "the query's embedding has 2 numbers, those of column 'embedding' have 16"),
        ({"embedding": [[0.0] * WIDTH]}, "no direction in row 0"),
        ({"embedding": np.zeros((1, 2, 3))}, r"shape \(1, 2, 3\)"),
        ({"embedding": ["a"]}, "is not an array of numbers"),
        ({"text": "a red car"}, "the model of the embeddings is not recorded .* model= and pretrained="),
        ({"text": " ", "model": MODEL, "pretrained": WEIGHTS}, "text=' ': say what to look for"),
        ({"text": "a", "model": "starter"}, "the starter model has none"),
        ({"embedding": vectors(1), "index": "x"}, "an index belongs to the files"),
        ({"embedding": vectors(1), "column": "vector"}, "search needs the column vector"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dic.search(frame_of(make(20)), **options)


# --- pictures and texts ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SampleShards:
    return make_sample_shards(tmp_path_factory.mktemp("samples"), count=64, per_shard=16)


def written(made: SampleShards, out: Path, model: str, pretrained: str | None) -> Path:
    """A score table as `score` writes it, without a cluster."""
    dtype = "float32"
    encoder = load_encoder(resolve_encoder(model, pretrained, dtype)).provenance
    for path in made.shards:
        df = dic.embed(dic.read_webdataset([str(path)], backend="pandas"), model, pretrained, dtype=dtype)
        if model == "starter":
            df = dic.score_nsfw(df, "nsfw-starter")
        with dask.config.set(scheduler="sync"):
            frame = df.compute()
        provenance = {"encoder": encoder, "decode": {"decoder": "pillow"}, "shard": str(path)}
        write_score_file(frame, str(out / f"{path.stem}.parquet"), provenance, "pandas", {})
    return out


@pytest.fixture(scope="module")
def starter_table(made: SampleShards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(made, tmp_path_factory.mktemp("starter"), "starter", None)


@pytest.fixture(scope="module")
def clip_table(made: SampleShards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(made, tmp_path_factory.mktemp("clip"), MODEL, WEIGHTS)


def read(folder: Path) -> pd.DataFrame:
    return pd.concat([pq.read_table(p).to_pandas() for p in sorted(folder.glob("*.parquet"))], ignore_index=True)


def bytes_of(row: Any) -> bytes:
    with Path(row["shard"]).open("rb") as file:
        file.seek(row["offset"])
        return file.read(row["nbytes"])


def test_an_image_finds_itself(starter_table: Path, client: Client, tmp_path: Path) -> None:
    rows = read(starter_table)
    # Not one of the near-copies that the samples have on purpose.
    ok = rows[(rows["status"] == "ok") & ~rows["sha256"].duplicated(keep=False)]
    chosen = ok.iloc[[1, len(ok) // 2, -1]]
    paths = []
    for i, row in enumerate(chosen.to_dict("records")):
        paths.append(tmp_path / f"query {i}.{row['ext']}")
        paths[-1].write_bytes(bytes_of(row))
    found = dic.search(starter_table, image=paths, k=3, client=client, backend="pandas")
    first = found[found["rank"] == 1]
    assert first["key"].tolist() == chosen["key"].tolist()
    assert (first["similarity"] >= 0.9999).all()
    assert first["query"].tolist() == [str(p) for p in paths]


def test_a_text_finds_what_open_clip_finds(clip_table: Path, client: Client) -> None:
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms(MODEL, load_weights=False)
    torch.set_rng_state(state)
    model.eval()
    rows = read(clip_table)
    ok = rows[rows["status"] == "ok"].reset_index(drop=True)
    texts = ["a red car", "two dogs on a beach"]
    with torch.inference_mode():
        pixels = [transform(Image.open(io.BytesIO(bytes_of(row)))) for _, row in ok.iterrows()]
        images = torch.cat([model.encode_image(p[None], normalize=True) for p in pixels]).numpy()
        asked = model.encode_text(open_clip.get_tokenizer(MODEL)(texts), normalize=True).numpy()
    found = dic.search(clip_table, text=texts, k=len(ok), client=client, backend="pandas")
    for number, text in enumerate(texts):
        own = found[found["query"] == text].set_index("key")["similarity"]
        expected = pd.Series(images @ asked[number], ok["key"])
        np.testing.assert_allclose(own, expected[own.index], rtol=0, atol=1e-5)
        assert expected.max() - expected.min() > 1e-2  # or the tolerance would show nothing
        assert own.index[0] == expected.idxmax()


def test_the_model_must_be_the_tables(clip_table: Path, starter_table: Path, client: Client, tmp_path: Path) -> None:
    use: dict[str, Any] = {"client": client, "backend": "pandas"}
    with pytest.raises(ModelError, match="the starter model has none"):
        dic.search(starter_table, text="a dog", **use)
    with pytest.raises(ModelError, match=r"made with pretrained 'random:0', the query's would be with 'random:1'"):
        dic.search(clip_table, text="a dog", pretrained="random:1", **use)
    with pytest.raises(ModelError, match=r"made with model 'starter', the query's would be with 'ViT-S-32-alt'"):
        dic.search(starter_table, text="a dog", model=MODEL, pretrained=WEIGHTS, **use)
    with pytest.raises(SearchError, match=r"made with model 'ViT-S-32-alt', those of .* with 'starter'"):
        dic.search([clip_table, starter_table], text="a dog", **use)
    # A checkpoint's path is not recorded, but its name and hash are.
    for path in clip_table.glob("*.parquet"):
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[METADATA_KEY.encode()])
        about["encoder"] |= {"pretrained": "my.pt", "weights_sha256": "00ff"}
        pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(about)}), tmp_path / path.name)
    with pytest.raises(ModelError, match=r"checkpoint 'my.pt' \(sha256 00ff\): give its path, as pretrained="):
        dic.search(tmp_path, text="a dog", **use)


def test_images_that_cannot_be_searched_for(starter_table: Path, client: Client, tmp_path: Path) -> None:
    use: dict[str, Any] = {"client": client, "backend": "pandas"}
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff" + b"x" * 100)
    with pytest.raises(SearchError, match=r"broken.jpg: .*\(decode_error\)"):
        dic.search(starter_table, image=tmp_path / "broken.jpg", **use)
    with pytest.raises(FileNotFoundError):
        dic.search(starter_table, image=tmp_path / "none.jpg", **use)
    with pytest.raises(FileNotFoundError, match="no score table"):
        dic.search(tmp_path / "none", text="a", **use)


# --- the page -------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """What a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> </title>\u202e"


def seen(path: Path) -> Tags:
    parser = Tags()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser


def test_the_page_shows_the_query_and_what_it_found(starter_table: Path, client: Client, tmp_path: Path) -> None:
    rows = read(starter_table)
    row = rows[rows["status"] == "ok"].iloc[3]
    (tmp_path / "q.img").write_bytes(bytes_of(row))
    found = dic.search(
        starter_table,
        image=tmp_path / "q.img",
        like=f"{Path(row['shard']).name}:{row['key']}",
        k=6,
        html=tmp_path / "page.html",
        client=client,
        backend="pandas",
    )
    page = seen(tmp_path / "page.html")
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == 6 + 6 + 2  # both queries are shown too
    assert all(str(attrs["src"]).startswith("data:image/webp;base64,") for attrs in pictures)
    veiled = sum(tag == "label" for tag, attrs in page.tags)
    queried = [row["nsfw_score"] >= 0.5]
    assert veiled == int((found["nsfw_score"] >= 0.5).sum()) + sum(queried)
    assert "Query 1" in page.text and "Query 2" in page.text
    assert f"{found['similarity'][1]:.5g}" in page.text
    assert "starter model is a preview" in page.text
    assert "Image: q.img" in page.text
    assert str(tmp_path) not in page.text


def test_hostile_texts_stay_text(clip_table: Path, client: Client, tmp_path: Path) -> None:
    for path in clip_table.glob("*.parquet"):
        table = pq.read_table(path)
        at = table.schema.get_field_index("caption")
        table = table.set_column(at, "caption", pa.array([HOSTILE] * len(table)))
        at = table.schema.get_field_index("key")
        table = table.set_column(at, "key", pa.array([f"{HOSTILE}{i}" for i in range(len(table))]))
        pq.write_table(
            table.append_column("nsfw_score", pa.array(np.full(len(table), 0.9, np.float32))), tmp_path / path.name
        )
    out = tmp_path / "page.html"
    found = dic.search(tmp_path, text=HOSTILE, k=4, html=out, client=client, backend="pandas")
    assert found["query"].unique().tolist() == [HOSTILE]
    page = seen(out)
    assert {tag for tag, _ in page.tags}.isdisjoint({"iframe", "object", "svg"})
    assert sum(tag == "script" for tag, _ in page.tags) == 1  # the page's own, whose hash the policy names
    assert all(str(attrs["src"]).startswith("data:") for tag, attrs in page.tags if tag == "img")
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert sum(tag == "label" for tag, _ in page.tags) == 4  # all veiled
    assert "alert(1)" in page.text
    assert "\u202e" not in out.read_text(encoding="utf-8")


# --- the command line -----------------------------------------------------------------------------


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli, ["search", *map(str, arguments)])


def test_the_command(clip_table: Path, client: Client, tmp_path: Path) -> None:
    outs = [tmp_path / f"found.{ext}" for ext in ("parquet", "csv", "json")]
    for out in outs:
        done = run(
            clip_table, "--text", "a dog", "-k", "5", "--where", "width >= 160", "--backend", "pandas", "--out", out
        )
        assert done.exit_code == 0, done.output
    expected = dic.search(clip_table, text="a dog", k=5, where="width >= 160", client=client, backend="pandas")
    assert [row["key"] for row in pq.read_table(outs[0]).to_pylist()] == expected["key"].tolist()
    assert pd.read_csv(outs[1], dtype={"key": str})["key"].tolist() == expected["key"].tolist()
    assert [row["key"] for row in json.loads(outs[2].read_text())] == expected["key"].tolist()
    for key in expected["key"]:
        assert key in done.output
    quiet = run(clip_table, "--like", expected["key"][0], "-q", "--html", tmp_path / "p.html", "--backend", "pandas")
    assert (quiet.exit_code, quiet.output) == (0, "")
    assert (tmp_path / "p.html").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to search for: give --text, --image or --like"),
        (["--text", "a", "--out", "found.xlsx"], "must end in .parquet, .csv or .json"),
        (["--text", "a", "-k", "0"], "0 is not in the range"),
        (["--like", "nobody"], "no row of the table has that key"),
        (["--like", "a", "--index", "a", "--build-index", "b"], "not both"),
        (["--like", "a", "--where", "widht > 1"], "widht"),
    ],
)
def test_wrong_usage(clip_table: Path, arguments: list[str], message: str) -> None:
    done = run(clip_table, *arguments, "--backend", "pandas")
    assert done.exit_code == 2
    assert message in done.output.replace("\n", " ")


# --- an index -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30,000 rows about 300 centres in 6 files, one of them empty: enough for more than one cell."""
    out = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(300, WIDTH))
    for part, rows in enumerate((6000, 6000, 0, 6000, 6000, 6000)):
        table = make(max(rows, 1), seed=part).slice(0, rows)
        x = (centres[rng.integers(0, 300, rows)] + 0.5 * rng.normal(size=(rows, WIDTH))).astype(np.float32)
        x = [None if old is None else new for old, new in zip(table["embedding"].to_pylist(), x.tolist(), strict=True)]
        at = table.schema.get_field_index("embedding")
        table = table.set_column(at, "embedding", pa.array(x, pa.list_(pa.float32())))
        shards = pa.array([f"/data/{part}.tar"] * rows, pa.string())
        pq.write_table(table.set_column(1, "shard", shards), out / f"{part}.parquet")
    return out


@pytest.fixture(scope="module")
def index(large: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    pytest.importorskip("faiss")
    dic.build_search_index(large, folder)
    return folder


@needs_faiss
def test_an_index_finds_nearly_all_with_the_same_similarities(large: Path, index: Path, client: Client) -> None:
    about = json.loads((index / "index.json").read_text())
    rows = read(large)
    ok = rows[rows["embedding"].notna() & (rows["status"] == "ok")]
    assert about["vectors"] == len(ok)
    assert about["rows"] == (rows["status"] == "ok").sum()
    assert 1 < about["nprobe"] < about["cells"]
    queries = np.stack(ok["embedding"].iloc[::600])
    use: dict[str, Any] = {"embedding": queries, "client": client, "backend": "pandas"}
    exact, found = dic.search(large, **use), dic.search(large, index=index, **use)
    identity = ["query_number", "shard", "key", "sample_offset"]
    both = found.merge(exact, on=identity)
    recall = len(both) / len(exact)
    assert recall > 0.9
    assert about["recall"] >= 0.98
    assert len(found) == len(exact)
    # What both find has the same similarity, to the last bit, and stands in the same order.
    assert both["similarity_x"].equals(both["similarity_y"])
    assert both.groupby("query_number")["rank_y"].is_monotonic_increasing.all()


@needs_faiss
def test_an_index_and_where(large: Path, index: Path, client: Client) -> None:
    use: dict[str, Any] = {"client": client, "backend": "pandas"}
    rows = read(large)
    row = rows[rows["embedding"].notna() & (rows["status"] == "ok")].iloc[7000]
    few = "nsfw_score < 0.002"
    expected = dic.search(large, embedding=row["embedding"], k=1000, where=few, **use)
    found = dic.search(large, embedding=row["embedding"], k=1000, where=few, index=index, **use)
    assert 0 < len(expected) < 1000
    pd.testing.assert_frame_equal(found, expected)  # of so few rows, all are found
    assert len(dic.search(large, embedding=row["embedding"], where="width < 0", index=index, **use)) == 0


@needs_faiss
def test_an_index_of_another_table_is_refused(large: Path, index: Path, client: Client, tmp_path: Path) -> None:
    use: dict[str, Any] = {"embedding": vectors(1), "client": client, "backend": "pandas"}
    with pytest.raises(FileNotFoundError, match="no search index at"):
        dic.search(large, index=tmp_path, **use)
    with pytest.raises(FileExistsError, match="already holds an index"):
        dic.build_search_index(large, index)
    with pytest.raises(SearchError, match="built from 6 files, the table has 2"):
        dic.search([large / "0.parquet", large / "1.parquet"], index=index, **use)
    copies = tmp_path / "copies"
    copies.mkdir()
    for path in large.glob("*.parquet"):
        (copies / path.name).write_bytes(path.read_bytes())
        os.utime(copies / path.name, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    assert len(dic.search(copies, index=index, **use)) == 20  # the same files, elsewhere
    # Rows of one file in another order: same name, same number of rows.
    table = pq.read_table(copies / "3.parquet")
    table = table.take(np.arange(len(table))[::-1])
    pq.write_table(table, copies / "3.parquet")
    with pytest.raises(SearchError, match=r"3.parquet was written or changed after it was built"):
        dic.search(copies, index=index, **use)
    # Even where versions are made to agree: rows are found by what they are, wherever they stand in their file.
    forged = tmp_path / "forged"
    shutil.copytree(index, forged)
    row = pd.Series(table["embedding"]).dropna().index[5]
    query = {**use, "embedding": table["embedding"][row].as_py()}

    def forge() -> None:
        about = json.loads((index / "index.json").read_text())
        stat = (copies / "3.parquet").stat()
        about["files"][3]["version"] = f"size={stat.st_size} mtime_ns={stat.st_mtime_ns}"
        (forged / "index.json").write_text(json.dumps(about))

    forge()
    found = dic.search(copies, index=forged, **query)
    pd.testing.assert_frame_equal(found, dic.search(large, index=index, **query))
    keys = table["key"].to_pylist()
    keys[row] = "another"
    pq.write_table(table.set_column(0, "key", pa.array(keys)), copies / "3.parquet")
    forge()
    with pytest.raises(SearchError, match="lists rows that the table lacks"):
        dic.search(copies, index=forged, **query)


@needs_faiss
def test_small_tables_and_the_command(clip_table: Path, client: Client, tmp_path: Path) -> None:
    done = run(clip_table, "--build-index", tmp_path / "index", "--text", "a dog", "--backend", "pandas")
    assert done.exit_code == 0, done.output
    assert "it finds 100.0% of the 20 rows" in done.output.replace("\n", " ")
    exact = dic.search(clip_table, text="a dog", client=client, backend="pandas")
    found = dic.search(clip_table, text="a dog", index=tmp_path / "index", client=client, backend="pandas")
    pd.testing.assert_frame_equal(found, exact)
    assert re.search(rf"1 +{exact['similarity'][0]:.4f} +{exact['key'][0]}", done.output)
    like = dic.search(clip_table, like=exact["key"][0], index=tmp_path / "index", client=client, backend="pandas")
    pd.testing.assert_frame_equal(like, dic.search(clip_table, like=exact["key"][0], client=client, backend="pandas"))
    with pytest.raises(SearchError, match="no column 'vector'"):
        dic.build_search_index(clip_table, tmp_path / "other", column="vector")


def test_a_missing_faiss_is_told_with_its_remedy(
    large: Path, clip_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    assert run(clip_table, "--build-index", tmp_path / "small").exit_code == 0  # one cell needs no k-means
    done = run(large, "--build-index", tmp_path / "index")
    assert done.exit_code == 2
    assert 'pip install "dask-imgcurator[search]"' in done.output.replace("\n", " ")


# --- on a card ------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_card_finds_what_the_cpu_finds() -> None:
    table, query = make(400), vectors(2, 9)
    host = dic.search(frame_of(table), embedding=query, k=30, where="width >= 300")
    card = dic.search(get_backend("cudf").from_arrow(table), embedding=query, k=30, where="width >= 300")
    pd.testing.assert_frame_equal(card, host)
