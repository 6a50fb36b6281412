"""Fit the numbers of the starter model (``dask_imgcurator/data/starter.npz``) and say how good they are.

    python tools/fit_starter.py --pairs pairs.npz

``pairs.npz`` holds, for each picture, the backbone's features (N, 2560), the real CLIP ViT-B/32 embedding (N, 512), the
published heads' scores of that embedding, and the source of the picture. Two ridge regressions are fitted:

* map: features -> CLIP embedding. Each half of the features (means, maxima) is scaled to a fixed length, so that
  neither drowns the other, and busy pictures do not count for more.
* heads: *real* CLIP embedding -> score. They are used on the starter's own embedding, where only their bias is moved so
  that the mean score is right. Fitted on the starter's embeddings of the training pictures instead, they lose up to
  0.02 of r on new sources, for the map has seen these pictures; on out-of-fold embeddings they lose as much or more.

Cross-validation runs the same two fits on each training part. The *plain* folds mix the sources, so that most test
pictures have close relatives in the training part; in the *grouped* folds a source is either trained on or tested on,
which is nearer to what a user's own pictures are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold, KFold, LeaveOneGroupOut

MEAN_LENGTH, MAX_LENGTH = 10.0, 5.0
MAP_ALPHA = 100.0
HEAD_ALPHA = 0.3
DEFAULT_OUT = Path(__file__).resolve().parents[1] / "dask_imgcurator" / "data" / "starter.npz"

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Pairs:
    """Pictures as the backbone and as CLIP see them; all float64."""

    features: np.ndarray  # (N, 2560), spatial means and spatial maxima
    clip: np.ndarray  # (N, 512), unit length
    scores: np.ndarray  # (N, 2), aesthetic score and logit of the NSFW score
    source: np.ndarray  # (N,), name of each picture's source

    def __getitem__(self, rows: np.ndarray) -> Pairs:
        return Pairs(self.features[rows], self.clip[rows], self.scores[rows], self.source[rows])


def read_pairs(path: Path) -> Pairs:
    """Read ``pairs.npz``."""
    with np.load(path, allow_pickle=False) as z:
        features, clip, aesthetic, nsfw = (
            z[name].astype(np.float64) for name in ("features", "clip_b32", "aesthetic", "nsfw")
        )
        source = z["group"]
    return Pairs(features, unit(clip), np.stack([aesthetic, np.log(nsfw / (1 - nsfw))], axis=1), source)


def unit(rows: np.ndarray) -> np.ndarray:
    """Scale each row to length 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def halves(features: np.ndarray) -> np.ndarray:
    """Scale the mean half and the maximum half of each row to length 1."""
    means, maxima = np.split(features, 2, axis=1)
    return np.concatenate([unit(means), unit(maxima)], axis=1)


def ridge(x: np.ndarray, y: np.ndarray, alpha: float) -> Ridge:
    """Fit a centred ridge regression by a solver without randomness."""
    return Ridge(alpha=alpha, solver="cholesky").fit(x, y)


def lengths(width: int) -> np.ndarray:
    """Length that each column's half is scaled to."""
    return np.repeat([MEAN_LENGTH, MAX_LENGTH], width // 2)


def fit(pairs: Pairs) -> Arrays:
    """Fit the map and both heads: the arrays of ``starter.npz``, in their final precision."""
    scale = lengths(pairs.features.shape[1])
    model = ridge(halves(pairs.features) * scale, pairs.clip, MAP_ALPHA)
    arrays = {
        # Relative error 2**-11: turns an embedding by a cosine of less than 1e-7.
        "map_w": (model.coef_ * scale).astype(np.float16),
        "map_b": model.intercept_.astype(np.float32),
    }
    heads = ridge(pairs.clip, pairs.scores, HEAD_ALPHA)
    bias = (pairs.scores - embed(arrays, pairs.features) @ heads.coef_.T).mean(axis=0)
    for row, name in enumerate(("aesthetic", "nsfw")):
        arrays[f"{name}_w"] = heads.coef_[row].astype(np.float32)
        arrays[f"{name}_b"] = np.array(bias[row], dtype=np.float32)
    return arrays


def embed(arrays: Arrays, features: np.ndarray) -> np.ndarray:
    """Embeddings, (N, 512) and of unit length, of features (N, 2560)."""
    return unit(halves(features) @ arrays["map_w"].astype(np.float64).T + arrays["map_b"])


@dataclass(frozen=True)
class Predictions:
    """What models say about pictures that they were not fitted on; row i is picture i."""

    embedding: np.ndarray  # (N, 512), of the starter
    mean_vector: np.ndarray  # (N, 512), mean CLIP embedding of the training part
    by_heads: np.ndarray  # (N, 2), scores by the heads from the embedding
    by_features: np.ndarray  # (N, 2), scores by a ridge straight from the features


def cross_validate(pairs: Pairs, splitter: Any) -> Predictions:
    """Predict each picture by models that were fitted on the other folds."""
    n = len(pairs.source)
    out = Predictions(np.empty((n, 512)), np.empty((n, 512)), np.empty((n, 2)), np.empty((n, 2)))
    scale = lengths(pairs.features.shape[1])
    groups = None if isinstance(splitter, KFold) else pairs.source
    for train, test in splitter.split(pairs.features, groups=groups):
        known = pairs[train]
        features = pairs.features[test]
        arrays = fit(known)
        out.embedding[test] = embed(arrays, features)
        out.mean_vector[test] = unit(known.clip.mean(axis=0, keepdims=True))
        for column, name in enumerate(("aesthetic", "nsfw")):
            out.by_heads[test, column] = out.embedding[test] @ arrays[f"{name}_w"] + arrays[f"{name}_b"]
        direct = ridge(halves(known.features) * scale, known.scores, MAP_ALPHA)
        out.by_features[test] = direct.predict(halves(features) * scale)
    return out


def figures(pairs: Pairs, found: Predictions, published: np.ndarray | None) -> dict[str, float]:
    """Quality of cross-validated predictions, by name, in the order in which they are printed."""

    def cosine(a: np.ndarray) -> float:
        return float((a * pairs.clip).sum(axis=1).mean())

    def r(a: np.ndarray, column: int) -> float:
        return float(np.corrcoef(a, pairs.scores[:, column])[0, 1])

    result = {
        "cosine to the real embedding": cosine(found.embedding),
        "cosine of the mean vector alone": cosine(found.mean_vector),
        "aesthetic r, head on the embedding": r(found.by_heads[:, 0], 0),
        "aesthetic r, ridge straight from the features": r(found.by_features[:, 0], 0),
        "NSFW logit r, head on the embedding": r(found.by_heads[:, 1], 1),
        "NSFW logit r, ridge straight from the features": r(found.by_features[:, 1], 1),
    }
    if published is not None:
        result["aesthetic r, published B/32 head on the embedding"] = r(found.embedding @ published, 0)
    return result


def read_published(path: Path) -> np.ndarray:
    """Weight (512,) of LAION's published aesthetic head for ViT-B/32."""
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)["weight"][0].double().numpy()


def print_tables(pairs: Pairs, published: np.ndarray | None) -> None:
    """Print the cross-validated figures as Markdown tables."""
    sources, counts = np.unique(pairs.source, return_counts=True)
    splitters = {
        "plain 5-fold": KFold(5, shuffle=True, random_state=0),
        "grouped 5-fold": GroupKFold(min(5, len(sources))),
        "one source out": LeaveOneGroupOut(),
    }
    found = {name: cross_validate(pairs, splitter) for name, splitter in splitters.items()}
    columns = [figures(pairs, predictions, published) for predictions in found.values()]
    print(f"{len(pairs.source)} pictures from {len(sources)} sources\n")
    print("| cross-validated | " + " | ".join(splitters) + " |")
    print("|---|" + "---|" * len(splitters))
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.3f}" for column in columns) + " |")

    print("\n| source held out | pictures | cosine | mean vector | aesthetic r | NSFW logit r |")
    print("|---|---|---|---|---|---|")
    left_out = found["one source out"]
    for name, count in zip(sources, counts, strict=True):
        rows = pairs.source == name
        part = Predictions(*(getattr(left_out, field)[rows] for field in Predictions.__dataclass_fields__))
        cosine, mean_cosine, aesthetic_r, _, nsfw_r, _ = figures(pairs[rows], part, None).values()
        row = " | ".join(f"{value:.3f}" for value in (cosine, mean_cosine, aesthetic_r, nsfw_r))
        print(f"| {name} | {count} | {row} |")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Fit the starter model and print cross-validated figures.")
    parser.add_argument("--pairs", type=Path, required=True, help="pairs.npz: features, embeddings, scores, sources")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="file to write (default: the package's)")
    parser.add_argument("--published-head", type=Path, help="sa_0_4_vit_b_32_linear.pth, to compare with")
    parser.add_argument("--no-tables", action="store_true", help="fit and write only")
    args = parser.parse_args(argv)

    pairs = read_pairs(args.pairs)
    if not args.no_tables:
        print_tables(pairs, read_published(args.published_head) if args.published_head else None)
    with args.out.open("wb") as file:
        # NumPy stamps the members of the archive with 1980-01-01, so equal arrays give equal bytes.
        np.savez(file, **fit(pairs))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
