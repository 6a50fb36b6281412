"""Whether scores are those of open_clip: this library's way from bytes to scores against open_clip's own.

Every image goes two ways. Ours: our decoder (DALI where it can), our encoder. Theirs: Pillow, open_clip's
own transform, and its own model in float32. Both embeddings then go through the same heads and the same expressions. By
default our encoder is float32 too, so that what is left is the difference of the pixels.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..engine.backend import get_backend
from ..images.decode import BadImage, Batch, Decoder, Preprocess, dali_problem
from ..jobs.plan import choose_heads, choose_model
from ..jobs.tasks import ScorePlan
from ..models import heads, starter, weights
from ..models.encoders import EncoderSpec, _quiet_open_clip, load_encoder, needs_quick_gelu
from ..monitor import Monitor, Progress
from ..schema import arrow_schema
from ..select.where import combine, parse_where
from ..steps import collection, score
from ..storage import shards

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

__all__ = ["ALL", "Decision", "Difference", "Figure", "Parity", "compare", "open_clip_path"]

Transform = Callable[["Image"], "torch.Tensor"]
Encode = Callable[["torch.Tensor"], "torch.Tensor"]

#: Images that are named in each list.
EXAMPLES = 5

#: Name of the decision in which all expressions are joined.
ALL = "all of these"

#: Shards over which the images are spread, unless these hold too few.
SHARDS = 32

#: Pixels of a resized image above which open_clip's way is not tried: Pillow takes 4 bytes for each, and open_clip
#: resizes the whole image before it cuts (1 x 65,500 pixels would take 13 GB at size 224).
RESIZED_PIXELS = 1 << 28

#: Thresholds that are looked at when none is given, by the score that they need.
DEFAULTS = {"aesthetic_score": "aesthetic_score >= 5", "nsfw_score": "nsfw_score < 0.5"}


# --- what is found --------------------------------------------------------------------------------


@dataclass
class Figure:
    """One figure over many images: its mean, and its extremes with the images that they belong to.

    Attributes
    ----------
    count : int
        Images.
    mean, min, max : float
        NaN, and plus and minus infinity, where there is no image.
    min_image, max_image : str
        Names of the images with the smallest and the largest value.
    """

    count: int = 0
    mean: float = math.nan
    min: float = math.inf
    max: float = -math.inf
    min_image: str = ""
    max_image: str = ""

    def add(self, value: float, image: str) -> None:
        """Take one image in."""
        self.mean = (self.mean * self.count + value) / (self.count + 1) if self.count else value
        self.count += 1
        if value < self.min:
            self.min, self.min_image = value, image
        if value > self.max:
            self.max, self.max_image = value, image


@dataclass
class Difference:
    """Differences of one group of images.

    Attributes
    ----------
    images : int
        How many.
    pixel_mean, pixel_max : Figure
        Mean and maximum of the absolute difference of the preprocessed pixels, of each image; black to white is 255.
    cosine : Figure
        Of both embeddings of each image.
    scores : dict of str to Figure
        Absolute difference of each score.
    """

    images: int = 0
    pixel_mean: Figure = field(default_factory=Figure)
    pixel_max: Figure = field(default_factory=Figure)
    cosine: Figure = field(default_factory=Figure)
    scores: dict[str, Figure] = field(default_factory=dict)

    def add(self, image: Mapping[str, Any]) -> None:
        """Take one image in, as `Parity.worst` describes it."""
        self.images += 1
        for name in ("pixel_mean", "pixel_max", "cosine"):
            getattr(self, name).add(image[name], image["image"])
        for name, (ours, theirs) in image["scores"].items():
            figure = self.scores.setdefault(name, Figure())
            if ours is not None and theirs is not None:
                figure.add(abs(ours - theirs), image["image"])

    def summary(self) -> dict[str, Any]:
        """Give the figures, for JSON; of no image, only that there is none."""
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


@dataclass
class Decision:
    """What becomes of one expression.

    Attributes
    ----------
    where : str
        The expression, or `ALL`.
    kept, kept_by_open_clip : int
        Images that it keeps by our scores, and by those of open_clip's way.
    flips : int
        Images that only one of them keeps.
    examples : list of dict
        The first of these: ``image``, ``kept`` (by our scores), and ``scores``: for each score that the expression
        uses, ours and theirs.
    """

    where: str
    kept: int = 0
    kept_by_open_clip: int = 0
    flips: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Parity:
    """What a comparison found.

    Attributes
    ----------
    settings : dict
        ``model``, ``pretrained``, ``dtype`` (ours; theirs is float32), ``decoder``, ``device``, ``batch_size``.
    shards, shards_read : int
        Shards given, and those of them from which images were taken.
    images_there, images : int
        Images in the shards that were read, and those of them that were sent both ways.
    decodable : dict of str to int
        Images by who could decode them: ``both``, ``neither``, ``only ours``, ``only open_clip``.
    one_sided : list of dict
        The first images that only one could decode: ``image``, ``decodable`` and ``reason`` (of the one that failed).
    groups : dict of str to Difference
        For ``all`` images that both could decode, and for each decoder on our side (``dali``, ``pillow``).
    other_cosine : Figure
        Cosine of open_clip's embeddings of two different images: what a cosine must stand out from.
    decisions : list of Decision
        For each threshold, and for all of them together where there are several.
    worst : list of dict
        Images with the lowest cosine: ``image``, ``decoder``, ``cosine``, ``pixel_mean``, ``pixel_max`` and ``scores``
        (for each, ours and theirs).
    notes : list of str
        What the user was told.
    """

    settings: dict[str, Any]
    shards: int = 0
    shards_read: int = 0
    images_there: int = 0
    images: int = 0
    decodable: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("both", "neither", "only ours", "only open_clip"), 0)
    )
    one_sided: list[dict[str, str]] = field(default_factory=list)
    groups: dict[str, Difference] = field(default_factory=lambda: {"all": Difference()})
    other_cosine: Figure = field(default_factory=Figure)
    decisions: list[Decision] = field(default_factory=list)
    worst: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Give everything, for JSON."""
        plain = {name: value for name, value in vars(self).items() if name not in ("groups", "other_cosine")}
        return {
            **plain,
            "decisions": [dict(vars(decision)) for decision in self.decisions],
            "groups": {name: group.summary() for name, group in self.groups.items()},
            "cosine_of_other_images_mean": self.other_cosine.mean if self.other_cosine.count else None,
        }


# --- open_clip's way ------------------------------------------------------------------------------


def open_clip_path(spec: EncoderSpec, device: str) -> tuple[Transform, Encode]:
    """Make open_clip's own transform and model, in float32.

    Parameters
    ----------
    spec : dask_imgcurator.models.encoders.EncoderSpec
        The model and weights; its dtype is not used. open_clip does not have the starter: there, the transform is
        open_clip's and the model ours.
    device : str
        torch device of the model.

    Returns
    -------
    callable, callable
        From a Pillow image to pixels, float32 (3, height, width), normalised; from a batch of these to L2-normalised
        embeddings, float32 (n, d).
    """
    import open_clip
    import torch

    if spec.is_starter:
        cfg = open_clip.transform.PreprocessCfg(**starter.PREPROCESS)
        ours = load_encoder(EncoderSpec("starter", dtype="float32"), device)
        return open_clip.transform.image_transform_v2(cfg, is_train=False), ours

    random = re.fullmatch(r"random:(\d+)", spec.pretrained)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), _quiet_open_clip():
        warnings.simplefilter("ignore")
        if random:
            torch.manual_seed(int(random[1]))
        model, _, transform = open_clip.create_model_and_transforms(
            spec.model,
            pretrained=None if random else spec.pretrained or None,
            precision="fp32",
            device=device,
            force_quick_gelu=needs_quick_gelu(spec.model, spec.pretrained),
        )
    model.eval()

    @torch.inference_mode()
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return model.encode_image(pixels.to(device), normalize=True)

    return transform, encode


def _their_pixels(data: bytes | BadImage, transform: Transform, preprocess: Preprocess) -> torch.Tensor | str:
    """Decode and preprocess an image as a user of open_clip would; the reason where that fails."""
    from PIL import Image

    if isinstance(data, BadImage):
        return str(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                g = preprocess.geometry(*image.size)
                if g.width * g.height > RESIZED_PIXELS:
                    return f"not tried: open_clip would resize {image.width} x {image.height} to {g.width} x {g.height}"
                image.load()
                return transform(image)
    except Exception as err:  # Pillow's plugins raise nearly anything; the resize ValueError for slivers.
        return f"{type(err).__name__}: {err}"


# --- which images ---------------------------------------------------------------------------------


def _spread(count: int, wanted: int) -> list[int]:
    """Give `wanted` of the first `count` numbers, evenly spaced (all of them where there are fewer)."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


def _shares(counts: Sequence[int], limit: int) -> list[int]:
    """Share `limit` among shards as evenly as their counts allow."""
    shares = [0] * len(counts)
    # The small ones first: what they lack goes to those that have more.
    for done, i in enumerate(sorted(range(len(counts)), key=counts.__getitem__)):
        shares[i] = min(counts[i], -(-limit // (len(counts) - done)))
        limit -= shares[i]
    return shares


def _choose(urls: Sequence[str], read: score.ReadSpec, limit: int, result: Parity, monitor: Monitor) -> list[Any]:
    """Choose images, spread over the shards and within each.

    Returns
    -------
    list of frame
        Rows of `score.index_partition`, those with an image only: one frame for each shard that gives any. At most
        `limit` rows a shard are held, and shards beyond the first `SHARDS` are opened only while images lack.
    """
    backend = get_backend(read.backend)
    wanted = min(SHARDS, limit)
    first = [urls[i] for i in _spread(len(urls), wanted)]
    chosen = set(first)
    frames: list[Any] = []
    counts: list[int] = []
    for url in [*first, *(url for url in urls if url not in chosen)]:
        if len(counts) >= wanted and sum(counts) >= limit:
            break
        frame = score.index_partition((url,), read)
        status = backend.to_host(frame, ["status", "error_message"]).to_pydict()
        broken = [m for m, what in zip(status["error_message"], status["status"], strict=True) if what == "read_error"]
        if broken:
            monitor.note(f"{url}: {broken[0]}" + (f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""))
        images = [i for i, what in enumerate(status["status"]) if what == "ok"]
        counts.append(len(images))
        frames.append(frame.iloc[[images[i] for i in _spread(len(images), limit)]])
    result.shards_read, result.images_there = len(counts), sum(counts)
    shares = _shares(counts, limit)
    return [frame.iloc[_spread(len(frame), share)] for frame, share in zip(frames, shares, strict=True) if share]


def _decoder_to_compare(name: str, device: str) -> str:
    """DALI where it is installed: on a CPU a run takes Pillow unless it is told otherwise, and nothing would differ."""
    if name == "auto" and dali_problem() is None:
        return "dali"
    return score.settle_decoder(name, device)


# --- both ways ------------------------------------------------------------------------------------


class _Comparison:
    """Sends batches of rows both ways and gathers what differs; of the images themselves it keeps nothing."""

    def __init__(self, plan: ScorePlan, expressions: Sequence[str], result: Parity) -> None:
        import torch

        self.plan, self.result = plan, result
        self.backend = get_backend(plan.read.backend)
        device = self.backend.device
        self.encoder = load_encoder(plan.embed.encoder, device)
        for use in plan.heads:  # What is missing is told now, not after the first batch.
            spec = heads.resolve(use.kind, use.head, self.encoder.width)
            heads.load_head(spec, use.weights_dir, device, use.round_to)
        self.transform, self.encode = open_clip_path(plan.embed.encoder, device)
        self.std = torch.tensor(self.encoder.preprocess.std).reshape(3, 1, 1)
        self.wheres = [parse_where(expression) for expression in expressions]
        result.decisions = [Decision(where.text) for where in self.wheres]
        if len(self.wheres) > 1:
            result.decisions.append(Decision(ALL))
        self.batch_size = plan.embed.batch_size or (16 if device == "cpu" else 512)
        kind = _decoder_to_compare(plan.embed.decoder, self.backend.decoder_device)
        self.by_dali = kind == "dali"
        self.decoder = Decoder(
            self.encoder.preprocess,
            self.batch_size,
            device,
            self.backend.decoder_device if self.by_dali else None,
            torch.get_num_threads(),
            plan.embed.max_pixels,
            plan.embed.adjust_orientation,
        )
        result.settings |= {
            "dtype": self.encoder.spec.dtype,
            "decoder": kind,
            "device": device,
            "batch_size": self.batch_size,
        }
        self._last: torch.Tensor | None = None

    def shard(self, frame: Any, name: str) -> Iterator[int]:
        """Compare the rows of one shard, and yield the number of images of each batch that are done."""
        for start in range(0, len(frame), self.batch_size):
            rows = frame.iloc[start : start + self.batch_size].reset_index(drop=True)
            host = self.backend.to_host(rows, ["shard", "key", "offset", "nbytes"]).to_pydict()
            names = [f"{name}:{key}" for key in host["key"]]
            blobs = self._read(host)
            ours = self.decoder(blobs)
            theirs = [_their_pixels(blob, self.transform, self.encoder.preprocess) for blob in blobs]
            self._compare(rows, names, blobs, ours, theirs)
            yield len(names)

    def _read(self, host: Mapping[str, list[Any]]) -> list[bytes | BadImage]:
        extents = list(zip(host["offset"], host["nbytes"], strict=True))
        blobs: list[bytes | BadImage] = []
        try:
            blobs.extend(shards.read_extents(host["shard"][0], extents, self.plan.read.storage_options))
        except OSError as err:
            bad = BadImage("read_error", f"{type(err).__name__}: {err}")
            blobs.extend([bad] * (len(extents) - len(blobs)))
        return blobs

    def _compare(
        self,
        rows: Any,
        names: Sequence[str],
        blobs: Sequence[bytes | BadImage],
        ours: Batch,
        theirs: Sequence[torch.Tensor | str],
    ) -> None:
        import torch

        both = self._decodable(names, ours, theirs)
        if not both:
            return
        names = [names[i] for i in both]
        mine = ours.pixels[both]
        reference = torch.stack([p for i in both if not isinstance(p := theirs[i], str)])
        pixels = ((mine.cpu() - reference) * self.std).abs() * 255
        embedding, expected = self.encoder(mine), self.encode(reference)
        cosine = torch.nn.functional.cosine_similarity(embedding.double(), expected.double())
        cosine = cosine.nan_to_num(0.0)  # float16 can overflow: such an embedding is like no other.
        rows = self._with_details(rows.iloc[both].reset_index(drop=True), [blobs[i] for i in both], ours, both)
        scores, kept = zip(*(self._decide(rows, e) for e in (embedding, expected)), strict=True)
        self._flips(names, scores, kept)
        self._others(names, expected.double())
        for j, i in enumerate(both):
            info = ours.infos[i]
            assert not isinstance(info, BadImage)
            image: dict[str, Any] = {
                "image": names[j],
                "decoder": info.decoder if self.by_dali else "pillow",
                "cosine": float(cosine[j]),
                "pixel_mean": float(pixels[j].mean()),
                "pixel_max": float(pixels[j].max()),
                "scores": {column: [side[column][j] for side in scores] for column in scores[0]},
            }
            for group in ("all", image["decoder"]):
                self.result.groups.setdefault(group, Difference()).add(image)
            self.result.worst.append(image)
        self.result.worst.sort(key=lambda image: image["cosine"])
        del self.result.worst[EXAMPLES:]

    def _decodable(self, names: Sequence[str], ours: Batch, theirs: Sequence[torch.Tensor | str]) -> list[int]:
        """Count who can decode what; returns the positions of the images that both can."""
        both = []
        for i, (name, info, pixels) in enumerate(zip(names, ours.infos, theirs, strict=True)):
            bad = str(info) if isinstance(info, BadImage) else None
            failed = pixels if isinstance(pixels, str) else None
            if bad is None and failed is None:
                both.append(i)
            side = {
                (True, True): "both",
                (True, False): "only ours",
                (False, True): "only open_clip",
                (False, False): "neither",
            }[bad is None, failed is None]
            self.result.decodable[side] += 1
            if side.startswith("only") and len(self.result.one_sided) < EXAMPLES:
                self.result.one_sided.append({"image": name, "decodable": side, "reason": bad or failed or ""})
        return both

    def _with_details(self, rows: Any, blobs: Sequence[Any], ours: Batch, both: Sequence[int]) -> Any:
        """Add what embedding adds besides the embedding; an expression may use it."""
        details = {
            "width": [ours.infos[i].width for i in both],
            "height": [ours.infos[i].height for i in both],
            "sha256": [hashlib.sha256(blob).hexdigest() for blob in blobs],
        }
        added = self.backend.from_arrow(pa.Table.from_pydict(details, schema=arrow_schema(details)))
        return rows.assign(**{name: added[name] for name in details})

    def _decide(self, rows: Any, embedding: torch.Tensor) -> tuple[dict[str, list[float | None]], list[np.ndarray]]:
        """Apply heads and expressions to embeddings as a job does: scores by column, and what each decision keeps."""
        column = self.backend.matrix_column(embedding, np.arange(len(rows)), rows.index)
        frame = rows.assign(embedding=column)
        for use in self.plan.heads:
            frame = score.score_partition(frame, use)
        masks = {f"where {i}": where.mask(frame) for i, where in enumerate(self.wheres)}
        columns = [use.column for use in self.plan.heads]
        table = self.backend.to_host(frame.assign(**masks), [*columns, *masks])
        kept = [np.array(table[name].to_pylist(), bool) for name in masks]
        if len(kept) > 1:
            kept.append(np.logical_and.reduce(kept))
        return {name: table[name].to_pylist() for name in columns}, kept

    def _flips(
        self,
        names: Sequence[str],
        scores: Sequence[Mapping[str, list[float | None]]],
        kept: Sequence[Sequence[np.ndarray]],
    ) -> None:
        used = [set(where.columns) for where in self.wheres]
        if len(used) > 1:
            used.append(set().union(*used))
        for decision, columns, mine, theirs in zip(self.result.decisions, used, *kept, strict=True):
            decision.kept += int(mine.sum())
            decision.kept_by_open_clip += int(theirs.sum())
            flipped = np.flatnonzero(mine != theirs).tolist()
            decision.flips += len(flipped)
            for j in flipped[: EXAMPLES - len(decision.examples)]:
                values = {c: [side[c][j] for side in scores] for c in scores[0] if c in columns}
                decision.examples.append({"image": names[j], "kept": bool(mine[j]), "scores": values})

    def _others(self, names: Sequence[str], expected: torch.Tensor) -> None:
        """Compare each of open_clip's embeddings with that of the image before it."""
        for name, vector in zip(names, expected, strict=True):
            if self._last is not None:
                self.result.other_cosine.add(float(vector @ self._last), name)
            self._last = vector


# --- public ---------------------------------------------------------------------------------------


def compare(
    urlpath: collection.URLPath,
    *,
    model: str | None = None,
    pretrained: str | None = None,
    where: str | Sequence[str] = (),
    min_aesthetic: float | None = None,
    max_nsfw: float | None = None,
    limit: int = 1000,
    dtype: str = "float32",
    batch_size: int | None = None,
    aesthetic_head: str = "auto",
    nsfw_head: str = "auto",
    weights_dir: str | os.PathLike[str] | None = None,
    columns: Sequence[str] | Mapping[str, str] = (),
    caption: str | None = None,
    image: str | Sequence[str] = (),
    backend: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    monitor: Monitor | None = None,
) -> Parity:
    """Compare this library's pixels, embeddings, scores and decisions with open_clip's own, on the user's images.

    Runs in the calling process, a batch at a time. The same as ``dask-imgcurator parity``.

    Parameters
    ----------
    urlpath : str, path, or sequence of them
        Shards, as for `read_webdataset`.
    model, pretrained : str, optional
        See `embed`; by default ViT-L-14 of OpenAI, or the starter where its weights cannot be had.
    where : str or sequence of str
        Expressions on the columns; for each, the images that only one way keeps are counted.
    min_aesthetic, max_nsfw : float, optional
        Shorthands for ``aesthetic_score >= X`` and ``nsfw_score < X``. Where no threshold is given at all, 5 and 0.5
        are taken, as far as there are such scores.
    limit : int
        Images that are compared, at most: spread over the shards (32 of them, or as many as it takes) and within each.
    dtype : {"float32", "bfloat16", "float16", "auto"}
        Of our encoder; open_clip's is always float32.
    batch_size : int, optional
        Images a forward pass, of both.
    aesthetic_head, nsfw_head : str
        A head's name, ``auto`` (the one trained on the model) or ``none``.
    weights_dir : str or path, optional
        Folder with the heads.
    columns, caption, image
        What is read of each sample, see `read_webdataset`; an expression may use it.
    backend : {"auto", "cudf", "pandas"}, optional
        Where to compute, both ways; by default `imgcurator.backend`.
    storage_options : mapping, optional
        For the fsspec file system of the shards.
    monitor : Monitor, optional
        Is told how it goes on.

    Returns
    -------
    Parity
        Differences, flips and the worst images.

    Raises
    ------
    FileNotFoundError
        If there are no such shards.
    ModelError, HeadError, WhereError, ValueError
        For a model, head or expression that cannot be used, before any image is read.
    WeightsError
        If a head's file cannot be had.
    """
    monitor = monitor or Monitor()
    if limit < 1:
        raise ValueError(f"limit={limit}: it must be at least 1")
    urls = shards.expand(urlpath, storage_options)
    model, pretrained = choose_model(model, pretrained, monitor)
    plan = ScorePlan(
        collection.read_spec(urls, columns, caption, storage_options, backend, image),
        collection.embed_spec(model, pretrained, batch_size, dtype, storage_options),
        choose_heads(model, pretrained, aesthetic_head, nsfw_head, weights.resolve_dir(weights_dir), monitor),
    )
    expressions = _expressions(where, min_aesthetic, max_nsfw, plan.columns)
    if model == "starter":
        monitor.note("open_clip does not have the starter: its transform is compared, before this library's own model.")
    elif str(pretrained).startswith("random"):
        monitor.note(
            f"{model} has random weights ({pretrained}): all images look alike to it, and scores mean nothing."
        )
    result = Parity({"model": model, "pretrained": pretrained}, shards=len(urls), notes=monitor.notes)
    comparison = _Comparison(plan, expressions, result)
    frames = _choose(urls, plan.read, limit, result, monitor)
    _run(comparison, frames, _labels(urls), result, monitor)
    return result


def _expressions(
    where: str | Sequence[str], min_aesthetic: float | None, max_nsfw: float | None, kinds: Mapping[str, str]
) -> list[str]:
    """Thresholds as expressions, checked against the columns that there will be."""
    given = [where] if isinstance(where, str) else list(where)
    given += [e for e in (combine(min_aesthetic=min_aesthetic), combine(max_nsfw=max_nsfw)) if e is not None]
    found = given or [expression for column, expression in DEFAULTS.items() if column in kinds]
    return [parse_where(expression, kinds).text for expression in found]


def _labels(urls: Sequence[str]) -> dict[str, str]:
    """Short names of shards, where these tell them apart."""
    names = {url: url.rpartition("/")[2] for url in urls}
    return names if len(set(names.values())) == len(urls) else {url: url for url in urls}


def _run(
    comparison: _Comparison, frames: Sequence[Any], labels: Mapping[str, str], result: Parity, monitor: Monitor
) -> None:
    state = Progress(expected=sum(map(len, frames)), total_shards=len(frames))
    monitor.scoring(len(frames), 0)
    for frame in frames:
        url = collection.host_column(frame.iloc[:1], "shard")[0]
        for done in comparison.shard(frame, labels[url]):
            result.images += done
            state.images, state.errors = result.images, result.images - result.decodable["both"]
            monitor.progress(state)
        state.shards += 1
