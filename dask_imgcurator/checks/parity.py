"""Whether scores match open_clip's: this library's way from bytes to scores against open_clip's own.

By default our encoder is float32 too, which leaves only the difference of the pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.backend import get_backend
from ..engine.frames import host_column
from ..monitor import Monitor, Progress
from ..runs.plan import ScoreOptions, make_plan
from ..select.where import combine, parse_where
from ..steps.read import ReadSpec, URLPath, index_partition
from ..storage.urls import check_shards, expand
from .both_ways import BothWays
from .parity_record import Parity

#: Number of shards over which images are spread, unless they hold too few.
SHARDS = 32

#: Default thresholds, by the score that they need.
DEFAULTS = {"aesthetic_score": "aesthetic_score >= 5", "nsfw_score": "nsfw_score < 0.5"}


@dataclass(frozen=True)
class ParityOptions(ScoreOptions):
    """What to compare: the options of ``dask-imgcurator parity``."""

    dtype: str | None = "float32"  # of our encoder; open_clip's is always float32
    measures: bool = False
    where: str | Sequence[str] = ()
    min_aesthetic: float | None = None
    max_nsfw: float | None = None
    limit: int = 1000  # images, spread over the shards


def compare(urlpath: URLPath, options: ParityOptions | None = None, *, monitor: Monitor | None = None) -> Parity:
    """Compare our pixels, embeddings, scores and decisions with open_clip's own, on the user's images."""
    # In the calling process, batch by batch. An unusable model, head or expression is reported before any image is
    # read.
    options, monitor = options or ParityOptions(), monitor or Monitor()
    if options.limit < 1:
        raise ValueError(f"limit={options.limit}: it must be at least 1")
    urls = expand(urlpath, options.storage_options)
    check_shards(urls, options.storage_options)
    plan, _ = make_plan(urls, options, None, monitor)
    expressions = _expressions(options, plan.kinds)
    if plan.embed.encoder.is_starter:
        monitor.note("open_clip does not have the starter: its transform is compared, before this library's own model.")
    ways = BothWays(plan, expressions)
    result = ways.start()
    result.shards, result.notes = len(urls), monitor.notes
    _run(ways, urls, _choose(urls, plan.read, options.limit, result, monitor), result, monitor)
    return result


def _expressions(options: ParityOptions, kinds: Mapping[str, str]) -> list[str]:
    """Thresholds as expressions, checked against the future columns."""
    given = [options.where] if isinstance(options.where, str) else list(options.where)
    shorthands = combine(min_aesthetic=options.min_aesthetic), combine(max_nsfw=options.max_nsfw)
    given += [expression for expression in shorthands if expression is not None]
    found = given or [expression for column, expression in DEFAULTS.items() if column in kinds]
    return [parse_where(expression, kinds).text for expression in found]


def _run(ways: BothWays, urls: Sequence[str], frames: Sequence[Any], result: Parity, monitor: Monitor) -> None:
    labels = {url: url.rpartition("/")[2] for url in urls}
    if len(set(labels.values())) < len(urls):
        labels = {url: url for url in urls}
    state = Progress(expected=sum(map(len, frames)), total_shards=len(frames))
    monitor.scoring(len(frames), 0)
    for frame in frames:
        label = labels[host_column(frame.iloc[:1], "shard")[0]]
        for start in range(0, len(frame), ways.batch_size):
            ways.batch(frame.iloc[start : start + ways.batch_size], label, result)
            state.images, state.errors = result.images, result.images - result.decodable["both"]
            monitor.progress(state)
        state.shards += 1


def _choose(urls: Sequence[str], read: ReadSpec, limit: int, result: Parity, monitor: Monitor) -> list[Any]:
    """Choose images, spread over the shards and within each: one frame per shard, of rows with an image."""
    # At most `limit` rows per shard are held; shards beyond the first `SHARDS` are opened only if images are lacking.
    wanted = min(SHARDS, limit)
    frames: list[Any] = []
    counts: list[int] = []
    first = [urls[i] for i in _spread(len(urls), wanted)]
    for url in dict.fromkeys([*first, *urls]):
        if len(counts) >= wanted and sum(counts) >= limit:
            break
        frame = index_partition((url,), read)
        status = get_backend(read.backend).to_host(frame, ["status", "error_message"]).to_pydict()
        broken = [m for m, what in zip(status["error_message"], status["status"], strict=True) if what == "read_error"]
        if broken:
            monitor.note(f"{url}: {broken[0]}" + (f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""))
        images = [i for i, what in enumerate(status["status"]) if what == "ok"]
        counts.append(len(images))
        frames.append(frame.iloc[[images[i] for i in _spread(len(images), limit)]])
    result.shards_read, result.images_there = len(counts), sum(counts)
    shares = _shares(counts, limit)
    return [frame.iloc[_spread(len(frame), share)] for frame, share in zip(frames, shares, strict=True) if share]


def _spread(count: int, wanted: int) -> list[int]:
    """Return `wanted` of the first `count` numbers, evenly spaced (all if there are fewer)."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


def _shares(counts: Sequence[int], limit: int) -> list[int]:
    """Share `limit` among shards as evenly as their counts allow."""
    shares = [0] * len(counts)
    # The small ones first: what they lack goes to the larger ones.
    for done, i in enumerate(sorted(range(len(counts)), key=counts.__getitem__)):
        shares[i] = min(counts[i], -(-limit // (len(counts) - done)))
        limit -= shares[i]
    return shares
