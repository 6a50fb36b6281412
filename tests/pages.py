"""Pages for the tests: parsed as a browser would, and a small run to make them of."""

from __future__ import annotations

import base64
import io
import tarfile
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dask_imgcurator.report import report
from dask_imgcurator.results import ConditionCount, RunResult
from dask_imgcurator.select.settle import settled_where
from dask_imgcurator.select.where import parse_where

HOSTILE = '"><script>alert(1)</script><img src=https://evil.example/x onerror=alert(1)>\u202egnp.exe'
WHERE = "aesthetic_score >= 5 and width >= 100"
VOID = {"meta", "img", "input", "link", "br", "hr", "path", "rect"}


# --- a small page model ---------------------------------------------------------------------------


@dataclass
class Node:
    tag: str
    attrs: dict[str, str | None] = field(default_factory=dict)
    children: list[Node | str] = field(default_factory=list)

    def all(self, tag: str, **attrs: str) -> list[Node]:
        out = []
        for child in self.children:
            if isinstance(child, Node):
                if child.tag == tag and all(child.attrs.get(k.strip("_")) == v for k, v in attrs.items()):
                    out.append(child)
                out += child.all(tag, **attrs)
        return out

    @property
    def text(self) -> str:
        return "".join(c if isinstance(c, str) else c.text for c in self.children)

    def section(self, name: str) -> Node:
        (found,) = self.all("section", aria_labelledby=name) or [Node("missing")]
        return found

    def table(self, caption: str) -> list[list[str]]:
        (found,) = (t for t in self.all("table") if t.all("caption")[0].text == caption)
        return [[c.text for c in row.children if isinstance(c, Node)] for row in found.all("tbody")[0].all("tr")]

    def wall(self, title: str) -> list[Node]:
        """Cards below the heading."""
        children = [c for c in self.section("pictures").children if isinstance(c, Node)]
        (at,) = (i for i, c in enumerate(children) if c.tag == "h3" and c.text == title)
        return children[at + 2].all("li")

    def figure(self, name: str) -> Node:
        (found,) = (f for f in self.section("scores").all("figure") if f.all("h3")[0].text == name)
        return found


class Reader(HTMLParser):
    """Builds the tree and refuses an end tag that does not close the tag opened last."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("root")
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"attribute twice in <{tag}>"
        node = Node(tag, {k.replace("-", "_"): v for k, v in attrs})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"</{tag}> closes nothing, line {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read(path: str) -> Node:
    text = Path(path).read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert len(reader.open) == 1, f"<{reader.open[-1].tag}> is never closed"
    return reader.root


def picture(image: Node) -> Image.Image:
    kind, _, data = str(image.attrs["src"]).partition(";base64,")
    assert kind == "data:image/webp"
    with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as out:
        out.load()
    assert out.format == "WEBP" and max(out.size) <= 320
    return out


def write_run_report(folder: str, tables: list[str], where: str | None, *rest: Any) -> str:
    """Write a run's report, as after `curate` with an expression."""
    return report.write_run_report(folder, tables, settled_where(parse_where(where) if where else None), *rest)


# --- a small run ----------------------------------------------------------------------------------

SCHEMA = pa.schema(
    {"key": pa.string(), "shard": pa.string(), "offset": pa.int64(), "nbytes": pa.int64(), "caption": pa.string()}
    | {"license": pa.string(), "status": pa.string(), "error_message": pa.string()}
    | {"width": pa.int32(), "height": pa.int32(), "embedding": pa.list_(pa.float32())}
    | {"aesthetic_score": pa.float32(), "nsfw_score": pa.float32()}
)


def colour(i: int) -> tuple[int, int, int]:
    return (i % 4 * 85, i // 4 % 4 * 85, i // 16 % 4 * 85)


def make_tar(path: Path, images: list[bytes]) -> list[int]:
    """Write a tar and return where each member's data begin, as tarfile finds them."""
    with tarfile.open(path, "w") as tar:
        for i, data in enumerate(images):
            info = tarfile.TarInfo(f"{i:03d}.img")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as tar:
        return [member.offset_data for member in tar]


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@dataclass
class Run:
    """Two shards of 32 pictures of one colour each, the colour telling which."""

    folder: Path
    tables: list[str]
    rows: list[dict]

    def result(self, **changes: object) -> RunResult:
        """Counts by plain Python, in which a missing score fails every condition."""
        ok = [r for r in self.rows if r["status"] == "ok"]
        first = [r for r in ok if (r["aesthetic_score"] or 0) >= 5]
        second = [r for r in ok if r["width"] >= 100]
        both = [r for r in first if r in second]
        status = [r["status"] for r in self.rows]
        values = {
            "samples": len(self.rows),
            "by_status": {s: status.count(s) for s in dict.fromkeys(status)},
            "kept": len(both),
            "funnel": [
                ConditionCount("aesthetic_score >= 5", len(first), len(first)),
                ConditionCount("width >= 100", len(second), len(both)),
            ],
            "provenance": {"encoder": {"model": "starter"}, "versions": {"torch": "2"}},
        }
        return RunResult(str(self.folder), **(values | changes))

    def page(self, where: str | None = WHERE, **changes: object) -> Node:
        return read(write_run_report(str(self.folder), self.tables, where, self.result(**changes), {}))

    @property
    def kept(self) -> list[dict]:
        return [r for r in self.rows if r["status"] == "ok" and (r["aesthetic_score"] or 0) >= 5 and r["width"] >= 100]


def make_run(tmp_path: Path) -> Run:
    """Two score tables of 32 rows, some failed, and the shards that they describe."""
    rng = np.random.default_rng(7)
    rows: list[dict] = []
    tables = []
    for shard in range(2):
        kinds = ["JPEG", "PNG", "WEBP", "BMP"]
        images = [encode(Image.new("RGB", (200 + i, 100), colour(32 * shard + i)), kinds[i % 4]) for i in range(32)]
        tar = tmp_path / f"{shard}.tar"
        offsets = make_tar(tar, images)
        mine = [
            {
                "key": f"{shard}/{i:03d}",
                "shard": str(tar),
                "offset": offsets[i],
                "nbytes": len(images[i]),
                "caption": None if i % 5 == 0 else f"caption {shard} {i}",
                "license": "CC BY 4.0",
                "status": "ok",
                "error_message": None,
                "width": 50 if i % 9 == 0 else 200 + i,
                "height": 100,
                "embedding": [1.0, 0.0],
                "aesthetic_score": float(np.float32(rng.uniform(3, 7))),
                "nsfw_score": [0.01, 0.49, 0.5, 0.99, 1e-9, 1.0, 0.0, None][i % 8],
            }
            for i in range(32)
        ]
        mine[1] |= {"caption": HOSTILE, "key": HOSTILE, "license": HOSTILE, "aesthetic_score": 9.0}
        mine[2] |= {"aesthetic_score": None}
        for i in range(3, 10):
            mine[i] |= {"status": "decode_error", "error_message": HOSTILE, "width": None, "height": None}
            mine[i] |= {"aesthetic_score": None, "nsfw_score": None, "embedding": None}
        rows += mine
        tables.append(str(tmp_path / f"{shard}.parquet"))
        pq.write_table(pa.Table.from_pylist(mine, schema=SCHEMA), tables[-1])
    return Run(tmp_path, tables, rows)
