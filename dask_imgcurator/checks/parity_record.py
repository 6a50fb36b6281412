"""Results of a comparison with open_clip."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

#: Images named in each list.
EXAMPLES = 5

#: Name of the decision that joins all expressions.
ALL = "all of these"

#: A score by our way and by open_clip's; None if the head gave none.
Pair = tuple[float | None, float | None]


@dataclass
class Measure:
    """Mean and extremes of one figure over `count` images; `max_image` has the largest."""

    count: int = 0
    mean: float = math.nan
    min: float = math.inf
    max: float = -math.inf
    max_image: str = ""

    def add(self, value: float, image: str) -> None:
        """Add an image."""
        self.mean = (self.mean * self.count + value) / (self.count + 1) if self.count else value
        self.count += 1
        self.min = min(self.min, value)
        if value > self.max:
            self.max, self.max_image = value, image


@dataclass(frozen=True)
class ImageDifference:
    """How one image differs."""

    image: str  # its shard and key
    decoder: str  # ours: dali or pillow
    cosine: float  # of both embeddings
    pixel_mean: float  # of the absolute difference of the preprocessed pixels; black to white is 255
    pixel_max: float
    scores: dict[str, Pair]


@dataclass
class Difference:
    """Differences over a group of images; of scores, absolute ones."""

    images: int = 0
    pixel_mean: Measure = field(default_factory=Measure)
    pixel_max: Measure = field(default_factory=Measure)
    cosine: Measure = field(default_factory=Measure)
    scores: dict[str, Measure] = field(default_factory=dict)

    def add(self, one: ImageDifference) -> None:
        """Add an image."""
        self.images += 1
        self.pixel_mean.add(one.pixel_mean, one.image)
        self.pixel_max.add(one.pixel_max, one.image)
        self.cosine.add(one.cosine, one.image)
        for name, (ours, theirs) in one.scores.items():
            figure = self.scores.setdefault(name, Measure())
            if ours is not None and theirs is not None:
                figure.add(abs(ours - theirs), one.image)

    def summary(self) -> dict[str, Any]:
        """Return the figures for JSON; without images, only that there are none."""
        if not self.images:
            return {"images": 0}
        return {
            "images": self.images,
            "cosine_min": self.cosine.min,
            "cosine_mean": self.cosine.mean,
            "pixel_mean": self.pixel_mean.mean,
            "pixel_mean_max": self.pixel_mean.max,
            "pixel_max": self.pixel_max.max,
            "scores": {
                name: {"mean": figure.mean, "max": figure.max, "image": figure.max_image}
                for name, figure in self.scores.items()
            },
        }


@dataclass(frozen=True)
class OneSided:
    """An image that only one way could decode; `reason` is the other's."""

    image: str
    decodable: str
    reason: str


@dataclass(frozen=True)
class Flip:
    """An image that only one way keeps (`kept`: ours), with the scores that the expression uses."""

    image: str
    kept: bool
    scores: dict[str, Pair]


@dataclass
class Decision:
    """What becomes of one expression."""

    where: str  # or `ALL`
    kept: int = 0
    kept_by_open_clip: int = 0
    flips: int = 0  # images that only one of both keeps
    examples: list[Flip] = field(default_factory=list)  # the first of these


@dataclass(frozen=True)
class ParitySettings:
    """What was compared; `dtype` and `decoder` are ours, theirs are float32 and Pillow."""

    model: str
    pretrained: str | None
    dtype: str
    decoder: str
    run_decoder: str  # of a run with the same settings on this machine
    device: str
    batch_size: int


@dataclass
class Parity:
    """Results of a comparison."""

    settings: ParitySettings
    shards: int = 0
    shards_read: int = 0
    images_there: int = 0  # in the shards that were read
    images: int = 0  # those of them that went both ways
    decodable: dict[str, int] = field(  # images by who could decode them
        default_factory=lambda: dict.fromkeys(("both", "neither", "only ours", "only open_clip"), 0)
    )
    one_sided: list[OneSided] = field(default_factory=list)  # the first images that only one could decode
    #: Of all images that both could decode, and by our decoder: ``all``, ``dali``, ``pillow``.
    groups: dict[str, Difference] = field(default_factory=lambda: {"all": Difference()})
    #: Of open_clip's embeddings of two different images: what a cosine must stand out from.
    other_cosine: Measure = field(default_factory=Measure)
    decisions: list[Decision] = field(default_factory=list)
    worst: list[ImageDifference] = field(default_factory=list)  # those with the lowest cosine
    notes: list[str] = field(default_factory=list)

    def add(self, differences: Sequence[ImageDifference]) -> None:
        """Add images that both ways could decode."""
        for one in differences:
            for group in ("all", one.decoder):
                self.groups.setdefault(group, Difference()).add(one)
        self.worst = sorted([*self.worst, *differences], key=lambda one: one.cosine)[:EXAMPLES]

    def record(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        found = dataclasses.asdict(self)
        del found["other_cosine"]
        found["groups"] = {name: group.summary() for name, group in self.groups.items()}
        found["cosine_of_other_images_mean"] = self.other_cosine.mean if self.other_cosine.count else None
        return found
