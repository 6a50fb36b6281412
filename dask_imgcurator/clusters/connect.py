"""Connect to a running scheduler, and check that it and its workers have what a run needs."""

from __future__ import annotations

import json
import re
import socket
import ssl
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from distributed import Client
from distributed.security import Security

from .faults import JobError
from .watch import ask

#: Seconds to wait for an answer.
_PATIENCE = 10

_PACKAGE = "dask-imgcurator"

#: Extras of this package without which a worker can read less than others.
_EXTRAS = ("formats", "remote", "text", "search")

_TLS = "--tls-ca-file, --tls-cert, --tls-key, or Dask's settings distributed.comm.tls"


def connect(scheduler: str) -> Client:
    """Connect to a scheduler, given its address or the file that it wrote; OSError if it does not answer."""
    address = _address(scheduler)
    _greet(address)
    try:
        client = Client(address, timeout=f"{_PATIENCE}s")
    except ValueError as err:
        raise ValueError(f"scheduler={scheduler!r}: {err}; write for example tcp://10.0.0.1:8786") from err
    try:
        require_package(client)
    except JobError:
        client.close()
        raise
    return client


def _address(scheduler: str) -> str:
    if "://" in scheduler or not Path(scheduler).is_file():
        return scheduler
    try:
        return str(json.loads(Path(scheduler).read_text())["address"])
    except (ValueError, LookupError, TypeError):
        raise ValueError(
            f"{scheduler} holds no scheduler's address: give the file of dask scheduler --scheduler-file"
        ) from None


def _greet(address: str) -> None:
    """Connect as Dask will; its client says little about certificates that do not match, or waits forever."""
    parts = urlsplit(address)
    if parts.scheme not in ("tcp", "tls") or parts.hostname is None or parts.port is None:
        return
    context = None
    if parts.scheme == "tls":
        try:
            context = Security().get_connection_args("client").get("ssl_context")
        except OSError as err:  # from ssl, which names no file
            raise ValueError(f"{address}: the certificates cannot be used ({err}): see {_TLS}") from err
        if context is None:
            raise ValueError(f"{address} needs certificates: {_TLS}")
    try:
        with socket.create_connection((parts.hostname, parts.port), _PATIENCE) as connection:
            if context is not None:
                connection = context.wrap_socket(connection, server_hostname=parts.hostname)
            with connection:
                connection.recv(1)  # a scheduler speaks first, and refuses a certificate only now
    except ssl.SSLError as err:
        raise ConnectionError(f"{address}: the certificates do not fit ({err.reason or err}): see {_TLS}") from err
    except TimeoutError as err:
        other = "; perhaps it wants tls://" if context is None else ""
        raise TimeoutError(f"{address} does not answer as a Dask scheduler does{other}") from err
    except OSError as err:
        raise ConnectionError(f"no scheduler answers at {address}: {err}") from err


# --- what is installed there ----------------------------------------------------------------------


def require_package(client: Client) -> None:
    """Raise `JobError` if the scheduler or a worker lacks this package."""
    # Ask with a standard-library function: without the package, a worker could not unpickle one of ours.
    lacks = f"lacks the package {_PACKAGE}: install version {version(_PACKAGE)} there, as everywhere in the cluster"
    if isinstance(_try(lambda: client.run_on_scheduler(version, _PACKAGE)), PackageNotFoundError):
        raise JobError(f"the scheduler at {client.scheduler.address} {lacks} (it unpacks what a run sends)")
    found = ask(lambda: client.run(version, _PACKAGE, on_error="return")) or {}
    if without := [worker for worker, there in found.items() if isinstance(there, PackageNotFoundError)]:
        more = f" (and {len(without) - 1} more)" if len(without) > 1 else ""
        raise JobError(f"the worker {without[0]}{more} {lacks}")


def lacking(client: Client) -> list[str]:
    """Notes for the user about workers that lack an extra that this machine has."""
    mine, notes = set(extras()), []
    for worker, theirs in (ask(lambda: client.run(extras, on_error="return")) or {}).items():
        if isinstance(theirs, list) and (missing := sorted(mine - set(theirs))):
            notes.append(f"The worker {worker} lacks {', '.join(missing)}, which this machine has: it reads less.")
    return [*notes[:3], *([f"So do {len(notes) - 3} other workers."] if len(notes) > 3 else [])]


def _try(question: Callable[[], Any]) -> Any:
    """Ask, and return the error if it fails."""

    def answer() -> Any:
        try:
            return question()
        except Exception as err:
            return err

    return ask(answer)


def extras() -> list[str]:
    """Packages of this package's extras that are installed here."""
    found = []
    for line in requires(_PACKAGE) or ():
        if re.search(rf"extra == ['\"]({'|'.join(_EXTRAS)})['\"]", line):
            name = re.split(r"[^\w.-]", line)[0]
            try:
                version(name)
            except PackageNotFoundError:
                continue
            found.append(name)
    return found
