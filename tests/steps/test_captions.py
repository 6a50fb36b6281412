"""Captions and prompts, against open_clip used by hand and against plain arithmetic."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import open_clip
import pandas as pd
import pyarrow as pa
import pytest
import torch
from dask.base import tokenize

import dask_imgcurator as dic
from dask_imgcurator.engine.backend import get_backend
from dask_imgcurator.engine.cache import cache
from dask_imgcurator.models import ModelError
from dask_imgcurator.models.encoders import load_encoder, resolve_encoder
from dask_imgcurator.models.text_tower import MAX_CHARS, TextEncoder, load_text_encoder
from dask_imgcurator.schema import arrow_schema, missing_columns
from dask_imgcurator.steps.captions import detect_languages
from dask_imgcurator.steps.prompts import NEGATIVE, PromptError, PromptUse, parse_prompts

#: The smallest architecture among those that open_clip lists; its text tower gives 256 numbers.
MODEL, WEIGHTS, WIDTH = "ViT-S-32-alt", "random:0", 256
SPEC = resolve_encoder(MODEL, WEIGHTS, "float32")
USE = {"model": MODEL, "pretrained": WEIGHTS, "dtype": "float32"}
CAPTIONS = ["a red car", None, "", "Ein Hund läuft über die Wiese — „schnell“ &amp; froh", "a red car", "漢字" * 200]


@pytest.fixture(scope="module")
def real() -> open_clip.CLIP:
    """The model that ``random:0`` means, made without this library."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = open_clip.create_model(MODEL, load_weights=False)
    torch.set_rng_state(state)
    return model.eval()


def by_hand(real: open_clip.CLIP, texts: list[str]) -> np.ndarray:
    """Each text by itself, by open_clip alone."""
    tokenizer = open_clip.get_tokenizer(MODEL)
    with torch.inference_mode():
        return torch.cat([real.encode_text(tokenizer([t]), normalize=True) for t in texts]).numpy()


def unit(rows: int, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(rows, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def table(captions: list[str | None], embeddings: list[Any], index: list[int] | None = None) -> pd.DataFrame:
    columns = {
        "key": pa.array([f"{i:03d}" for i in range(len(captions))]),
        "caption": pa.array(captions, pa.string()),
        "embedding": pa.array([None if e is None else e.tolist() for e in embeddings], pa.list_(pa.float32())),
    }
    frame = get_backend("pandas").from_arrow(pa.table(columns))
    return frame if index is None else frame.set_axis(index)


def vectors(column: pd.Series) -> list[Any]:
    return [None if v is None or v is pd.NA else np.asarray(v, np.float32) for v in column]


# --- the text tower -------------------------------------------------------------------------------


def test_text_embeddings_are_open_clips(real: open_clip.CLIP) -> None:
    frame = dic.embed_text(pd.DataFrame({"caption": CAPTIONS}), **USE, batch_size=2)
    found = vectors(frame["text_embedding"])
    assert [v is None for v in found] == [caption is None for caption in CAPTIONS]
    expected = by_hand(real, [c for c in CAPTIONS if c is not None])
    np.testing.assert_allclose(np.stack([v for v in found if v is not None]), expected, rtol=0, atol=1e-5)
    # Different texts are further apart than the tolerance, or nothing would be shown.
    assert np.abs(expected[0] - expected[1]).max() > 1e-2


def test_an_embedding_does_not_depend_on_its_neighbours() -> None:
    """In a batch of the same size; in one of another size they differ by rounding."""
    tower = load_text_encoder(SPEC)
    texts = [f"picture number {i}" for i in range(9)]
    together = tower.encode_texts(texts, 4)
    assert torch.equal(together[[8]], tower.encode_texts(texts[8:], 4))
    assert torch.equal(together[:8].flip(0), tower.encode_texts(texts[7::-1], 4))
    torch.testing.assert_close(together.flip(0), tower.encode_texts(texts[::-1], 4), rtol=0, atol=1e-6)


def test_tokens_and_what_is_read_of_a_long_text() -> None:
    tower = load_text_encoder(SPEC)
    tokenizer = open_clip.get_tokenizer(MODEL)
    texts = ["A  Red CAR!", "&lt;3", "word " * 2000]
    assert torch.equal(tower.tokenize(texts), tokenizer(texts))
    begin = "x" * MAX_CHARS
    assert torch.equal(tower.tokenize([begin + "y" * 100_000]), tokenizer([begin]))


def test_the_tokenizer_does_not_remember_words_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dask_imgcurator.models.text_tower._MAX_WORDS", 50)
    tower = load_text_encoder(SPEC)
    before = tower.tokenize(["zebra"])
    for i in range(20):
        tower.tokenize([" ".join(f"{chr(97 + i)}{chr(97 + k)}q" for k in range(20))])
        assert len(tower._tokenizer.cache) < 50 + 21  # type: ignore[attr-defined]
    assert torch.equal(tower.tokenize(["zebra"]), before)


def test_both_towers_are_one_model_in_memory() -> None:
    tower, encoder = load_text_encoder(SPEC), load_encoder(SPEC)
    assert tower.model is encoder.model
    assert load_text_encoder(SPEC) is tower
    assert tower._turn is encoder._turn
    assert tower.provenance.items() >= {**encoder.provenance, "context_length": 77}.items()


def test_logit_scale(real: open_clip.CLIP) -> None:
    assert load_text_encoder(SPEC).logit_scale == pytest.approx(real.logit_scale.detach().exp().item(), rel=1e-6)
    assert load_text_encoder(SPEC).logit_scale == pytest.approx(1 / 0.07, rel=1e-5)  # as CLIP begins its training


def test_memory_that_runs_out_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = TextEncoder(load_encoder(SPEC), open_clip.get_tokenizer(MODEL))
    forward, seen = tower._forward, []

    def small(tokens: torch.Tensor) -> torch.Tensor:
        seen.append(len(tokens))
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(tokens)

    monkeypatch.setattr(tower, "_forward", small)
    texts = ["a", "b", "c", "d", "e"]
    with pytest.warns(UserWarning, match="out of memory with .* texts per batch"):
        found = tower.encode_texts(texts, 8)
    assert seen == [4, 2, 2, 1]
    torch.testing.assert_close(found, load_text_encoder(SPEC).encode_texts(texts), rtol=0, atol=1e-5)


def test_dtype() -> None:
    exact = load_text_encoder(SPEC).encode_texts(["a dog", "two cats"])
    rounded = load_text_encoder(resolve_encoder(MODEL, WEIGHTS, "bfloat16")).encode_texts(["a dog", "two cats"])
    assert rounded.dtype == torch.float32
    cosine = (exact * rounded).sum(1)
    assert cosine.min() > 0.999
    assert not torch.equal(exact, rounded)


@pytest.mark.parametrize("step", ["embed_text", "score_clip", "score_prompts"])
def test_the_starter_has_no_text_tower(step: str) -> None:
    df = dd.from_pandas(table(["a"], [unit(1)[0]]), npartitions=1)
    args = ({"dog": ["a dog"]},) if step == "score_prompts" else ()
    with pytest.raises(ModelError, match=rf"{step} needs a text tower, and the starter model has none.*ViT-B-32"):
        getattr(dic, step)(df, *args, model="starter")
    with pytest.raises(ModelError, match="the starter model has none"):
        load_text_encoder(resolve_encoder("starter"))


@pytest.mark.skipif(find_spec("transformers") is not None, reason="transformers is installed")
def test_a_tokenizer_of_another_package(tmp_path: Path) -> None:
    config = open_clip.get_model_config(MODEL)
    config["text_cfg"]["hf_tokenizer_name"] = "some/tokenizer"
    (tmp_path / "dic-hf-tokenizer.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    with pytest.raises(ModelError, match=r"tokenizer of 'dic-hf-tokenizer'.*pip install transformers sentencepiece"):
        load_text_encoder(resolve_encoder("dic-hf-tokenizer", "random:0", "float32"))


# --- clip_score -----------------------------------------------------------------------------------


def test_clip_score_by_hand(real: open_clip.CLIP) -> None:
    images: list[Any] = list(unit(6))
    images[4] = None
    frame = table(CAPTIONS, images, [5, 5, 1, 0, 9, 2])
    scored = dic.score_clip(frame, **USE)
    assert scored["clip_score"].dtype == np.float32
    assert scored.index.tolist() == [5, 5, 1, 0, 9, 2]
    assert scored["clip_score"].isna().tolist() == [False, True, False, False, True, False]
    for i in (0, 2, 3, 5):
        expected = float(images[i] @ by_hand(real, [CAPTIONS[i] or ""])[0])
        assert scored["clip_score"].iloc[i] == pytest.approx(expected, abs=1e-5)


def test_the_cosine_of_embeddings_that_are_not_of_unit_length() -> None:
    images = unit(3)
    captions: list[str | None] = ["a", "b", "c"]
    short = dic.score_clip(table(captions, list(images)), **USE)["clip_score"]
    long = dic.score_clip(table(captions, list(images * 11)), **USE)["clip_score"]
    np.testing.assert_allclose(short, long, rtol=0, atol=1e-6)


def test_a_match_scores_one(real: open_clip.CLIP) -> None:
    """An image whose embedding is its own caption's has the highest score there is."""
    texts = ["a dog", "two cats on a sofa", "the sea"]
    frame = table(list(texts), list(by_hand(real, texts)))
    np.testing.assert_allclose(dic.score_clip(frame, **USE)["clip_score"], 1, rtol=0, atol=1e-5)
    wrong = frame.assign(caption=frame["caption"].to_numpy()[[1, 2, 0]])
    assert (dic.score_clip(wrong, **USE)["clip_score"] < 0.999).all()


def test_rows_keep_their_own_score_when_shuffled_and_dropped() -> None:
    captions: list[str | None] = [f"picture {i} of {i % 3}" for i in range(12)]
    frame = table(captions, list(unit(12)))
    whole = dic.score_clip(frame, **USE).set_index("key")["clip_score"]
    assert whole.nunique() == 12
    shuffled = frame.sample(frac=1, random_state=3)
    df = dic.score_clip(dd.from_pandas(shuffled, npartitions=4, sort=False), **USE)
    assert str(df.dtypes["clip_score"]) == "float32"
    with dask.config.set(scheduler="sync"):
        part = df.partitions[1:].compute().set_index("key")["clip_score"]
    assert 0 < len(part) < 12
    pd.testing.assert_series_equal(part, whole.loc[part.index], rtol=0, atol=1e-6)


def test_nothing_to_score_loads_nothing() -> None:
    cache.clear()
    for frame in (table([None, None], list(unit(2))), table(["a", "b"], [None, None]), table([], [])):
        scored = dic.score_clip(frame, "ViT-L-14", "random:0")
        assert scored["clip_score"].isna().all()
        assert scored["clip_score"].dtype == np.float32
    assert not cache._kept["encoder"]


def test_embeddings_of_another_model() -> None:
    frame = table(["a"], [unit(1, 512)[0]])
    for step in (lambda: dic.score_clip(frame, **USE), lambda: dic.score_prompts(frame, {"a": ["b"]}, **USE)):
        with pytest.raises(ModelError, match=r"'embedding' holds embeddings of width 512, .*'ViT-S-32-alt' gives 256"):
            step()


def test_columns_that_do_not_fit() -> None:
    frame = table(["a"], [unit(1)[0]])
    with pytest.raises(ValueError, match=r"score_clip needs the column alt: .*caption="):
        dic.score_clip(frame, **USE, caption="alt")
    with pytest.raises(ValueError, match=r"score_clip needs the column vector: make it with embed"):
        dic.score_clip(frame, **USE, embedding="vector")
    with pytest.raises(TypeError, match="column 'caption' holds text, not vectors"):
        dic.score_prompts(frame, {"a": ["b"]}, **USE, embedding="caption")
    with pytest.raises(TypeError, match="column 'n' holds int64, not text"):
        dic.embed_text(pd.DataFrame({"n": [1]}), **USE, column="n")
    with pytest.raises(ValueError, match="batch_size=0"):
        dic.embed_text(frame, **USE, batch_size=0)
    with pytest.raises(ModelError, match="unknown model 'ViT-S-33'"):
        dic.embed_text(frame, "ViT-S-33", "random:0")


@pytest.mark.parametrize("dtype", [object, "category", "string", "str"])
def test_text_as_users_have_it(dtype: Any) -> None:
    frame = pd.DataFrame({"alt": pd.Series(["a dog", None, "a dog"], dtype=dtype)})
    found = vectors(dic.embed_text(frame, **USE, column="alt", output="t")["t"])
    assert found[1] is None
    np.testing.assert_array_equal(found[0], found[2])


# --- prompts --------------------------------------------------------------------------------------

PROMPTS: dict[str, Any] = {
    "watermark": ["a photo with a watermark", "a stock photo with text across it"],
    "toy": {"positive": ["a toy"], "negative": ["a real thing", "an animal", "a person"]},
}


def class_embedding(real: open_clip.CLIP, texts: Any) -> np.ndarray:
    mean = by_hand(real, list(texts)).astype(np.float64).mean(0)
    return mean / np.linalg.norm(mean)


@pytest.mark.parametrize(("method", "temperature"), [("softmax", None), ("softmax", 3.0), ("margin", None)])
def test_prompts_by_hand(real: open_clip.CLIP, method: str, temperature: float | None) -> None:
    images: list[Any] = [*unit(5), None]
    frame = table(["x"] * 6, images)
    scored = dic.score_prompts(frame, PROMPTS, **USE, method=method, temperature=temperature)
    scale = temperature or real.logit_scale.detach().exp().item()
    for name, positive, negative in (
        ("watermark_score", PROMPTS["watermark"], NEGATIVE),
        ("toy_score", PROMPTS["toy"]["positive"], PROMPTS["toy"]["negative"]),
    ):
        assert scored[name].dtype == np.float32
        assert np.isnan(scored[name].iloc[5])
        p, n = class_embedding(real, positive), class_embedding(real, negative)
        for i in range(5):
            x = images[i].astype(np.float64)
            logits = np.exp([scale * (x @ p), scale * (x @ n)])
            expected = logits[0] / logits.sum() if method == "softmax" else x @ p - x @ n
            assert scored[name].iloc[i] == pytest.approx(expected, abs=1e-5)
    assert scored["toy_score"].nunique() == 5


def test_prompts_on_dask_and_their_order() -> None:
    frame = table(["x"] * 9, list(unit(9)))
    whole = dic.score_prompts(frame, PROMPTS, **USE).set_index("key")
    df = dd.from_pandas(frame.sample(frac=1, random_state=1), npartitions=3, sort=False)
    scored = dic.score_prompts(df, PROMPTS, **USE)
    assert list(scored.columns) == ["key", "caption", "embedding", "watermark_score", "toy_score"]
    with dask.config.set(scheduler="sync"):
        found = scored.compute().set_index("key").sort_index()
    for name in ("watermark_score", "toy_score"):
        pd.testing.assert_series_equal(found[name], whole[name], rtol=0, atol=1e-6)


def test_a_graph_holds_words_and_no_model() -> None:
    import pickle

    df = dd.from_pandas(table(["x"], [unit(1)[0]]), npartitions=1)
    assert len(pickle.dumps(dict(dic.score_prompts(df, PROMPTS, **USE).__dask_graph__()))) < 100_000
    prompts = parse_prompts(PROMPTS)
    uses = [PromptUse(SPEC, prompts), PromptUse(SPEC, prompts, "margin"), PromptUse(SPEC, prompts[:1])]
    assert len({tokenize(use) for use in uses}) == 3
    assert tokenize(PromptUse(SPEC, parse_prompts(PROMPTS))) == tokenize(uses[0])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, "give a mapping"),
        (["a dog"], "give a mapping"),
        ({"a dog": ["a dog"]}, "'a dog' makes no column name"),
        ({"clip": ["a dog"]}, "'clip_score' is a column of this library"),
        ({"dog": "a dog"}, r"prompts\['dog'\] is one string, 'a dog': give a list"),
        ({"dog": []}, "give at least one prompt"),
        ({"dog": ["a", " "]}, "give at least one prompt"),
        ({"dog": [1]}, "give at least one prompt"),
        ({"dog": {"negative": ["a cat"]}}, "use 'positive'"),
        ({"dog": {"positive": ["a"], "neg": ["b"]}}, r"has the keys \['positive', 'neg'\]"),
        ({"dog": {"positive": ["a"], "negative": []}}, "the negative set of 'dog'"),
    ],
)
def test_prompts_that_make_no_sense(prompts: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        dic.score_prompts(table(["x"], [unit(1)[0]]), prompts, **USE)


def test_methods_that_make_no_sense() -> None:
    frame = table(["x"], [unit(1)[0]])
    for options, message in (
        ({"method": "max"}, "unknown method 'max': use softmax or margin"),
        ({"temperature": 0.0}, "temperature=0.0: it must be positive"),
        ({"temperature": float("nan")}, "it must be positive"),
        ({"method": "margin", "temperature": 2.0}, "the margin has no temperature"),
    ):
        with pytest.raises(PromptError, match=message):
            dic.score_prompts(frame, {"a": ["b"]}, **USE, **options)


# --- length and language --------------------------------------------------------------------------


def test_caption_lengths() -> None:
    captions: list[str | None] = [
        "a red car",
        "",
        None,
        "  two\twords\n",
        "naïve café",
        "漢字かな",
        "👩‍👩‍👧 x",
        "a\u00a0b",
    ]
    frame = table(captions, [None] * 8, [3, 3, 1, 2, 0, 7, 8, 9])
    found = dic.caption_stats(frame)
    assert found["caption_words"].tolist() == [3, 0, pd.NA, 2, 2, 1, 2, 2]
    assert found["caption_chars"].tolist() == [9, 0, pd.NA, 12, 10, 4, 7, 3]
    assert [str(found[f"caption_{n}"].dtype) for n in ("words", "chars")] == ["int32[pyarrow]"] * 2
    df = dic.caption_stats(dd.from_pandas(frame.reset_index(drop=True), npartitions=2))
    assert df.dtypes.astype(str).tolist() == found.dtypes.astype(str).tolist()
    with dask.config.set(scheduler="sync"):
        assert df["caption_chars"].compute().tolist() == found["caption_chars"].tolist()
        assert int((df["caption_words"] >= 2).sum().compute()) == 5


needs_detector = pytest.mark.skipif(find_spec("py3langid") is None, reason="the text extra is not installed")


@needs_detector
def test_caption_language() -> None:
    captions: list[str | None] = [
        "A red sports car is parked in front of an old house",
        "Ein Hund läuft über die grüne Wiese",
        "Un chat noir dort sur le canapé du salon",
        "犬が公園で走っている",
        "고양이가 자고 있다",
        None,
        " ",
        "12345",
        "IMG_2034.jpg",
        "🙂🙂",
    ]
    found = dic.caption_stats(table(captions, [None] * 10), language=True)
    languages = found["caption_language"].tolist()
    assert languages[:5] == ["en", "de", "fr", "ja", "ko"]
    assert all(language is pd.NA or language != language for language in languages[5:])
    confidence = found["caption_language_confidence"]
    assert confidence.dtype == np.float32
    assert confidence.isna().tolist() == [False] * 5 + [True, True] + [False] * 3
    assert (confidence[:5] > 0.5).all()
    assert (confidence[7:] < 0.2).all()


@needs_detector
def test_language_confidence_is_a_threshold() -> None:
    texts = ["A photo of a small brown dog"]
    ((language, confidence),) = detect_languages(texts, 0)
    assert language == "en"
    assert confidence is not None
    assert detect_languages(texts, confidence) == [("en", confidence)]
    assert detect_languages(texts, confidence + 1e-6) == [(None, confidence)]


def test_a_missing_detector_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'py3langid: pip install "dask-imgcurator\[text\]"'):
        dic.caption_stats(table(["a"], [None]), language=True)
    with pytest.raises(ValueError, match="min_confidence=2"):
        dic.caption_stats(table(["a"], [None]), min_confidence=2)


# --- adding later ---------------------------------------------------------------------------------


def test_missing_columns() -> None:
    have = arrow_schema(["key", "embedding", "nsfw_score"])
    wanted = arrow_schema(["nsfw_score", "clip_score", "mine"], {"mine": pa.float32()})
    assert missing_columns(have, wanted) == ["clip_score", "mine"]
    assert missing_columns(wanted, wanted) == []
    assert missing_columns(have, pa.schema([("nsfw_score", pa.float64())])) == []
    with pytest.raises(ValueError, match="column 'key' of type string, expected float"):
        missing_columns(have, pa.schema([("key", pa.float32())]))


# --- on a card ------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_card_gives_what_the_cpu_gives() -> None:
    captions: list[str | None] = ["a red car", None, "", "two dogs", "a red car"]
    frame = table(captions, [*unit(4), None])
    host, card = get_backend("pandas"), get_backend("cudf")
    on_card = card.from_arrow(host.to_arrow(frame))
    for step in (
        lambda df: dic.embed_text(df, **USE),
        lambda df: dic.score_clip(df, **USE),
        lambda df: dic.score_prompts(df, PROMPTS, **USE),
        lambda df: dic.score_prompts(df, PROMPTS, **USE, method="margin"),
        dic.caption_stats,
    ):
        expected, found = host.to_arrow(step(frame)), card.to_arrow(step(on_card))
        assert found.column_names == expected.column_names
        for name in found.column_names[3:]:
            assert found[name].type == expected[name].type
            for a, b in zip(found[name].to_pylist(), expected[name].to_pylist(), strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
