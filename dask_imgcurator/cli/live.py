"""A run's progress on a terminal."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .. import monitor
from ..results import count, visible

if TYPE_CHECKING:
    from distributed import Client
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.text import Text

#: Seconds between progress lines in a log.
_EVERY = 10.0


def make_console(stderr: bool = False, quiet: bool = False) -> Console:
    """Make a console that prints text literally: file names, keys and expressions may look like Rich's markup."""
    from rich.console import Console

    class Plain(Console):
        """A console on which only Rich's own styles have an effect."""

        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(visible(text), **options)

    return Plain(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def make_monitor(console: Console) -> Iterator[monitor.Monitor]:
    """Make a monitor that draws a live line on a terminal, and prints lines elsewhere."""
    if not console.is_terminal or console.quiet:
        yield _Lines(console)
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Live(console, progress)


#: Without a terminal, progress is printed at every twentieth of a run, or after this many seconds.
_STEPS, _SILENCE = 20, 30


class _Lines(monitor.Monitor):
    """Notes, phases and progress, one per line."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self._begin = self._told = time.monotonic()
        self._step = 0
        self._total = self._wrote = 0

    def note(self, text: str) -> None:
        super().note(text)
        self.console.print(f"Note: {text}", style="yellow")

    def started(self, client: Client) -> None:
        with contextlib.suppress(AttributeError, KeyError):
            if (link := client.dashboard_link) and _has_dashboard(link):
                self.console.print(f"dashboard: {link}")

    def scoring(self, total: int, taken_over: int) -> None:
        todo = total - taken_over
        text = f"scoring {count(todo, 'shard')}" if todo else "nothing to score"
        if taken_over:
            text += f" ({count(taken_over, 'shard')} finished already)"
        self.console.print(text)
        self._restart()

    def progress(self, state: monitor.Progress) -> None:
        if self._is_time(state.images, state.expected):
            self.console.print(f"scoring: {_told(state, time.monotonic() - self._begin)}")

    def packing(self, total: int) -> None:
        self.console.print(f"packing {count(total, 'shard')}")
        self._restart(total)

    def writing(self, total: int) -> None:
        self.console.print(f"writing {count(total, 'curated shard')}")
        self._restart(total)

    def wrote(self, shard: Mapping[str, Any]) -> None:
        self._wrote += 1
        if self._is_time(self._wrote, self._total):
            self.console.print(f"{self._wrote:,}/{count(self._total, 'shard')} written")

    def _restart(self, total: int = 0) -> None:
        self._begin = self._told = time.monotonic()
        self._step, self._total, self._wrote = 0, total, 0

    def _is_time(self, done: int, total: int) -> bool:
        step, now = _STEPS * done // max(1, total), time.monotonic()
        if step <= self._step and now - self._told < _SILENCE:
            return False
        self._step, self._told = max(step, self._step), now
        return True


class _Live(_Lines):
    """A live line: images, images/s, kept share, errors, time left."""

    def __init__(self, console: Console, progress: Progress) -> None:
        super().__init__(console)
        self._progress = progress
        self._task: TaskID | None = None
        self._next("starting workers")

    def _next(self, description: str, total: float | None = None, text: str = "") -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(description, total=total, text=text)
        self._begin = time.monotonic()

    def started(self, client: Client) -> None:
        super().started(client)
        self._next("loading the model")

    def scoring(self, total: int, taken_over: int) -> None:
        super().scoring(total, taken_over)
        self._next("scoring")

    def progress(self, state: monitor.Progress) -> None:
        assert self._task is not None
        text = _told(state, time.monotonic() - self._begin)
        self._progress.update(self._task, total=max(1, state.expected), completed=state.images, text=text)

    def packing(self, total: int) -> None:
        super().packing(total)
        self._next("packing", total=total)

    def writing(self, total: int) -> None:
        super().writing(total)
        self._next("writing", total=total)

    def wrote(self, shard: Mapping[str, Any]) -> None:
        assert self._task is not None
        self._progress.update(self._task, advance=1, text=str(shard["shard"]))


def _told(state: monitor.Progress, seconds: float) -> str:
    """Images, images/s, kept share, errors, shards, time left."""
    rate = state.images / seconds if seconds > 0 else 0.0
    kept = f" · kept {state.kept / state.decided:.0%}" if state.decided else ""
    left = f" · {_clock((state.expected - state.images) / rate)} left" if rate > 0 else ""
    return (
        f"{state.images:,}/~{state.expected:,} images · {rate:,.1f}/s{kept} · {state.errors:,} errors · "
        f"shard {state.shards:,}/{state.total_shards:,}{left}"
    )


def _has_dashboard(link: str) -> bool:
    """Whether the dashboard exists; Dask returns a link even for schedulers without dashboard or bokeh."""
    import urllib.error
    import urllib.request

    # A page that cannot be reached from here (a relative link, a firewall) may still open elsewhere.
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(link, timeout=3) as page:
            return b"Dask needs bokeh" not in page.read(4096)
    except urllib.error.HTTPError:
        return False
    except (OSError, ValueError):
        return True


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class _Logged(monitor.Monitor):
    """Passes everything on to a display, and writes it to a file, one JSON object per line."""

    def __init__(self, shown: monitor.Monitor, file: IO[str]) -> None:
        self.notes, self._shown, self._file, self._told = shown.notes, shown, file, 0.0
        self._lock = threading.Lock()

    def event(self, event: str, **about: Any) -> None:
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **about}
        with self._lock:
            self._file.write(json.dumps(line, default=str) + "\n")
            self._file.flush()

    def note(self, text: str) -> None:
        self._shown.note(text)
        self.event("note", text=text)

    def started(self, client: Client) -> None:
        self._shown.started(client)
        self.event("started", scheduler=client.scheduler.address, workers=len(client.nthreads()))

    def scoring(self, total: int, taken_over: int) -> None:
        self._shown.scoring(total, taken_over)
        self.event("scoring", shards=total, taken_over=taken_over)

    def progress(self, state: monitor.Progress) -> None:
        self._shown.progress(state)
        if time.monotonic() - self._told >= _EVERY or state.shards == state.total_shards:
            self._told = time.monotonic()
            self.event("progress", **asdict(state))

    def packing(self, total: int) -> None:
        self._shown.packing(total)
        self.event("packing", shards=total)

    def writing(self, total: int) -> None:
        self._shown.writing(total)
        self.event("writing", shards=total)

    def wrote(self, shard: Mapping[str, Any]) -> None:
        self._shown.wrote(shard)
        self.event("wrote", shard=shard["shard"], samples=shard["count"], nbytes=shard["nbytes"])


class _Notes(logging.Handler):
    """Turns this library's warnings during a run into notes."""

    def __init__(self, to: monitor.Monitor) -> None:
        super().__init__(logging.WARNING)
        self._to = to

    def emit(self, record: logging.LogRecord) -> None:
        self._to.note(record.getMessage())


@contextlib.contextmanager
def display(quiet: bool, log: str | None = None) -> Iterator[monitor.Monitor]:
    """Show a run on stderr: a live line on a terminal, plain lines elsewhere, nothing with --quiet; `log`: a file."""
    with make_monitor(make_console(stderr=True, quiet=quiet)) as shown, contextlib.ExitStack() as stack:
        if log is None:
            yield shown
            return
        logged = _Logged(shown, stack.enter_context(Path(log).open("a", encoding="utf-8")))
        from .. import __version__

        logged.event("begin", version=__version__, command=sys.argv[1:2])
        handler = _Notes(logged)
        logging.getLogger("dask_imgcurator").addHandler(handler)
        try:
            yield logged
        except BaseException as err:
            logged.event("failed", error=type(err).__name__, text=str(err))
            raise
        else:
            logged.event("end")
        finally:
            logging.getLogger("dask_imgcurator").removeHandler(handler)
