"""Errors for the user: one line and an exit code."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import signal
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from ..results import visible

USAGE, FAILED = 2, 1

_PACKAGE = Path(__file__).parents[1]

#: Commands that reuse completed work of an earlier run.
_RESUMING = ("curate", "score", "write", "demo")


class Failure(click.ClickException):
    """An error for the user: what failed and what to do, without traceback or usage text."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]

    def show(self, file: Any = None) -> None:
        click.echo(f"dask-imgcurator: {visible(self.format_message())}", file=file or sys.stderr, err=file is None)


@contextlib.contextmanager
def _plain_errors(resumes: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn errors that a user can fix into one line and an exit code; `resumes`: rerunning the command resumes."""

    def kept(space: str) -> str:
        return f"{space}Completed work is saved; rerun the same command to resume." if resumes() else ""

    try:
        yield
    except click.UsageError as err:
        command = err.ctx.command_path if err.ctx else "dask-imgcurator"
        raise Failure(f"{err.format_message()} (see {command} --help)", USAGE) from None
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except KeyboardInterrupt:
        raise Failure(f"stopped.{kept(' ')}", FAILED) from None
    except MemoryError:
        raise Failure(f"not enough memory: try a smaller --batch-size.{kept(' ')}", FAILED) from None
    except Exception as err:
        raise _failure(err, kept) from None


def _failure(err: Exception, kept: Callable[[str], str]) -> Failure:
    # Imported here because errors are rare and these imports take seconds.
    from ..clusters.faults import JobError
    from ..models.weights import WeightsError
    from ..storage.tar_copy import WriteError

    repeated = WriteError | WeightsError  # these would occur again
    if isinstance(err, repeated) or isinstance(err.__cause__, repeated):
        return Failure(_text(err), FAILED)
    if isinstance(err, JobError):
        return Failure(f"{_text(err)}{kept(chr(10))}", FAILED)
    if isinstance(err, OSError):
        wrong_name = isinstance(err, FileNotFoundError | FileExistsError | NotADirectoryError)
        return Failure(_text(err), USAGE if wrong_name else FAILED)
    return Failure(_text(err), USAGE if _is_told(err) else FAILED)


def _is_told(err: BaseException) -> bool:
    """Whether an error's message is for the user: this library's own, the system's, and Arrow's on files."""
    from pyarrow import ArrowException

    from ..clusters.faults import JobError
    from ..engine.backend import BackendError
    from ..engine.device import is_out_of_memory
    from ..models.weights import WeightsError
    from ..storage.tar_copy import WriteError

    if isinstance(err, JobError):
        return err.__cause__ is None or _is_told(err.__cause__)
    if isinstance(err, BackendError | WeightsError | WriteError | ArrowException | OSError | ImportError | MemoryError):
        return True
    # Any code may raise a ValueError; this library's own come from its files.
    frames = traceback.extract_tb(err.__traceback__)
    own = not frames or "dask_imgcurator" in Path(frames[-1].filename).parts
    return (own and isinstance(err, ValueError)) or (isinstance(err, RuntimeError) and is_out_of_memory(err))


def _text(err: BaseException) -> str:
    """The text of an error; the traceback of an unexpected one is saved."""
    from pyarrow import ArrowException

    from ..clusters.faults import JobError

    known = _is_told(err)
    if known and isinstance(err, OSError) and err.strerror and err.filename:
        return f"{err.strerror}: {err.filename}"
    if known and not isinstance(err, ArrowException) and not isinstance(err.__cause__, ArrowException):
        return str(err) or type(err).__name__
    name = "" if known or isinstance(err, JobError) else f"{type(err).__name__}: "
    line = textwrap.shorten(str(err), 500, placeholder=" …")  # some of Arrow's messages contain whole schemas
    return f"{name}{line}{'' if known else _reported(err)}"


def _reported(err: BaseException) -> str:
    """Save a traceback, and say where and why."""
    from .. import __version__

    lines = [f"dask_imgcurator {__version__}, Python {sys.version}, {platform.platform()}\n"]
    lines += traceback.format_exception(err)
    try:
        with tempfile.NamedTemporaryFile("w", prefix="dask-imgcurator-", suffix=".txt", delete=False) as file:
            file.writelines(lines)
    except OSError:
        return f"; this is unexpected: please report it with these lines:\n{''.join(lines)}"
    return f"; this is unexpected: please report it with {file.name}, which contains the traceback"


class PlainGroup(click.Group):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:  # without a command, help is the answer, not an error
            click.echo(ctx.get_help())
            ctx.exit()
        with _plain_errors():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):  # names may contain characters that the terminal cannot show
            sys.stdout.reconfigure(errors="backslashreplace")
        with _stoppable(), _plain_errors(lambda: ctx.invoked_subcommand in _RESUMING):
            return super().invoke(ctx)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Stop cleanly at the first Ctrl-C or SIGTERM, and at once at the second, whatever hangs."""

    def stop(*_: object) -> None:
        _set_handlers(dict.fromkeys(before, at_once))
        raise KeyboardInterrupt

    def at_once(*_: object) -> None:
        os.write(2, b"dask-imgcurator: stopped at once.\n")
        os._exit(FAILED)  # ends its workers too

    try:
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.getsignal(number) for number in signals if signal.getsignal(number) != signal.SIG_IGN}
        _set_handlers(dict.fromkeys(before, stop))
    except ValueError:  # only the main thread may set them
        before = {}
    yield
    _set_handlers(before)  # further signals are ignored while Python shuts down


def _set_handlers(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
