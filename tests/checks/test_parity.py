"""`parity` against a calculation of its own; and the property that it measures, for images of any shape."""

from __future__ import annotations

import io
import json
import random
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import numpy as np
import open_clip
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageDraw

from dask_imgcurator.checks.parity import ParityOptions
from dask_imgcurator.checks.parity import compare as compare_with
from dask_imgcurator.checks.parity_record import ALL, Measure, Parity
from dask_imgcurator.cli.main import cli
from dask_imgcurator.images.dali import dali_problem
from dask_imgcurator.images.decoder import Decoder
from dask_imgcurator.images.pillow import ImageInfo
from dask_imgcurator.images.preprocess import Preprocess
from dask_imgcurator.models import ModelError, starter
from dask_imgcurator.models.encoders import load_encoder, resolve_encoder
from dask_imgcurator.monitor import Monitor
from dask_imgcurator.runs.plan import ScoreOptions, describe, make_plan
from dask_imgcurator.storage.urls import expand

needs_dali = pytest.mark.skipif(dali_problem() is not None, reason=str(dali_problem()))

TINY = "dic-tiny-parity"
TINY_CONFIG = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
}
#: Needs no weights, and its heads ship with the package: any embedding of width 512 may go through them.
HEADS = {"aesthetic_head": "aesthetic-starter", "nsfw_head": "nsfw-starter"}
TINY_OPTIONS: dict[str, Any] = {"model": TINY, "pretrained": "random:3", "batch_size": 4, "backend": "pandas", **HEADS}


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("configs") / f"{TINY}.json"
    path.write_text(json.dumps(TINY_CONFIG))
    open_clip.add_model_config(path)


def compare(urlpath: Any, monitor: Monitor | None = None, **options: Any) -> Parity:
    return compare_with(urlpath, ParityOptions(**options), monitor=monitor)


# --- pictures ---------------------------------------------------------------------------------------


def waves(width: int, height: int, seed: int) -> Image.Image:
    """Smooth, full contrast, and no two seeds look alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    layers = [np.sin(x * rng.uniform(0.002, 0.06) + y * rng.uniform(0.002, 0.06) + rng.uniform(0, 6)) for _ in "RGB"]
    return Image.fromarray((127.5 + 127.5 * np.stack(layers, axis=-1)).astype(np.uint8))


def noise(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def text(width: int, height: int, seed: int) -> Image.Image:
    rng = random.Random(seed)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for y in range(0, height, 11):
        draw.text((rng.randint(0, 8), y), "".join(rng.choices("curation of shards ", k=width // 5 + 2)), fill="black")
    return image


def plaid(width: int, height: int, seed: int) -> Image.Image:
    """Hard edges in both directions: what one pass of a resize overshoots, the next one works on."""
    y, x = np.mgrid[0:height, 0:width]
    square = 1 + seed % 9
    return Image.fromarray(((x // square + y // square) % 2 * 255).astype(np.uint8)).convert("RGB")


PICTURES = {"waves": waves, "noise": noise, "text": text, "plaid": plaid}


def encode(image: Image.Image, format_: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def levels(difference: torch.Tensor, cfg: PreprocessCfg) -> torch.Tensor:
    """Absolute difference of pixels, where black to white is 255."""
    return difference.abs() * torch.tensor(cfg.std).reshape(3, 1, 1) * 255


# --- the property that the command measures -----------------------------------------------------------


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int | tuple[int, int]]:
    """Width and height of an image, and the model's size; extremes and sizes around the target among them."""
    number = st.integers(64, 224)
    size = draw(st.one_of(number, st.tuples(number, number)))
    height, width = (size, size) if isinstance(size, int) else size
    sides = [
        st.one_of(
            st.integers(1, 700),
            st.integers(-2, 2).map(lambda d, target=target: target + d),
            st.integers(-1, 1).map(lambda d, target=target: 2 * target + d),
        )
        for target in (width, height)
    ]
    extreme = st.sampled_from([(1, 2000), (2000, 1), (2, 2000), (2000, 3), (1, 1), (2000, 90)])
    w, h = draw(st.one_of(st.tuples(*sides), st.tuples(*sides), st.tuples(*sides), extreme))
    return w, h, size


@needs_dali
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_are_open_clips_for_any_shape(
    mode: str, interpolation: str, record_property: Callable[[str, object], None]
) -> None:
    found = Measure(), Measure()

    @given(
        shapes(),
        st.sampled_from(sorted(PICTURES)),
        st.integers(0, 1 << 30),
        st.sampled_from([60, 85, 95]),
        st.sampled_from([0, 1, 2]),
        st.booleans(),
    )
    @example((1, 2000, 224), "waves", 0, 95, 0, False)
    @example((2000, 1, 97), "waves", 1, 95, 2, True)
    @example((224, 224, 224), "text", 2, 85, 2, False)
    @example((449, 448, 224), "noise", 3, 95, 0, False)
    @example((271, 198, 99), "plaid", 3, 95, 0, True)
    @example((2, 300, 224), "noise", 4, 95, 0, False)
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def check(
        shape: tuple[int, int, int | tuple[int, int]], kind: str, seed: int, quality: int, chroma: int, gray: bool
    ) -> None:
        width, height, size = shape
        image = PICTURES[kind](width, height, seed)
        data = encode(image.convert("L" if gray else "RGB"), quality=quality, subsampling=chroma)
        cfg = PreprocessCfg(size=size, resize_mode=mode, interpolation=interpolation, fill_color=seed % 256)
        batch = Decoder(Preprocess.from_open_clip(vars(cfg)), 1)([data])
        assert isinstance(batch.infos[0], ImageInfo), batch.infos[0]
        try:
            expected = image_transform_v2(cfg, is_train=False)(Image.open(io.BytesIO(data)))
        except ValueError as err:  # One side of a sliver becomes 0 pixels: open_clip itself cannot do it.
            assert "must be > 0" in str(err)
            return
        difference = levels(batch.pixels[0] - expected, cfg)
        for figure, value in zip(found, (difference.mean(), difference.max()), strict=True):
            figure.add(value.item(), f"{width} x {height} to {size}, {kind}")
        assert difference.mean() <= 1

    check()
    for name, figure in zip(("mean", "max"), found, strict=True):
        record_property(f"{name}_difference", figure.max)
        record_property(f"{name}_difference_at", figure.max_image)


@needs_dali
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_embeddings_are_open_clips_in_each_resize_mode(
    mode: str, record_property: Callable[[str, object], None]
) -> None:
    spec = resolve_encoder("ViT-S-32-alt", "random:0", "float32")
    encoder, model = load_encoder(spec), by_hand("ViT-S-32-alt", 0)
    size = encoder.preprocess.size[0]
    cfg = PreprocessCfg(size=size, resize_mode=mode)
    sides = [(300, 400), (size, size), (size - 1, size + 1), (2 * size, 2 * size + 1), (61, 47), (500, 90), (1, 200)]
    blobs = [encode(PICTURES[kind](*side, seed=i)) for i, side in enumerate(sides) for kind in ("waves", "text")]
    batch = Decoder(Preprocess.from_open_clip(vars(cfg)), len(blobs))(blobs)
    transform = image_transform_v2(cfg, is_train=False)
    good = [i for i, b in enumerate(blobs) if mode != "longest" or min(Image.open(io.BytesIO(b)).size) > 1]
    theirs = torch.stack([transform(Image.open(io.BytesIO(blobs[i]))) for i in good])
    with torch.inference_mode():
        expected = model.encode_image(theirs, normalize=True)
    cosine = (encoder(batch.pixels[good]) * expected).sum(1)
    record_property("least_cosine", cosine.min().item())
    assert cosine.min() >= 0.9999
    others = (expected @ expected.T).fill_diagonal_(-1).amax(1)
    assert (others < 0.9999).sum() > len(good) / 2


# --- the comparison -----------------------------------------------------------------------------------


def by_hand(name: str, seed: int) -> open_clip.CLIP:
    """The model that ``random:SEED`` means, made without this library."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = open_clip.create_model(name, pretrained_image=False, load_weights=False)
    torch.set_rng_state(state)
    return model.eval()


def write_tar(path: Path, images: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in images.items():
            for member, content in ((name, data), (f"{name.partition('.')[0]}.json", b'{"source": "made"}')):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def png_header(width: int, height: int) -> bytes:
    """A black picture that takes few bytes, whatever its size."""
    return encode(Image.new("1", (width, height)), "PNG")


@dataclass
class Shards:
    """Shards, their good images by name in order, and the names of the others by who can decode them."""

    folder: Path
    good: dict[str, bytes]
    others: dict[str, str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("shards")
    jpegs = {f"{i:03}.jpg": encode(waves(70 + 31 * i, 240 - 17 * i, i), quality=90) for i in range(9)}
    first = {**dict(list(jpegs.items())[:5]), "cut.jpg": jpegs["000.jpg"][:900], "page.webp": b"<html>not found"}
    second = {
        "large.png": png_header(1500, 1000),
        **dict(list(jpegs.items())[5:]),
        "plain.png": encode(waves(90, 70, 50), "PNG"),
        "sliver.png": png_header(1, 70_000),
    }
    write_tar(folder / "00000.tar", first)
    write_tar(folder / "00001.tar", second)
    good, others = {}, {}
    for shard, images in (("00000.tar", first), ("00001.tar", second)):
        for name, data in images.items():
            key, label = name.partition(".")[0], f"{shard}:{name.partition('.')[0]}"
            who = {"cut": "neither", "page": "neither", "large": "only open_clip", "sliver": "only ours"}.get(key)
            if who is None:
                good[label] = data
            else:
                others[label] = who
    return Shards(folder, good, others)


@dataclass
class Truth:
    """For each good image, in order: embeddings, scores and pixels of both ways."""

    ours: torch.Tensor
    theirs: torch.Tensor
    pixels: torch.Tensor
    decoders: list[str]

    def score(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        ours, theirs = (head_by_hand(name, e) for e in (self.ours, self.theirs))
        return ours, theirs


def head_by_hand(name: str, embeddings: torch.Tensor) -> np.ndarray:
    import dask_imgcurator

    with np.load(Path(dask_imgcurator.__file__).parent / "data" / "starter.npz") as arrays:
        weight, bias = arrays[f"{name}_w"].astype(np.float64), float(arrays[f"{name}_b"].item())
    x = embeddings.numpy()
    if name == "nsfw":  # LAION's heads were fitted to float16 embeddings, and this one goes the same way.
        return 1 / (1 + np.exp(-(x.astype(np.float16).astype(np.float64) @ weight + bias)))
    return x.astype(np.float64) @ weight + bias


def truth(made: Shards, dtype: str = "float32") -> Truth:
    cfg = PreprocessCfg(size=64)
    model = by_hand(TINY, 3)
    transform = image_transform_v2(cfg, is_train=False)
    pixels = torch.stack([transform(Image.open(io.BytesIO(data))) for data in made.good.values()])
    dali = "cpu" if dali_problem() is None else None
    batch = Decoder(Preprocess.from_open_clip(vars(cfg)), len(made.good), dali_device=dali)(list(made.good.values()))
    with torch.inference_mode():
        theirs = model.encode_image(pixels, normalize=True)
        if dtype == "float32":
            ours = model.encode_image(batch.pixels, normalize=True)
        else:
            ours = load_encoder(resolve_encoder(TINY, "random:3", dtype))(batch.pixels)
    decoders = ["dali" if dali and key[-3:].isdigit() else "pillow" for key in made.good]
    return Truth(ours, theirs, levels(batch.pixels - pixels, cfg), decoders)


@pytest.fixture(scope="module")
def result(made: Shards) -> Parity:
    with dask.config.set({"imgcurator.max-pixels": 1_000_000}):
        return compare(made.folder, **TINY_OPTIONS)


def test_figures_are_those_of_a_calculation_by_hand(made: Shards, result: Parity) -> None:
    by = truth(made)
    cosine = (by.ours.double() * by.theirs.double()).sum(1).numpy()
    means, maxima = by.pixels.mean((1, 2, 3)).numpy(), by.pixels.amax((1, 2, 3)).numpy()
    if dali_problem() is None:
        assert maxima.max() > 0.5  # so that there is something to measure
    assert set(result.groups) == {"all", *by.decoders}
    for name, group in result.groups.items():
        rows = [i for i, decoder in enumerate(by.decoders) if name in ("all", decoder)]
        assert group.images == len(rows)
        for figure, values in ((group.pixel_mean, means), (group.pixel_max, maxima), (group.cosine, cosine)):
            assert figure.count == len(rows)
            expected = [values[rows].mean(), values[rows].min(), values[rows].max()]
            assert [figure.mean, figure.min, figure.max] == pytest.approx(expected, abs=2e-6)
        for column, kind in (("aesthetic_score", "aesthetic"), ("nsfw_score", "nsfw")):
            ours, theirs = by.score(kind)
            drift = np.abs(ours - theirs)[rows]
            assert [group.scores[column].mean, group.scores[column].max] == pytest.approx(
                [drift.mean(), drift.max()], abs=2e-5
            )
    all_ = result.groups["all"]
    assert all_.pixel_max.max_image in {n for n, m in zip(made.good, maxima, strict=True) if m > maxima.max() - 1e-4}
    others = (by.theirs[1:] * by.theirs[:-1]).sum(1)
    assert result.other_cosine.count == len(others)
    assert result.other_cosine.mean == pytest.approx(others.mean().item(), abs=1e-6)


def test_the_worst_images_are_named_with_both_scores(made: Shards, result: Parity) -> None:
    by = truth(made)
    cosine = dict(zip(made.good, (by.ours.double() * by.theirs.double()).sum(1).tolist(), strict=True))
    scores = dict(zip(made.good, zip(*by.score("aesthetic"), strict=True), strict=True))
    assert [one.cosine for one in result.worst] == pytest.approx(sorted(cosine.values())[:5], abs=2e-6)
    for one in result.worst:
        assert one.cosine == pytest.approx(cosine[one.image], abs=2e-6)
        assert one.scores["aesthetic_score"] == pytest.approx(scores[one.image], abs=1e-5)


def test_who_can_decode_what(made: Shards, result: Parity) -> None:
    assert (result.shards, result.shards_read) == (2, 2)
    assert result.images == result.images_there == len(made.good) + len(made.others)
    assert result.decodable == {"both": len(made.good), "neither": 2, "only ours": 1, "only open_clip": 1}
    sided = {one.image: one for one in result.one_sided}
    assert {name: one.decodable for name, one in sided.items()} == {
        name: who for name, who in made.others.items() if who != "neither"
    }
    assert "1500 x 1000 pixels, more than the limit of 1,000,000" in sided["00001.tar:large"].reason
    assert "open_clip would resize 1 x 70000 to 64 x 4480000" in sided["00001.tar:sliver"].reason


def test_default_decisions(made: Shards, result: Parity) -> None:
    by = truth(made)
    aesthetic, nsfw = (np.array(by.score(kind)) for kind in ("aesthetic", "nsfw"))
    assert np.abs(aesthetic - 5).min() > 1e-4  # none so near that rounding decides
    kept = [aesthetic >= 5, nsfw < 0.5]
    kept.append(kept[0] & kept[1])
    assert [d.where for d in result.decisions] == ["aesthetic_score >= 5", "nsfw_score < 0.5", ALL]
    for decision, (ours, theirs) in zip(result.decisions, kept, strict=True):
        assert (decision.kept, decision.kept_by_open_clip) == (ours.sum(), theirs.sum())
        assert decision.flips == (ours != theirs).sum()


def test_a_threshold_between_both_scores_of_an_image_flips_it(made: Shards) -> None:
    by = truth(made, "bfloat16")  # which moves every score, with or without DALI
    ours, theirs = by.score("aesthetic")
    at = int(np.argmax(np.abs(ours - theirs)))
    threshold = float((ours[at] + theirs[at]) / 2)
    assert abs(ours[at] - theirs[at]) > 1e-3
    flipped = [name for name, a, b in zip(made.good, ours, theirs, strict=True) if (a >= threshold) != (b >= threshold)]
    with dask.config.set({"imgcurator.max-pixels": 1_000_000}):
        found = compare(
            made.folder, **TINY_OPTIONS, dtype="bfloat16", min_aesthetic=threshold, where="width >= 100 and height > 0"
        )
    assert found.settings.dtype == "bfloat16"
    wide, decision, both = found.decisions
    assert (wide.where, wide.flips) == ("width >= 100 and height > 0", 0)
    widths = {name: Image.open(io.BytesIO(data)).width for name, data in made.good.items()}
    assert wide.kept == wide.kept_by_open_clip == sum(width >= 100 for width in widths.values())
    assert (decision.flips, [e.image for e in decision.examples]) == (len(flipped), flipped[:5])
    assert (decision.kept, decision.kept_by_open_clip) == ((ours >= threshold).sum(), (theirs >= threshold).sum())
    example_ = next(e for e in decision.examples if e.image == list(made.good)[at])
    assert example_.kept == (ours[at] >= threshold)
    assert example_.scores == {"aesthetic_score": pytest.approx([ours[at], theirs[at]], abs=1e-4)}
    assert (both.where, both.flips) == (ALL, sum(widths[name] >= 100 for name in flipped))


# --- which images -------------------------------------------------------------------------------------


def small(folder: Path, counts: list[int]) -> Path:
    """Shards with so many images."""
    data = encode(waves(40, 30, 0))
    for shard, count in enumerate(counts):
        write_tar(folder / f"{shard:02}.tar", {f"{i:02}.jpg": data for i in range(count)})
    return folder


def compared(folder: Path, limit: int) -> tuple[Parity, list[str]]:
    """At most five images, all of which are then among the worst."""
    found = compare(folder, **TINY_OPTIONS, limit=limit)
    assert found.images == found.decodable["both"] == sum(g.images for n, g in found.groups.items() if n == "all")
    return found, sorted(one.image for one in found.worst)


def test_the_limit_is_spread_over_the_shards(tmp_path: Path) -> None:
    folder = small(tmp_path, [2, 20, 3])
    found, names = compared(folder, 5)
    assert (found.shards, found.shards_read, found.images_there, found.images) == (3, 3, 25, 5)
    assert names == ["00.tar:00", "00.tar:01", "01.tar:00", "02.tar:00", "02.tar:01"]
    # What small shards lack comes from the large one.
    assert compare(folder, **TINY_OPTIONS, limit=15).images == 15
    assert compare(folder, **TINY_OPTIONS).images == 25
    _, names = compared(folder / "01.tar", 4)
    assert names == ["01.tar:00", "01.tar:05", "01.tar:10", "01.tar:15"]


def test_of_many_shards_some_are_opened(tmp_path: Path) -> None:
    folder = small(tmp_path, [1] * 36)
    found, names = compared(folder, 4)
    assert (found.shards, found.shards_read, found.images_there) == (36, 4, 4)
    assert names == ["00.tar:00", "09.tar:00", "18.tar:00", "27.tar:00"]
    found = compare(folder, **TINY_OPTIONS, limit=34)
    assert (found.shards_read, found.images) == (34, 34)


def test_shards_of_one_name_are_told_apart(tmp_path: Path) -> None:
    urls = [small(tmp_path / name, [1]) / "00.tar" for name in "ab"]
    found = compare(urls, **TINY_OPTIONS)
    assert sorted(one.image for one in found.worst) == [f"{url}:00" for url in urls]


def test_a_damaged_shard_is_told_and_the_others_are_compared(tmp_path: Path) -> None:
    folder = small(tmp_path, [2, 2])
    path = folder / "00.tar"
    path.write_bytes(path.read_bytes()[:700])
    monitor = Monitor()
    found = compare(folder, **TINY_OPTIONS, monitor=monitor)
    assert found.images == 2
    assert any(str(path) in note for note in found.notes)
    assert any("random weights (random:3)" in note for note in found.notes)


def test_fields_of_the_json_can_decide(tmp_path: Path) -> None:
    found = compare(small(tmp_path, [2]), **TINY_OPTIONS, columns=["source"], where=["source == 'made'", "width > 40"])
    assert [(d.where, d.kept, d.flips) for d in found.decisions] == [
        ("source == 'made'", 2, 0),
        ("width > 40", 0, 0),
        (ALL, 0, 0),
    ]


def test_without_heads_pixels_and_embeddings_are_left(tmp_path: Path) -> None:
    options = {**TINY_OPTIONS, "aesthetic_head": "none", "nsfw_head": "none"}
    found = compare(small(tmp_path, [2]), **options)
    assert found.decisions == []
    assert found.groups["all"].scores == {}
    assert found.groups["all"].cosine.min > 0.9999


def test_the_starter_behind_open_clips_transform(tmp_path: Path) -> None:
    folder = small(tmp_path, [1])
    found = compare(folder, model="starter", backend="pandas")
    assert found.settings.model == "starter"
    assert set(found.groups["all"].scores) == {"aesthetic_score", "nsfw_score"}
    encoder = load_encoder(resolve_encoder("starter"))
    data = encode(waves(40, 30, 0))
    cfg = PreprocessCfg(size=224, mean=(0.498,) * 3, std=(0.502,) * 3)
    dali = "cpu" if dali_problem() is None else None
    ours = Decoder(encoder.preprocess, 1, dali_device=dali)([data]).pixels
    theirs = image_transform_v2(cfg, is_train=False)(Image.open(io.BytesIO(data)))[None]
    model = starter.load_starter()
    assert found.groups["all"].cosine.min == pytest.approx((model(ours) * model(theirs)).sum().item(), abs=1e-5)
    assert any("open_clip does not have the starter" in note for note in found.notes)


def test_mistakes_are_told_before_anything_is_read(tmp_path: Path) -> None:
    folder = small(tmp_path, [1])
    with pytest.raises(ValueError, match="limit=0"):
        compare(folder, **TINY_OPTIONS, limit=0)
    with pytest.raises(ValueError, match="unknown column 'nope'"):
        compare(folder, **TINY_OPTIONS, where="nope > 1")
    with pytest.raises(ModelError, match="unknown model"):
        compare(folder, model="ViT-B-23", pretrained="openai")


# --- the command --------------------------------------------------------------------------------------


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["parity", *arguments], env={"COLUMNS": "120"})


MODEL = ["--model", TINY, "--pretrained", "random:3", "--aesthetic-head", "aesthetic-starter"]


def test_the_command_prints_what_compare_finds(made: Shards, tmp_path: Path) -> None:
    record = tmp_path / "parity.json"
    arguments = [*MODEL, "--nsfw-head", "nsfw-starter", "--limit", "9", "--batch-size", "4"]
    done = invoke(str(made.folder), *arguments, "--json", str(record), "--max-nsfw", "0.25")
    assert done.exit_code == 0, done.output
    expected = compare(made.folder, **TINY_OPTIONS, limit=9, max_nsfw=0.25)
    found = json.loads(record.read_text())
    for name in ("images", "images_there", "shards", "decodable", "one_sided", "decisions"):
        assert found[name] == json.loads(json.dumps(expected.record()[name])), name
    assert found["groups"]["all"]["cosine_min"] == pytest.approx(expected.groups["all"].cosine.min, abs=1e-6)
    assert "9 of 14 images, in 2 shards" in done.stdout
    assert "nsfw_score < 0.25" in done.stdout
    assert expected.worst[0].image in done.stdout
    assert f"{expected.groups['all'].pixel_mean.mean:.3f}" in done.stdout
    assert "random weights" in done.stderr


@pytest.mark.parametrize("setting", ["auto", "pillow", "dali"])
def test_it_says_which_decoder_a_run_would_use(tmp_path: Path, setting: str) -> None:
    if setting == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed (the extra cpu)")
    folder = small(tmp_path, [1])
    with dask.config.set({"imgcurator.decoder": setting}):
        done = invoke(str(folder), *MODEL, "--json", str(tmp_path / "out.json"))
        options = ScoreOptions(model=TINY, pretrained="random:3", aesthetic_head="aesthetic-starter", backend="pandas")
        plan, _ = make_plan(expand(str(folder)), options, None, Monitor())
        written = describe(plan)["decode"]["decoder"]  # into the score files of a run
    assert done.exit_code == 0, done.output
    compared_with = json.loads((tmp_path / "out.json").read_text())["settings"]["decoder"]
    same = f"would decode with {written} too." in done.stdout
    other = f"would decode with {written}, not with {compared_with}" in done.stdout
    assert (same, other) == (written == compared_with, written != compared_with)


def test_flips_are_printed_with_both_scores(made: Shards) -> None:
    ours, theirs = truth(made, "bfloat16").score("aesthetic")
    at = int(np.argmax(np.abs(ours - theirs)))
    threshold = f"{(ours[at] + theirs[at]) / 2:.4f}"
    assert abs(ours[at] - theirs[at]) > 1e-3
    done = invoke(str(made.folder), *MODEL, "--dtype", "bfloat16", "--min-aesthetic", threshold)
    assert done.exit_code == 0, done.output
    line = next(line for line in done.stdout.splitlines() if f"{list(made.good)[at]}: aesthetic_score" in line)
    pair = re.search(r"aesthetic_score (\S+) here, (\S+) by open_clip", line)
    assert pair is not None
    assert [float(pair[1]), float(pair[2])] == pytest.approx([ours[at], theirs[at]], abs=2e-4)


def test_nothing_to_compare_is_said(tmp_path: Path) -> None:
    write_tar(tmp_path / "00.tar", {"0.jpg": b"<html>"})
    done = invoke(str(tmp_path), *MODEL, "--json", str(tmp_path / "out.json"))
    assert done.exit_code == 0, done.output
    assert "No image could be compared" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["groups"] == {"all": {"images": 0}}


def test_quiet_prints_nothing(tmp_path: Path) -> None:
    done = invoke(str(small(tmp_path, [1])), *MODEL, "--quiet")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")


WRONG = {
    (): "Missing argument",
    ("/does/not/exist.tar",): "no such shard: /does/not/exist.tar",
    ("{folder}", "--limit", "0"): "--limit",
    ("{folder}", "--model", "ViT-B-23", "--pretrained", "openai"): "did you mean",
    ("{folder}", *MODEL, "--where", "nope > 1"): "unknown column 'nope'",
    ("{folder}", *MODEL, "--max-nsfw", "0.5", "--nsfw-head", "none"): "unknown column 'nsfw_score'",
    ("{folder}", *MODEL, "--aesthetic-head", "v3"): "aesthetic-v2-l14",
    ("{folder}", *MODEL, "--json", "{folder}/nowhere/out.json"): "no such folder: {folder}/nowhere",
    ("{folder}", "--model", "starter", "--scheduler", "tcp://x:1"): "No such option",
}


@pytest.mark.parametrize("arguments", WRONG, ids=lambda a: " ".join(a)[:60])
def test_wrong_usage_is_one_message_and_exit_code_2(arguments: tuple[str, ...], tmp_path: Path) -> None:
    folder = small(tmp_path, [1])
    done = invoke(*(a.format(folder=folder) for a in arguments))
    assert done.exit_code == 2, done.output
    assert WRONG[arguments].format(folder=folder) in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_weights_that_cannot_be_had_are_no_wrong_usage(tmp_path: Path) -> None:
    """As in the other commands: exit code 1, and where the file was looked for."""
    folder = small(tmp_path / "shards", [1])
    (tmp_path / "weights").mkdir()
    done = CliRunner().invoke(
        cli,
        [
            "parity",
            str(folder),
            *MODEL[:4],
            "--aesthetic-head",
            "aesthetic-v1-b32",
            "--weights-dir",
            str(tmp_path / "weights"),
        ],
        env={"XDG_CACHE_HOME": str(tmp_path / "cache"), "https_proxy": "http://127.0.0.1:9"},
    )
    assert done.exit_code == 1, done.output
    assert "sa_0_4_vit_b_32_linear.pth" in done.stderr
