"""Shards of pictures of one colour each, which tells which row a picture is of; and cards read from HTML."""

from __future__ import annotations

import base64
import io
import tarfile
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
from pages import VOID, colour
from PIL import Image


def make_rows(folder: Path, shards: int = 3, per_shard: int = 21) -> pd.DataFrame:
    """Locators of pictures in tars, as tarfile finds them; row ``i`` has `colour` (i) and the key ``{i:03d}``."""
    rows = []
    for shard in range(shards):
        path, images = folder / f"{shard}.tar", []
        with tarfile.open(path, "w") as tar:
            for i in range(shard * per_shard, (shard + 1) * per_shard):
                out = io.BytesIO()
                Image.new("RGB", (60, 40), colour(i)).save(out, "PNG")
                images.append(out.getvalue())
                info = tarfile.TarInfo(f"{i:03d}.png")
                info.size = len(images[-1])
                tar.addfile(info, io.BytesIO(images[-1]))
        with tarfile.open(path) as tar:
            for member in tar:
                rows.append((member.name[:3], str(path), member.offset_data, member.size))
    return pd.DataFrame(rows, columns=["key", "shard", "offset", "nbytes"])


@dataclass
class Card:
    """What one card of a wall shows."""

    key: str = ""
    source: str | None = None
    attributes: dict[str, str | None] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    values: list[str] = field(default_factory=list)
    veiled: bool = False
    text: str = ""

    @property
    def colour(self) -> tuple[int, int, int]:
        kind, _, data = str(self.source).partition(";base64,")
        assert kind == "data:image/webp"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            r, g, b = np.asarray(image.convert("RGB")).reshape(-1, 3).mean(0).round().astype(int).tolist()
        return r, g, b

    def is_of(self, i: int) -> bool:
        """Whether the picture has the colour of row i, as far as WebP keeps it."""
        return max(abs(a - b) for a, b in zip(self.colour, colour(i), strict=True)) < 20


class _Reader(HTMLParser):
    """Reads cards, and refuses what does not nest; `tags` are all there are."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.cards: list[Card] = []
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        assert len(attributes) == len(attrs), f"attribute twice in <{tag}>"
        assert not [name for name in attributes if name.startswith("on")]
        self.tags.add(tag)
        if tag == "li":
            self.cards.append(Card())
        elif tag == "img":
            self.cards[-1].source, self.cards[-1].attributes = attributes["src"], attributes
        elif tag == "label" and attributes.get("class") == "veil":
            self.cards[-1].veiled = True
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing, line {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if "li" in self.open:
            card, last = self.cards[-1], self.open[-1]
            card.text += data
            if last == "code":
                card.key += data
            elif last in ("dt", "dd"):
                (card.names if last == "dt" else card.values).append(data)


def read(html: str) -> _Reader:
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert not reader.open, f"<{reader.open[-1]}> is never closed"
    assert not reader.tags & {"script", "iframe", "object", "link", "form"}
    return reader


def cards(html: str) -> list[Card]:
    return read(html).cards
