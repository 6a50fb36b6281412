"""The whole job: score shards (with resume), select, write curated shards, leave a record."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from distributed import Client, Future, as_completed, get_worker
from distributed.scheduler import KilledWorker

from . import collection, files, filters, heads, score, shards, starter, weights, write
from .backend import get_backend, resolve_name
from .cluster import start_client
from .models import ModelError, load_encoder
from .schema import COLUMNS, kind_of
from .weights import WeightsError

__all__ = ["JobError", "Monitor", "RunResult", "Selection", "curate", "score_shards", "select_rows", "write_selection"]

#: Default model where its weights can be had; elsewhere the starter.
DEFAULT_MODEL = ("ViT-L-14", "openai")

#: The heads that were trained on each of OpenAI's models, by the beginning of open_clip's name.
_HEADS_OF = {"ViT-L-14": "l14", "ViT-B-32": "b32", "ViT-B-16": "b16"}


class JobError(RuntimeError):
    """The run could not finish; what is finished is kept."""


class Monitor:
    """What a run tells while it goes on; the command line shows it. Every method may be overridden.

    `progress` is also called from the client's event loop: it must be quick, and must not wait for the cluster.

    Attributes
    ----------
    notes : list of str
        What the user was told; goes into the run's record.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Something that the user should know."""
        self.notes.append(text)

    def started(self, client: Client) -> None:
        """The cluster is there."""

    def scoring(self, total: int, taken_over: int) -> None:
        """Scoring begins: shards in all, and those that an earlier run has finished."""

    def progress(self, state: Progress) -> None:
        """Images were done."""

    def writing(self, total: int) -> None:
        """Writing begins: curated shards in all."""

    def wrote(self, shard: Mapping[str, Any]) -> None:
        """A curated shard was written or taken over."""


@dataclass
class Progress:
    """Counts of the shards that this run scores.

    Attributes
    ----------
    images, errors : int
        Rows done, and of these failed.
    kept, decided : int
        Rows that the filter keeps, and rows of the finished shards that it has seen.
    expected : int
        Estimate of all rows: those of the shards that were opened, and their mean for the others.
    shards, total_shards : int
        Finished, and in all.
    """

    images: int = 0
    errors: int = 0
    kept: int = 0
    decided: int = 0
    expected: int = 0
    shards: int = 0
    total_shards: int = 0


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


@dataclass
class RunResult:
    """What a run did.

    Attributes
    ----------
    out : str
        Its folder.
    samples : int
        Rows of the score table.
    by_status : dict
        Rows by ``status``.
    kept : int or None
        Samples written; None where nothing was selected.
    funnel : list of dict
        For each condition: ``condition``, ``alone`` and ``left`` (rows that pass it alone, and with all before it).
    shards_scored, shards_taken_over : int
        Source shards of this run, and of earlier ones.
    images_scored, scoring_seconds : int, float
        Of this run.
    written : list of dict
        ``_stats.json`` of each curated shard.
    provenance : dict
        Model, heads, decoder and versions.
    notes : list of str
        What the user was told.
    """

    out: str
    samples: int = 0
    by_status: dict[str, int] = field(default_factory=dict)
    kept: int | None = None
    funnel: list[dict[str, Any]] = field(default_factory=list)
    shards_scored: int = 0
    shards_taken_over: int = 0
    images_scored: int = 0
    scoring_seconds: float = 0.0
    seconds: float = 0.0
    written: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


# --- on the workers -------------------------------------------------------------------------------


def describe(plan: ScorePlan) -> dict[str, Any]:
    """Load all that a plan needs, on a worker, and return the provenance of what it will make there."""
    import torch

    from . import __version__

    backend = get_backend(plan.read.backend)
    encoder = load_encoder(plan.embed.encoder, backend.device)
    used = {}
    for use in plan.heads:
        spec = heads.resolve(use.kind, use.head, encoder.width)
        heads.load_head(spec, use.weights_dir, backend.device, use.round_to)
        used[use.column] = {**heads.provenance(spec), "round_to": use.round_to}
    decoder = score.settle_decoder(plan.embed.decoder)
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
        },
        "read": {"caption": plan.read.caption, "fields": dict(plan.read.fields)},
        "versions": versions,
    }


def score_shard(url: str, target: str, plan: ScorePlan, provenance: Mapping[str, Any], topic: str) -> dict[str, Any]:
    """Score one shard into one Parquet file; a task."""
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
    metadata = {score.METADATA_KEY: json.dumps(provenance, sort_keys=True)}
    backend.write_parquet(frame, target, metadata, plan.storage_options)
    kept = select(frame, plan.where)
    return {**counts, "errors": len(frame) - _ok(frame), "kept": len(kept)}


def _ok(frame: Any) -> int:
    return int((frame["status"] == "ok").sum())


def select(frame: Any, where: str | None) -> Any:
    """Rows that are ``ok`` and that the expression keeps."""
    if "status" in frame.columns:
        frame = frame[frame["status"] == "ok"]
    return filters.filter_frame(frame, where) if where else frame


def locate_kept(url: str, where: str | None, spec: score.ScoreFiles) -> dict[str, Any]:
    """Count what a score file's rows come to, and say which of them are kept; a task."""
    kinds = {**{n: kind_of(t) for n, t in _types(url, spec)}}
    parsed = filters.parse_where(where, kinds) if where else None
    wanted = [n for n in ("key", "sample_nbytes", "status") if n in kinds]
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
    return {"rows": len(frame), "by_status": dict(by_status), "funnel": funnel, "keys": keys, "sizes": sizes}


def _types(url: str, spec: score.ScoreFiles) -> list[tuple[str, Any]]:
    schema = score.file_schema(url, spec.storage_options)
    return [(f.name, f.type) for f in schema]


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


def select_file(url: str, target: str, where: str | None, read: score.ScoreFiles) -> dict[str, Any]:
    """Copy the kept rows of a score file to another; a task."""
    frame = score.read_score_file(url, read)
    kept = select(frame, where)
    provenance = score.file_provenance(url, read.storage_options) or {}
    provenance["where"] = where
    metadata = {score.METADATA_KEY: json.dumps(provenance, sort_keys=True)}
    get_backend(read.backend).write_parquet(kept, target, metadata, read.storage_options)
    return {"rows": len(frame), "kept": len(kept)}


# --- running tasks --------------------------------------------------------------------------------


def _run(
    client: Client, jobs: Iterable[tuple[str, tuple[Any, ...]]], function: Callable[..., Any], what: str
) -> Iterator[tuple[str, Any]]:
    """Run tasks, a window of them at a time, and yield name and result as each is done.

    A task whose worker died more often than Dask allows is set aside, and the others go on; any other error of a task
    stops the run, since it would meet the others too (a full disk, a missing file).

    Raises
    ------
    JobError
        After the last task, if some were set aside; at once for other errors.
    """
    waiting = iter(jobs)
    names: dict[str, str] = {}
    running = as_completed()
    lost: list[str] = []

    def submit() -> None:
        for name, arguments in waiting:
            future = client.submit(function, *arguments, pure=False)
            names[future.key] = name
            running.add(future)
            return

    # Enough in the queue to keep all workers busy, few enough that 100,000 shards do not sit in the scheduler.
    window = 2 * max(1, sum(client.nthreads().values())) + 2
    for _ in range(window):
        submit()
    pending: set[Future] = set()
    try:
        for future in running:
            name = names.pop(future.key)
            error = future.exception() if future.status == "error" else None
            if future.status == "cancelled":
                raise JobError(f"the cluster went away while {what} {name}")
            if isinstance(error, KilledWorker):
                lost.append(name)
            elif error is not None:
                raise JobError(f"{what} {name}: {type(error).__name__}: {error}") from error
            else:
                yield name, future.result()
            submit()
    finally:
        pending.update(running.futures)
        client.cancel(list(pending), force=True)
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise JobError(
            f"the workers that were {what} {lost[0]}{more} died again and again (out of memory, or a crash in a native "
            "library); all others are finished. A smaller --batch-size or fewer --n-workers may help."
        )


@contextmanager
def _cluster(
    client: Client | None,
    scheduler: str | None,
    n_workers: int | None,
    backend: str,
    folders: Sequence[str],
    monitor: Monitor,
) -> Iterator[Client]:
    """Lend a client: the caller's, the scheduler's, or that of a new cluster, which is ended afterwards."""
    if client is not None:
        monitor.started(client)
        yield client
        return
    own = scheduler is None
    if own:
        # With a cluster of our own, nobody else is writing here.
        for folder in folders:
            files.remove_partial(folder)
    # Dask would print the traceback of every failed task; what went wrong is told by `JobError`.
    options: dict[str, Any] = {"backend": backend, "silence_logs": logging.CRITICAL} if own else {}
    started = start_client(n_workers, scheduler=scheduler, **options)
    try:
        monitor.started(started)
        yield started
    finally:
        started.close()
        if own:
            for folder in folders:
                files.remove_partial(folder)


# --- planning -------------------------------------------------------------------------------------


def choose_model(model: str | None, pretrained: str | None, monitor: Monitor) -> tuple[str, str | None]:
    """Settle the model: the one asked for, or the default where its weights can be had, or the starter."""
    if model is not None:
        return model, pretrained
    if pretrained is not None:
        raise ValueError(f"pretrained={pretrained!r} needs a model: say which architecture the weights are of")
    name, tag = DEFAULT_MODEL
    if _can_have(name, tag):
        return name, tag
    monitor.note(
        f"The weights of {name} ({tag}) are not on this machine and cannot be downloaded: using the model 'starter'."
    )
    return "starter", None


def _can_have(model: str, tag: str) -> bool:
    """Whether open_clip would find these weights in its cache or on the network."""
    import socket

    import huggingface_hub
    import open_clip

    cfg = open_clip.get_pretrained_cfg(model, tag)
    repository = cfg.get("hf_hub", "").rstrip("/")
    if repository:
        for filename in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"):
            if isinstance(huggingface_hub.try_to_load_from_cache(repository, filename), str):
                return True
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
    except OSError:
        return False
    return True


def choose_heads(
    model: str, pretrained: str | None, aesthetic: str, nsfw: str, weights_dir: str | None, monitor: Monitor
) -> tuple[score.HeadUse, ...]:
    """Settle which heads a model's embeddings go through.

    ``auto`` takes the head that was trained on the model: an embedding's width alone would give B/16 the heads of
    B/32, and any other model of that width heads that mean nothing for it.
    """
    family = next((f for name, f in _HEADS_OF.items() if model == name or model.startswith(f"{name}-quickgelu")), None)
    uses = []
    for kind, asked in (("aesthetic", aesthetic), ("nsfw", nsfw)):
        head = asked
        if asked == "none":
            continue
        if asked == "auto":
            if model == "starter":
                head = f"{kind}-starter"
            else:
                fitting = [h.name for h in heads.HEADS.values() if h.kind == kind and h.name.endswith(f"-{family}")]
                # v2 before v1.
                head = max(fitting, default="")
                if not head:
                    monitor.note(
                        f"No {kind} head was trained on {model}: no {kind}_score "
                        f"(--{kind}-head NAME takes one all the same)."
                    )
                    continue
        else:
            spec = heads.HEADS.get(head)
            heads.resolve(kind, head, spec.width if spec else 0)  # type: ignore[arg-type]
        if model != "starter" and pretrained != "openai" and not str(pretrained).startswith("random"):
            monitor.note(
                f"The head {head} was trained on OpenAI's weights; "
                f"with {model} ({pretrained}) its scores are on another scale."
            )
        uses.append(score.HeadUse(kind, head, "embedding", weights_dir, "float16" if kind == "nsfw" else None))  # type: ignore[arg-type]
    return tuple(uses)


def score_files(urls: Sequence[str], folder: str, storage_options: Mapping[str, Any] | None) -> dict[str, str]:
    """Name the score file of each shard.

    A shard gets its stem. Where that name is taken, by another shard of this run or by a file that an earlier run
    made of another shard, a hash of its URL is added; so a name never changes once it is given.
    """
    import hashlib

    taken: dict[str, str] = {}
    for url in files.list_files(folder, ".parquet", storage_options):
        provenance = score.file_provenance(url, storage_options)
        if provenance is not None and "shard" in provenance:
            taken[url.rpartition("/")[2]] = provenance["shard"]
    by_shard = {shard: name for name, shard in taken.items()}
    out = {}
    for url in urls:
        name = by_shard.get(url)
        if name is None:
            base = url.rstrip("/").rpartition("/")[2]
            stem = base[: -len(".tar")] if base.endswith(".tar") else base
            name = f"{stem}.parquet"
            if taken.get(name, url) != url:
                name = f"{stem}-{hashlib.sha256(url.encode()).hexdigest()[:8]}.parquet"
            taken[name] = url
        out[url] = files.join(folder, name)
    return out


# --- the halves -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreOptions:
    """Arguments of the expensive half; see `score_shards`."""

    model: str | None = None
    pretrained: str | None = None
    columns: Sequence[str] | Mapping[str, str] = ()
    caption: str | None = None
    aesthetic_head: str = "auto"
    nsfw_head: str = "auto"
    weights_dir: str | os.PathLike[str] | None = None
    batch_size: int | None = None
    dtype: str | None = None
    backend: str | None = None
    storage_options: Mapping[str, Any] | None = None
    out_options: Mapping[str, Any] | None = None


def _plan(urls: Sequence[str], options: ScoreOptions, where: str | None, monitor: Monitor) -> ScorePlan:
    model, pretrained = choose_model(options.model, options.pretrained, monitor)
    read = collection.read_spec(urls, options.columns, options.caption, options.storage_options, options.backend)
    embed = collection.embed_spec(model, pretrained, options.batch_size, options.dtype, options.storage_options)
    weights_dir = weights.resolve_dir(options.weights_dir)
    uses = choose_heads(model, pretrained, options.aesthetic_head, options.nsfw_head, weights_dir, monitor)
    plan = ScorePlan(read, embed, uses, where, dict(options.out_options or {}))
    if where is not None:
        # A mistake in the expression is told now, not after the scoring.
        parsed = filters.parse_where(where, plan.columns)
        if model == "starter" and "nsfw_score" in parsed.columns:
            monitor.note(
                "The starter's nsfw_score stays near 0 for every picture: a condition on it removes next to nothing."
            )
    if model == "starter":
        monitor.note(starter.NOTICE)
    elif str(pretrained).startswith("random"):
        monitor.note(
            f"{model} has random weights ({pretrained}): scores mean nothing; this is for benchmarks and tests."
        )
    return plan


def _score(
    client: Client, urls: Sequence[str], folder: str, plan: ScorePlan, resume: bool, monitor: Monitor, result: RunResult
) -> list[str]:
    """Score what is not scored yet; returns the score files in the order of the shards."""
    begin = time.perf_counter()
    options = plan.storage_options
    files.make_folder(folder)
    try:
        # All workers load the model now, side by side; what the first one tells holds for all.
        loading = [client.submit(describe, plan, pure=False, workers=[address]) for address in client.nthreads()]
        provenance = next(iter(as_completed(loading))).result()
    except (ModelError, WeightsError) as err:
        raise JobError(str(err)) from err
    except KilledWorker:
        raise JobError(
            "the worker died while it loaded the model: it probably needs more memory (fewer --n-workers)"
        ) from None
    result.provenance = provenance
    # From here on all workers use what the first one has.
    encoder = replace(plan.embed.encoder, dtype=provenance["encoder"]["dtype"])
    plan = replace(plan, embed=replace(plan.embed, encoder=encoder, decoder=provenance["decode"]["decoder"]))

    targets = score_files(urls, folder, options)
    todo, taken_over = {}, 0
    for url, target in targets.items():
        full = {**provenance, "shard": url, "fingerprint": shards.fingerprint(url, plan.read.storage_options)}
        if resume and score.file_provenance(target, options) == json.loads(json.dumps(full)):
            taken_over += 1
        else:
            todo[url] = full
    result.shards_taken_over = taken_over
    monitor.scoring(len(urls), taken_over)

    state = Progress(total_shards=len(todo))
    seen: dict[str, dict[str, int]] = {}

    def update() -> None:
        known = list(seen.values())
        state.images = sum(s["done"] for s in known)
        state.errors = sum(s["errors"] for s in known)
        mean = sum(s["rows"] for s in known) / len(known) if known else 0
        state.expected = round(sum(s["rows"] for s in known) + mean * (len(todo) - len(known)))
        monitor.progress(state)

    def on_event(event: Any) -> None:
        counts = event[1]
        if seen.get(counts["shard"], {}).get("finished"):
            return
        seen[counts["shard"]] = counts
        update()

    topic = f"imgcurator-{os.getpid()}-{time.time_ns()}"
    client.subscribe_topic(topic, on_event)
    jobs = ((url, (url, targets[url], plan, full, topic)) for url, full in todo.items())
    try:
        for url, counts in _run(client, jobs, score_shard, "scoring"):
            seen[url] = {**counts, "done": counts["rows"], "finished": True}
            state.shards += 1
            state.kept += counts["kept"]
            state.decided += counts["rows"]
            update()
    finally:
        client.unsubscribe_topic(topic)
        result.shards_scored = state.shards
        result.images_scored = state.decided
        result.scoring_seconds = time.perf_counter() - begin
    return [targets[url] for url in urls]


@dataclass
class Selection:
    """Which rows of which score files are kept."""

    urls: list[str]
    where: str | None
    located: list[dict[str, Any]]

    @property
    def kept(self) -> int:
        """Number of kept rows."""
        return sum(len(part["keys"]) for part in self.located)

    @property
    def rows(self) -> int:
        """Number of rows in all."""
        return sum(part["rows"] for part in self.located)

    @property
    def by_status(self) -> dict[str, int]:
        """Rows by ``status``, commonest first."""
        total: Counter[str] = Counter()
        for part in self.located:
            total.update(part["by_status"])
        return dict(total.most_common())

    @property
    def funnel(self) -> list[dict[str, Any]]:
        """Each condition with the rows that pass it alone, and after those before it."""
        out: list[dict[str, Any]] = []
        for part in self.located:
            for i, step in enumerate(part["funnel"]):
                if i == len(out):
                    out.append({"condition": step["condition"], "alone": 0, "left": 0})
                out[i]["alone"] += step["alone"]
                out[i]["left"] += step["left"]
        return out


def _located(client: Client, urls: Sequence[str], where: str | None, read: score.ScoreFiles) -> Selection:
    jobs = ((url, (url, where, read)) for url in urls)
    found = dict(_run(client, jobs, locate_kept, "reading"))
    return Selection(list(urls), where, [found[url] for url in urls])


def _write(
    client: Client, selection: Selection, read: score.ScoreFiles, spec: write.WriteSpec, resume: bool, monitor: Monitor
) -> list[dict[str, Any]]:
    sizes = ((part["keys"], part["sizes"]) for part in selection.located)
    plan = list(write.plan_shards(sizes, spec.max_count, spec.max_nbytes))
    files.make_folder(spec.folder)
    monitor.writing(len(plan))
    jobs = (
        (
            f"{n:05d}.tar",
            (n, [(selection.urls[s.partition], s.start, s.stop) for s in slices], selection.where, read, spec, resume),
        )
        for n, slices in enumerate(plan)
    )
    done = {}
    for name, stats in _run(client, jobs, write_kept, "writing"):
        done[name] = stats
        monitor.wrote(stats)
    write.remove_surplus(spec.folder, len(plan), spec.storage_options)
    return [done[name] for name in sorted(done, key=lambda n: int(n.partition(".")[0]))]


def _score_reader(urls: Sequence[str], backend: str, storage_options: Mapping[str, Any] | None) -> score.ScoreFiles:
    return score.ScoreFiles(
        backend, tuple(score.file_schema(urls[0], storage_options).names), dict(storage_options or {})
    )


# --- public ---------------------------------------------------------------------------------------


def score_shards(
    urlpath: collection.URLPath,
    out: str | os.PathLike[str],
    *,
    resume: bool = True,
    client: Client | None = None,
    scheduler: str | None = None,
    n_workers: int | None = None,
    monitor: Monitor | None = None,
    **options: Any,
) -> RunResult:
    """Score shards into a score table: the expensive half of `curate`.

    Parameters
    ----------
    urlpath : str, path, or sequence of them
        Shards, as for `read_webdataset`.
    out : str or path
        Folder for one Parquet file a shard.
    resume : bool
        Whether files of an earlier run with the same provenance are taken over.
    client, scheduler, n_workers
        Where to run: a `distributed.Client`, the address of a scheduler, or a new cluster with so many workers.
    monitor : Monitor, optional
        Is told how the run goes on.
    **options
        As for `curate`: ``model``, ``pretrained``, ``columns``, ``caption``, ``aesthetic_head``, ``nsfw_head``,
        ``weights_dir``, ``batch_size``, ``dtype``, ``backend``, ``storage_options``, ``out_options``.

    Returns
    -------
    RunResult
        With `kept` None.

    Raises
    ------
    JobError
        If the run could not finish. Finished shards are kept.
    """
    monitor = monitor or Monitor()
    begin = time.perf_counter()
    folder = os.fspath(out)
    result = RunResult(folder, notes=monitor.notes)
    given = ScoreOptions(**options)
    urls = shards.expand(urlpath, given.storage_options)
    plan = _plan(urls, given, None, monitor)
    with _cluster(client, scheduler, n_workers, plan.read.backend, [folder], monitor) as client:
        tables = _score(client, urls, folder, plan, resume, monitor, result)
        selection = _located(client, tables, None, _score_reader(tables, plan.read.backend, given.out_options))
    result.samples, result.by_status = selection.rows, selection.by_status
    result.seconds = time.perf_counter() - begin
    return result


def select_rows(
    scores: collection.URLPath,
    out: str | os.PathLike[str],
    where: str | None,
    *,
    storage_options: Mapping[str, Any] | None = None,
    backend: str | None = None,
    client: Client | None = None,
    scheduler: str | None = None,
    n_workers: int | None = None,
    monitor: Monitor | None = None,
) -> Selection:
    """Copy the kept rows of a score table to another.

    Parameters
    ----------
    scores : str, path, or sequence of them
        Score table, as for `read_scores`.
    out : str or path
        Folder for the selected rows; files have the names of their sources.
    where : str or None
        Expression on the columns; rows whose ``status`` is not ``ok`` are never kept.

    Returns
    -------
    Selection
        With the counts of each condition.
    """
    monitor = monitor or Monitor()
    urls, read = _open_scores(scores, where, storage_options, backend)
    folder = os.fspath(out)
    if any(files.join(folder, url.rpartition("/")[2]) == url for url in urls):
        raise ValueError(f"{folder} is the score table itself: choose another folder for the selected rows")
    files.make_folder(folder)
    with _cluster(client, scheduler, n_workers, read.backend, [folder], monitor) as client:
        selection = _located(client, urls, where, read)
        jobs = ((url, (url, files.join(folder, url.rpartition("/")[2]), where, read)) for url in urls)
        for _ in _run(client, jobs, select_file, "selecting from"):
            pass
    return selection


def write_selection(
    scores: collection.URLPath,
    out: str | os.PathLike[str],
    where: str | None = None,
    *,
    max_count: int = 10_000,
    max_size: int | str = "1GB",
    resume: bool = True,
    storage_options: Mapping[str, Any] | None = None,
    source_options: Mapping[str, Any] | None = None,
    backend: str | None = None,
    client: Client | None = None,
    scheduler: str | None = None,
    n_workers: int | None = None,
    monitor: Monitor | None = None,
) -> tuple[Selection, list[dict[str, Any]]]:
    """Write curated shards from a score table, without scoring again.

    Parameters
    ----------
    scores : str, path, or sequence of them
        Score table, as for `read_scores`.
    out : str or path
        Folder for the curated shards.
    where : str, optional
        Expression on the columns; rows whose ``status`` is not ``ok`` are never kept.
    max_count, max_size : int, str
        See `to_webdataset`.

    Returns
    -------
    (Selection, list of dict)
        What was kept, and ``_stats.json`` of each shard.
    """
    monitor = monitor or Monitor()
    folder = os.fspath(out)
    spec = write.WriteSpec(
        folder, max_count, write.parse_size(max_size), dict(storage_options or {}), dict(source_options or {})
    )
    urls, read = _open_scores(scores, where, storage_options, backend)
    with _cluster(client, scheduler, n_workers, read.backend, [folder], monitor) as client:
        selection = _located(client, urls, where, read)
        return selection, _write(client, selection, read, spec, resume, monitor)


def _open_scores(
    scores: collection.URLPath, where: str | None, storage_options: Mapping[str, Any] | None, backend: str | None
) -> tuple[list[str], score.ScoreFiles]:
    urls = collection.score_urls(scores, storage_options)
    read = _score_reader(urls, resolve_name(backend), storage_options)
    if where is not None:
        schema = score.file_schema(urls[0], storage_options)
        filters.parse_where(where, {f.name: kind_of(f.type) for f in schema})
    return urls, read


def curate(
    urlpath: collection.URLPath,
    out: str | os.PathLike[str],
    *,
    where: str | None = None,
    min_aesthetic: float | None = None,
    max_nsfw: float | None = None,
    max_count: int = 10_000,
    max_size: int | str = "1GB",
    resume: bool = True,
    client: Client | None = None,
    scheduler: str | None = None,
    n_workers: int | None = None,
    monitor: Monitor | None = None,
    **options: Any,
) -> RunResult:
    """Curate shards: score every image, keep those that an expression takes, write them as curated shards.

    The same as ``dask-imgcurator curate``.

    Parameters
    ----------
    urlpath : str, path, or sequence of them
        Shards, as for `read_webdataset`.
    out : str or path
        Folder for ``scores/``, ``shards/``, ``report.html`` and ``run.json``.
    where : str, optional
        Expression on the columns, for example ``"aesthetic_score >= 5 and width >= 512"``. Rows whose ``status``
        is not ``ok`` are
        never kept.
    min_aesthetic, max_nsfw : float, optional
        Shorthands for ``aesthetic_score >= X`` and ``nsfw_score < X``.
    max_count, max_size : int, str
        Size of the curated shards, see `to_webdataset`.
    resume : bool
        Whether what an earlier run of the same provenance finished is taken over.
    client, scheduler, n_workers
        Where to run: a `distributed.Client`, the address of a scheduler, or a new cluster with so many workers.
    monitor : Monitor, optional
        Is told how the run goes on.
    **options
        ``model``, ``pretrained``, ``batch_size``, ``dtype``: see `embed`; by default ViT-L-14 of OpenAI, or the
        starter where its weights cannot be had. ``columns``, ``caption``, ``backend``, ``storage_options``:
        see `read_webdataset`.
        ``aesthetic_head``, ``nsfw_head``: a head's name, ``auto`` (the one trained on the model) or ``none``.
        ``weights_dir``: folder
        with the heads. ``out_options``: for the fsspec file system of `out`.

    Returns
    -------
    RunResult
        Counts, timings and provenance; the same as in ``run.json``.

    Raises
    ------
    WhereError
        For a mistake in the expression, before anything is done.
    JobError
        If the run could not finish. What is finished is kept: the same call goes on from there.
    """
    from . import report

    monitor = monitor or Monitor()
    begin = time.perf_counter()
    folder = os.fspath(out)
    result = RunResult(folder, notes=monitor.notes)
    given = ScoreOptions(**options)
    where = filters.combine(where, min_aesthetic, max_nsfw)
    urls = shards.expand(urlpath, given.storage_options)
    plan = _plan(urls, given, where, monitor)
    scores, curated = files.join(folder, "scores"), files.join(folder, "shards")
    spec = write.WriteSpec(
        curated, max_count, write.parse_size(max_size), dict(plan.storage_options), dict(plan.read.storage_options)
    )
    with _cluster(client, scheduler, n_workers, plan.read.backend, [scores, curated], monitor) as client:
        tables = _score(client, urls, scores, plan, resume, monitor, result)
        read = _score_reader(tables, plan.read.backend, plan.storage_options)
        selection = _located(client, tables, where, read)
        result.samples, result.by_status = selection.rows, selection.by_status
        result.kept, result.funnel = selection.kept, selection.funnel
        result.written = _write(client, selection, read, spec, resume, monitor)
    result.seconds = time.perf_counter() - begin
    arguments = {"shards": urls, "out": folder, "where": where, **asdict(given)}
    # Storage options may hold credentials.
    arguments = {k: v for k, v in arguments.items() if not k.endswith("_options")}
    _record(folder, arguments, result, plan.storage_options)
    report.write_report(folder, tables, where, result, plan.storage_options, plan.read.storage_options)
    return result


def _record(folder: str, arguments: dict[str, Any], result: RunResult, storage_options: Mapping[str, Any]) -> None:
    record = {
        "arguments": arguments,
        "python": platform.python_version(),
        "dask": _version("dask"),
        **{k: v for k, v in asdict(result).items() if k != "out"},
    }
    with files.write_whole(files.join(folder, "run.json"), storage_options) as file:
        file.write(json.dumps(record, indent=1, ensure_ascii=False, default=str).encode() + b"\n")


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
