"""Errors as the user sees them: a line and an exit code."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

USAGE, FAILED = 2, 1

#: Commands that take over what an earlier run finished.
_RESUMING = ("curate", "score", "write", "demo")


class Failure(click.ClickException):
    """An error as the user sees it: what failed and what to do; no traceback, no usage text."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]

    def show(self, file: Any = None) -> None:
        click.echo(f"dask-imgcurator: {self.format_message()}", file=file or sys.stderr, err=file is None)


@contextlib.contextmanager
def _plain_errors(resumes: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn errors that a user can fix into a line and an exit code; `resumes`: rerunning the command resumes."""
    from ..engine.backend import BackendError
    from ..engine.run import JobError
    from ..models.weights import WeightsError
    from ..storage.tar_copy import WriteError

    def kept(space: str) -> str:
        return f"{space}What is finished is kept: the same command goes on from there." if resumes() else ""

    try:
        yield
    except click.UsageError as err:
        command = err.ctx.command_path if err.ctx else "dask-imgcurator"
        raise Failure(f"{err.format_message()} (see {command} --help)", USAGE) from None
    except (JobError, WeightsError, WriteError) as err:
        raise Failure(f"{err}{kept(chr(10))}", FAILED) from None
    except (
        BackendError,
        FileNotFoundError,
        FileExistsError,
        NotADirectoryError,
        ModuleNotFoundError,
        ValueError,
    ) as err:
        raise Failure(_text(err), USAGE) from None
    except OSError as err:
        raise Failure(_text(err), FAILED) from None
    except KeyboardInterrupt:
        raise Failure(f"stopped.{kept(' ')}", FAILED) from None


def _text(err: BaseException) -> str:
    if isinstance(err, OSError) and err.strerror and err.filename:
        return f"{err.strerror}: {err.filename}"
    return str(err) or type(err).__name__


class Group(click.Group):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with _plain_errors():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        with contextlib.suppress(ValueError):  # Only the main thread may set it.
            signal.signal(signal.SIGTERM, stop)
        with _plain_errors(lambda: ctx.invoked_subcommand in _RESUMING):
            return super().invoke(ctx)
