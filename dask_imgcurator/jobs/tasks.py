"""What runs on the workers: each function here is the whole of one task."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from distributed import get_worker, secede

from ..engine.backend import get_backend
from ..images import quality
from ..models import heads
from ..models.encoders import load_encoder
from ..schema import COLUMNS, kind_of, kinds_of_schema
from ..select import where as filters
from ..steps import collection, score, write
from ..storage import files, shards

__all__ = ["ScorePlan", "describe", "locate_kept", "score_shard", "select", "write_kept"]


@dataclass(frozen=True)
class ScorePlan:
    """What is done to each shard; travels to the workers."""

    read: score.ReadSpec
    embed: score.EmbedSpec
    heads: tuple[score.HeadUse, ...]
    where: str | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def columns(self) -> dict[str, str]:
        """Columns of the score table and their kinds."""
        names = [*self.read.schema.names, *self.embed.schema.names, *(u.column for u in self.heads)]
        fields = dict(self.read.fields)
        types = {n: COLUMNS[n].type if n in COLUMNS else score.FIELD_TYPES[fields[n]] for n in dict.fromkeys(names)}
        return {name: kind_of(type_) for name, type_ in types.items()}


def describe(plan: ScorePlan) -> dict[str, Any]:
    """Load all that a plan needs, on a worker, and return the provenance of what it will make there."""
    import torch

    from .. import __version__

    backend = get_backend(plan.read.backend)
    encoder = load_encoder(plan.embed.encoder, backend.device)
    used = {}
    for use in plan.heads:
        spec = heads.resolve(use.kind, use.head, encoder.width)
        heads.load_head(spec, use.weights_dir, backend.device, use.round_to)
        used[use.column] = {**heads.provenance(spec), "round_to": use.round_to}
    decoder = score.settle_decoder(plan.embed.decoder, backend.decoder_device)
    versions = {"dask_imgcurator": __version__, "torch": torch.__version__}
    if decoder == "dali":
        import nvidia.dali

        versions["dali"] = nvidia.dali.__version__
    return {
        "encoder": encoder.provenance,
        "heads": used,
        "decode": {
            "decoder": decoder,
            "device": backend.decoder_device,
            "max_pixels": plan.embed.max_pixels,
            "adjust_orientation": plan.embed.adjust_orientation,
            "measures": quality.provenance() if plan.embed.measures else None,
        },
        "read": {"caption": plan.read.caption, "fields": dict(plan.read.fields), "image": list(plan.read.image)},
        "versions": versions,
    }


def score_shard(url: str, target: str, plan: ScorePlan, provenance: Mapping[str, Any], topic: str) -> dict[str, Any]:
    """Score one shard into one Parquet file; a task."""
    with contextlib.ExitStack() as stack:
        if not files.is_local(url):
            with contextlib.suppress(OSError):  # becomes a row of the table
                stack.enter_context(shards.hold_shard(url, plan.read.storage_options))
            stack.enter_context(_turn())
        return _score_shard(url, target, plan, provenance, topic)


_turns: dict[str, threading.BoundedSemaphore] = {}
_turns_lock = threading.Lock()


@contextlib.contextmanager
def _turn() -> Iterator[None]:
    """Let as many tasks compute at a time as the worker has threads; those that wait have their shard already.

    A task that computes gives up its place in the worker's queue, so that the worker is sent the next one, which
    streams its shard in the meantime and waits here.
    """
    worker = get_worker()
    with _turns_lock:
        turns = _turns.setdefault(worker.address, threading.BoundedSemaphore(worker.state.nthreads))
    with turns:
        secede()
        yield


def _score_shard(url: str, target: str, plan: ScorePlan, provenance: Mapping[str, Any], topic: str) -> dict[str, Any]:
    worker = get_worker()
    frame = score.index_partition((url,), plan.read)
    counts: dict[str, Any] = {"shard": url, "rows": len(frame), "done": 0, "errors": 0}
    worker.log_event(topic, counts.copy())

    def progress(done: int, errors: int) -> None:
        counts["done"] += done
        counts["errors"] += errors
        worker.log_event(topic, counts.copy())

    frame = score.embed_partition(frame, plan.embed, progress)
    for use in plan.heads:
        frame = score.score_partition(frame, use)
    backend = get_backend(plan.read.backend)
    # What a store failed to give may come the next time: such a file is not taken over by a later run.
    lost = {"unreached": n} if (n := _unreached(frame, url)) else {}
    metadata = {score.METADATA_KEY: json.dumps({**provenance, **lost}, sort_keys=True)}
    backend.write_parquet(frame, target, metadata, plan.storage_options)
    kept = select(frame, plan.where)
    return {**counts, "errors": len(frame) - _ok(frame), "kept": len(kept)}


def _unreached(frame: Any, url: str) -> int:
    """Rows that a remote file system's errors cost, as `files.RemoteError` words them; damage to the tar is no such."""
    if files.is_local(url):
        return 0
    messages = collection.host_column(frame[frame["status"] == "read_error"], "error_message")
    return sum(str(message).startswith(f"{url}: ") for message in messages)


def _ok(frame: Any) -> int:
    return int((frame["status"] == "ok").sum())


def select(frame: Any, where: str | None) -> Any:
    """Rows that are ``ok`` and that the expression keeps."""
    if "status" in frame.columns:
        frame = frame[frame["status"] == "ok"]
    return filters.filter_frame(frame, where) if where else frame


def locate_kept(url: str, where: str | None, spec: score.ScoreFiles) -> dict[str, Any]:
    """Count what a score file's rows come to, and say which of them are kept; a task."""
    kinds = kinds_of_schema(score.file_schema(url, spec.storage_options))
    parsed = filters.parse_where(where, kinds) if where else None
    wanted = [n for n in ("key", "shard", "sample_offset", "sample_nbytes", "status") if n in kinds]
    columns = tuple(dict.fromkeys([*wanted, *(parsed.columns if parsed else ())]))
    frame = score.read_score_file(url, replace(spec, columns=columns))
    by_status: dict[str, int] = {}
    funnel = []
    left = frame
    if "status" in kinds:
        by_status = Counter(collection.host_column(frame, "status"))
        left = frame[frame["status"] == "ok"]
    readable = left
    for part in parsed.conjuncts() if parsed else []:
        left = left[part.mask(left)]
        funnel.append({"condition": part.text, "alone": int(part.mask(readable).sum()), "left": len(left)})
    keys, sizes = collection.locate(left)
    return {
        "rows": len(frame),
        "by_status": dict(by_status),
        "funnel": funnel,
        "keys": keys,
        "sizes": sizes,
        "sources": sorted(set(collection.host_column(left, "shard"))),
    }


def write_kept(
    number: int,
    pieces: Sequence[tuple[str, int, int]],
    where: str | None,
    read: score.ScoreFiles,
    spec: write.WriteSpec,
    resume: bool,
) -> dict[str, Any]:
    """Write one curated shard from rows of score files; a task."""
    frames = [select(score.read_score_file(url, read), where).iloc[start:stop] for url, start, stop in pieces]
    return write.write_shard(number, frames, spec, resume)
