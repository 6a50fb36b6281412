"""Two ways from bytes to scores: ours, and an open_clip user's.

Ours: our decoder (DALI if possible), our encoder. Theirs: Pillow, open_clip's own transform, and its own model in
float32. Both embeddings then go through the same heads and expressions.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..engine.backend import get_backend
from ..images.dali import dali_problem
from ..images.decoder import Batch, Decoder
from ..images.formats import BadImage
from ..images.preprocess import Preprocess
from ..models import heads, open_clip, starter
from ..models.encoders import EncoderSpec, load_encoder
from ..runs.plan import ScorePlan
from ..schema import arrow_schema
from ..select.where import parse_where
from ..steps.heads import score_partition
from ..steps.stream import batch_size_of, settle_decoder
from ..storage.tar_read import read_extents
from .parity_record import ALL, EXAMPLES, Decision, Flip, ImageDifference, OneSided, Pair, Parity, ParitySettings

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

#: Pixels of a resized image above which open_clip's way is not tried: Pillow needs 4 bytes per pixel, and open_clip
#: resizes the whole image before cropping (1 x 65,500 pixels would take 13 GB at size 224).
RESIZED_PIXELS = 1 << 28


@dataclass(frozen=True)
class OpenClip:
    """open_clip's own way: from a Pillow image to pixels, and from a batch of them to unit embeddings in float32."""

    transform: Callable[[Image], torch.Tensor]
    encode: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def load(cls, spec: EncoderSpec, device: str) -> OpenClip:
        """Load a model; for the starter, which open_clip lacks, combine open_clip's transform with our model."""
        import torch
        from open_clip.transform import PreprocessCfg, image_transform_v2

        spec = replace(spec, dtype="float32")
        if spec.is_starter:
            return cls(
                image_transform_v2(PreprocessCfg(**starter.PREPROCESS), is_train=False), load_encoder(spec, device)
            )
        model = open_clip.load(spec, device).model

        @torch.inference_mode()
        def encode(pixels: torch.Tensor) -> torch.Tensor:
            return model.encode_image(pixels.to(device), normalize=True)

        return cls(image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False), encode)

    def decode(self, data: bytes | BadImage, preprocess: Preprocess) -> torch.Tensor | str:
        """Decode and preprocess an image, or return the reason for failure."""
        from PIL import Image

        if isinstance(data, BadImage):
            return str(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(data)) as image:
                    g = preprocess.geometry(*image.size)
                    if g.width * g.height > RESIZED_PIXELS:
                        size = f"{image.width} x {image.height} to {g.width} x {g.height}"
                        return f"not tried: open_clip would resize {size}"
                    image.load()
                    return self.transform(image)
        except Exception as err:  # Pillow's plugins raise nearly anything; the resize ValueError for slivers.
            return f"{type(err).__name__}: {err}"


class Decisions:
    """Applies heads and expressions to embeddings, as a job does."""

    def __init__(self, plan: ScorePlan, expressions: Sequence[str], width: int) -> None:
        self.uses, self.backend = plan.heads, get_backend(plan.read.backend)
        for use in self.uses:  # Report what is missing now, not after the first batch.
            heads.load_head(
                heads.resolve(use.kind, use.head, width), use.weights_dir, self.backend.device, use.round_to
            )
        self.wheres = [parse_where(expression) for expression in expressions]
        self.names = [where.text for where in self.wheres]
        self.columns = [set(where.columns) for where in self.wheres]
        if len(self.wheres) > 1:
            self.names.append(ALL)
            self.columns.append(set().union(*self.columns))

    def of(self, rows: Any, embedding: torch.Tensor) -> tuple[dict[str, list[float | None]], list[np.ndarray]]:
        """Scores by column, and the rows that each decision keeps."""
        frame = rows.assign(embedding=self.backend.matrix_column(embedding, np.arange(len(rows)), rows.index))
        for use in self.uses:
            frame = score_partition(frame, use)
        masks = {f"where {i}": where.mask(frame) for i, where in enumerate(self.wheres)}
        columns = [use.column for use in self.uses]
        table = self.backend.to_host(frame.assign(**masks), [*columns, *masks])
        kept = [np.array(table[name].to_pylist(), bool) for name in masks]
        if len(kept) > 1:
            kept.append(np.logical_and.reduce(kept))
        return {name: table[name].to_pylist() for name in columns}, kept


class BothWays:
    """Sends batches of rows both ways and compares the results; keeps no images."""

    def __init__(self, plan: ScorePlan, expressions: Sequence[str]) -> None:
        import torch

        self.read, self.backend = plan.read, get_backend(plan.read.backend)
        embed, device = plan.embed, self.backend.device
        self.encoder = load_encoder(embed.encoder, device)
        self.decisions = Decisions(plan, expressions, self.encoder.width)
        self.open_clip = OpenClip.load(embed.encoder, device)
        self.std = torch.tensor(self.encoder.preprocess.std).reshape(3, 1, 1)
        self.batch_size = batch_size_of(embed, self.backend)
        self.run_decoder = settle_decoder(embed.decoder, self.backend.decoder_device)
        self.decoder_kind = _decoder_to_compare(embed.decoder, self.run_decoder)
        self.decoder = Decoder(
            self.encoder.preprocess,
            self.batch_size,
            device,
            self.backend.decoder_device if self.decoder_kind == "dali" else None,
            torch.get_num_threads(),
            embed.max_pixels,
            embed.adjust_orientation,
            embed.scale_high_bit_depth,
        )
        self._last: torch.Tensor | None = None

    def start(self) -> Parity:
        """Return an empty result."""
        ours, device = self.encoder.spec, self.backend.device
        settings = ParitySettings(
            ours.model,
            ours.pretrained or None,
            ours.dtype,
            self.decoder_kind,
            self.run_decoder,
            device,
            self.batch_size,
        )
        return Parity(settings, decisions=[Decision(name) for name in self.decisions.names])

    def batch(self, rows: Any, shard: str, result: Parity) -> None:
        """Compare rows of one shard."""
        import torch

        rows = rows.reset_index(drop=True)
        host = self.backend.to_host(rows, ["shard", "key", "offset", "nbytes"]).to_pydict()
        names = [f"{shard}:{key}" for key in host["key"]]
        blobs = self._read(host)
        ours = self.decoder(blobs)
        theirs = [self.open_clip.decode(blob, self.encoder.preprocess) for blob in blobs]
        result.images += len(names)
        both = _decodable(names, ours, theirs, result)
        if not both:
            return
        names, mine = [names[i] for i in both], ours.pixels[both]
        infos = [info for i in both if not isinstance(info := ours.infos[i], BadImage)]
        reference = torch.stack([pixels for i in both if not isinstance(pixels := theirs[i], str)])
        embedding, expected = self.encoder(mine), self.open_clip.encode(reference)
        rows = self._with_details(rows.iloc[both].reset_index(drop=True), infos, [blobs[i] for i in both])
        scores, kept = zip(*(self.decisions.of(rows, e) for e in (embedding, expected)), strict=True)
        self._flips(names, scores, kept, result)
        self._others(names, expected.double(), result)
        pixels = ((mine.cpu() - reference) * self.std).abs() * 255
        cosine = torch.nn.functional.cosine_similarity(embedding.double(), expected.double())
        cosine = cosine.nan_to_num(0.0)  # float16 can overflow: such an embedding matches nothing.
        result.add(
            [
                ImageDifference(
                    image=names[i],
                    decoder=info.decoder if self.decoder_kind == "dali" else "pillow",
                    cosine=float(cosine[i]),
                    pixel_mean=float(pixels[i].mean()),
                    pixel_max=float(pixels[i].max()),
                    scores={column: (scores[0][column][i], scores[1][column][i]) for column in scores[0]},
                )
                for i, info in enumerate(infos)
            ]
        )

    def _read(self, host: Mapping[str, list[Any]]) -> list[bytes | BadImage]:
        extents = list(zip(host["offset"], host["nbytes"], strict=True))
        blobs: list[bytes | BadImage] = []
        try:
            blobs.extend(read_extents(host["shard"][0], extents, self.read.storage_options))
        except OSError as err:
            bad = BadImage("read_error", f"{type(err).__name__}: {err}")
            blobs.extend([bad] * (len(extents) - len(blobs)))
        return blobs

    def _with_details(self, rows: Any, infos: Sequence[Any], blobs: Sequence[Any]) -> Any:
        """Add what embedding adds besides the embedding; an expression may use it."""
        details = {
            "width": [info.width for info in infos],
            "height": [info.height for info in infos],
            "sha256": [hashlib.sha256(blob).hexdigest() for blob in blobs],
        }
        added = self.backend.from_arrow(pa.Table.from_pydict(details, schema=arrow_schema(details)))
        return rows.assign(**{name: added[name] for name in details})

    def _flips(self, names: Sequence[str], scores: Any, kept: Any, result: Parity) -> None:
        """Count what each decision keeps, from `scores` and `kept`, each ours and theirs."""
        for decision, columns, mine, theirs in zip(result.decisions, self.decisions.columns, *kept, strict=True):
            decision.kept += int(mine.sum())
            decision.kept_by_open_clip += int(theirs.sum())
            flipped = np.flatnonzero(mine != theirs).tolist()
            decision.flips += len(flipped)
            for i in flipped[: EXAMPLES - len(decision.examples)]:
                values: dict[str, Pair] = {c: (scores[0][c][i], scores[1][c][i]) for c in scores[0] if c in columns}
                decision.examples.append(Flip(names[i], bool(mine[i]), values))

    def _others(self, names: Sequence[str], expected: torch.Tensor, result: Parity) -> None:
        """Compare each of open_clip's embeddings with the previous image's."""
        for name, vector in zip(names, expected, strict=True):
            if self._last is not None:
                result.other_cosine.add(float(vector @ self._last), name)
            self._last = vector


def _decodable(names: Sequence[str], ours: Batch, theirs: Sequence[torch.Tensor | str], result: Parity) -> list[int]:
    """Count which ways can decode which images; returns the positions of images that both can."""
    both = []
    for i, (name, info, pixels) in enumerate(zip(names, ours.infos, theirs, strict=True)):
        bad, failed = isinstance(info, BadImage), isinstance(pixels, str)
        who = ("neither" if failed else "only open_clip") if bad else ("only ours" if failed else "both")
        result.decodable[who] += 1
        if who == "both":
            both.append(i)
        elif who != "neither" and len(result.one_sided) < EXAMPLES:
            result.one_sided.append(OneSided(name, who, str(info if bad else pixels)))
    return both


def _decoder_to_compare(name: str, run: str) -> str:
    """Return DALI if it is installed: on a CPU a run defaults to Pillow, and nothing would differ."""
    return "dali" if name == "auto" and dali_problem() is None else run
