"""Groups of options that several commands share, and their conversion to arguments."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

TIERS = ("exact", "perceptual", "semantic")


def _group(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def dtype_option(default: str) -> Callable[[Any], Any]:
    return click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        help=f"Precision of the encoder. [default: {default}]",
    )


encoder_options = _group(
    click.option(
        "--model",
        metavar="NAME",
        help="Name of an open_clip model (ViT-L-14, ViT-B-32 …), or 'starter': a preview that needs no download. "
        "[default: OpenAI's ViT-L-14; the starter if its weights are unavailable]",
    ),
    click.option(
        "--pretrained",
        metavar="TAG|PATH",
        help="open_clip's tag for the weights, or a checkpoint's path; 'random:SEED' for benchmarks.",
    ),
    click.option(
        "--aesthetic-head",
        metavar="NAME",
        default="auto",
        show_default=True,
        help="Head for aesthetic_score, or 'none'; 'auto' selects the one trained on the model.",
    ),
    click.option(
        "--nsfw-head", metavar="NAME", default="auto", show_default=True, help="Head for nsfw_score, or 'none'."
    ),
    click.option(
        "--weights-dir",
        metavar="DIR",
        type=click.Path(),
        help="Folder with the heads' published files, searched before the cache and the network.",
    ),
    click.option(
        "--column",
        "columns",
        metavar="[COLUMN=]FIELD[:TYPE]",
        multiple=True,
        help="Field of the samples' .json to keep as a column, under its own or another name (original_width=width); "
        "TYPE is string, int64, float64 or bool; repeatable. [default type: one that holds all values]",
    ),
    click.option(
        "--caption",
        metavar="FIELD|EXT",
        help="Field of the .json, or text member (en.txt), that holds the caption, instead of the .txt member.",
    ),
    click.option(
        "--image",
        metavar="EXT",
        multiple=True,
        help="Extension of the image member (jpg, seg.png …) if a sample has several; repeatable, preferred first.",
    ),
    click.option(
        "--batch-size",
        metavar="N",
        type=click.IntRange(1),
        help="Images per forward pass. [default: 16 on a CPU, 512 on a GPU]",
    ),
)

model_options = _group(
    encoder_options,
    dtype_option("the fastest that the processor supports"),
    click.option(
        "--measures/--no-measures",
        default=True,
        show_default=True,
        help="Add columns of technical quality (brightness, blur …) and a perceptual hash.",
    ),
)


class Json(click.ParamType):
    """A JSON object, or ``@FILE`` with one."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        try:
            text = Path(value[1:]).read_text() if value.startswith("@") else value
            parsed = json.loads(text)
        except (OSError, ValueError) as err:
            self.fail(f"cannot be read as JSON ({err}): write for example '{{\"anon\": true}}', or @FILE", param, ctx)
        if not isinstance(parsed, dict):
            self.fail(f"{value!r} is not a JSON object: write for example '{{\"anon\": true}}'", param, ctx)
        return parsed


storage_option = click.option(
    "--storage-options",
    metavar="JSON",
    type=Json(),
    help="For URLs (s3://, gs://, https:// …): options of the fsspec file system, as JSON or @FILE.",
)
remote_options = _group(
    storage_option,
    click.option(
        "--out-options",
        metavar="JSON",
        type=Json(),
        help="The same for the output folder (verify: DIR). [default: as --storage-options]",
    ),
)


def remote(options: dict[str, Any]) -> dict[str, Any]:
    """Default the output's options to the input's."""
    return {**options, "out_options": options["out_options"] or options["storage_options"]}


_where = _group(
    click.option(
        "--where",
        metavar="EXPR",
        help="Images to keep: an expression on the columns, such as 'aesthetic_score >= 5 and width >= 512'.",
    ),
    click.option("--min-aesthetic", metavar="X", type=float, help="Short for --where 'aesthetic_score >= X'."),
    click.option("--max-nsfw", metavar="X", type=float, help="Short for --where 'nsfw_score < X'."),
)


def where_options(command: Any) -> Any:
    """Options for which images to keep; the command receives one expression, `where`."""

    @functools.wraps(command)
    def combined(
        *args: Any, where: str | None, min_aesthetic: float | None, max_nsfw: float | None, **rest: Any
    ) -> Any:
        from ..select.where import combine

        return command(*args, where=combine(where, min_aesthetic, max_nsfw), **rest)

    return _where(combined)


#: The same as separate arguments.
threshold_options = _where


def _step(name: str, metavar: str, text: str, parse: Callable[..., Any], number: bool = False) -> Callable[[Any], Any]:
    """An option that adds a step to the selection, in the order in which the options are given."""

    def add(context: click.Context, _: click.Parameter, values: tuple[Any, ...]) -> None:
        context.meta.setdefault("steps", []).extend((parse, value) for value in values)

    return click.option(
        name,
        metavar=metavar,
        multiple=True,
        type=float if number else None,
        callback=add,
        expose_value=False,
        help=text,
    )


def _where_step(text: str) -> Any:
    from ..select.where import parse_where

    return parse_where(text)


def _listed_step(keep: bool) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        from ..select.steps import parse_listed

        return parse_listed(text, keep, click.get_current_context().params.get("storage_options"))

    return parse


def _threshold(column: str) -> Callable[[float], Any]:
    def parse(value: float) -> Any:
        from ..select.where import combine

        return _where_step(str(combine(None, value) if column == "aesthetic_score" else combine(None, None, value)))

    return parse


def _ranked(word: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        from ..select.steps import parse_sample, parse_top

        return parse_top(text) if word == "top" else parse_sample(text)

    return parse


_steps = _group(
    _step(
        "--where",
        "EXPR",
        "Keep rows that match an expression on the columns: 'aesthetic_score >= 5 and width >= 512'; repeatable.",
        _where_step,
    ),
    _step(
        "--min-aesthetic", "X", "Short for --where 'aesthetic_score >= X'.", _threshold("aesthetic_score"), number=True
    ),
    _step("--max-nsfw", "X", "Short for --where 'nsfw_score < X'.", _threshold("nsfw_score"), number=True),
    _step(
        "--top",
        "STEP",
        "Keep the best remaining rows: '30% by clip_score', '10000 by aesthetic_score'; repeatable.",
        _ranked("top"),
    ),
    _step(
        "--sample",
        "STEP",
        "Keep a random sample of the remaining rows: '10000', '10% seed 1', '20 by cluster'; repeatable.",
        _ranked("sample"),
    ),
    _step(
        "--only",
        "[COLUMN=]FILE",
        "Keep only the rows whose key (or COLUMN) is listed in FILE; repeatable.",
        _listed_step(True),
    ),
    _step(
        "--exclude",
        "[COLUMN=]FILE",
        "Drop the rows whose key (or COLUMN) is listed in FILE; repeatable.",
        _listed_step(False),
    ),
)


def steps_options(command: Any) -> Any:
    """Options for which rows to keep; the command receives `steps`, in the order of their first appearance."""

    @functools.wraps(command)
    def ordered(*args: Any, **rest: Any) -> Any:
        given = click.get_current_context().meta.get("steps", [])
        return command(*args, steps=[parse(value) for parse, value in given], **rest)

    return _steps(ordered)


pack_options = _group(
    click.option(
        "--max-count",
        metavar="N",
        type=click.IntRange(1),
        default=10_000,
        show_default=True,
        help="Maximum number of samples per curated shard.",
    ),
    click.option(
        "--max-size",
        metavar="SIZE",
        default="1GB",
        show_default=True,
        help="Maximum size of a curated shard (500MB, 1GiB).",
    ),
)


def cluster_options_with(workers: str) -> Callable[[Any], Any]:
    """Options for where a command runs; `workers` describes the default of --n-workers."""
    return _group(
        click.option(
            "--backend",
            type=click.Choice(["auto", "cudf", "pandas"]),
            help="Where to compute. [default: auto: a GPU if there is one]",
        ),
        click.option(
            "--scheduler",
            metavar="ADDRESS",
            help="Run on a Dask cluster: its scheduler's address, tcp://host:8786. [default: DASK_SCHEDULER_ADDRESS]",
        ),
        click.option(
            "--scheduler-file",
            metavar="FILE",
            type=click.Path(exists=True, dir_okay=False),
            help="File with the address, written by dask scheduler --scheduler-file.",
        ),
        *(
            click.option(f"--tls-{name}", metavar="FILE", type=click.Path(exists=True, dir_okay=False), help=help_)
            for name, help_ in (
                ("ca-file", "For tls:// schedulers: certificate of the authority that signed the scheduler's."),
                ("cert", "The same: certificate of this client."),
                ("key", "The same: key of this certificate."),
            )
        ),
        click.option(
            "--n-workers",
            metavar="N",
            type=click.IntRange(1),
            help=f"Worker processes on this machine. [default: {workers}]",
        ),
    )


cluster_options = cluster_options_with("one per GPU; on a CPU one per core with 4 GB")
light_options = cluster_options_with("none: threads of this process")

resume_option = click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Reuse what an earlier run with the same settings finished.",
)
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace any other result in the output folder completely. [default: refuse]"
)
missing_option = click.option(
    "--allow-missing", is_flag=True, help="Exit with 0 even if some shards cannot be read. [default: exit with 1]"
)
log_option = click.option(
    "--log",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Append events to a file, one JSON object per line.",
)
quiet_option = click.option("--quiet", "-q", is_flag=True, help="Print neither progress nor a summary.")
limit_option = click.option(
    "--limit",
    metavar="N",
    type=click.IntRange(1),
    help="Only the first N shards, for a first look; a later run without the option reuses them.",
)
shards_argument = click.argument("shards", nargs=-1, required=True, metavar="SHARDS...")
scores_argument = click.argument("scores", nargs=-1, required=True, metavar="SCORES...")


# --- from options to arguments --------------------------------------------------------------------


def given_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The given options, with where to run as `client`; the functions have their own defaults."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    address, file, n_workers = (given.pop(name, None) for name in ("scheduler", "scheduler_file", "n_workers"))
    scheduler = address or file
    if address and file:
        raise click.UsageError("--scheduler and --scheduler-file: give one of them")
    if tls := {name: given.pop(f"tls_{name}") for name in ("ca_file", "cert", "key") if f"tls_{name}" in given}:
        _use_certificates(tls, scheduler)
    if scheduler is not None and n_workers is not None:
        raise click.UsageError(
            f"--n-workers is for a new cluster; the scheduler at {scheduler} has its own workers: give one of them"
        )
    return given | ({"client": scheduler or n_workers} if scheduler or n_workers else {})


def _use_certificates(tls: Mapping[str, str], scheduler: str | None) -> None:
    import dask

    if scheduler is None and dask.config.get("scheduler-address", None) is None:
        raise click.UsageError("--tls-ca-file, --tls-cert and --tls-key are for a scheduler: give its --scheduler too")
    own = {f"distributed.comm.tls.client.{name}": path for name, path in tls.items() if name != "ca_file"}
    dask.config.set(own | ({"distributed.comm.tls.ca-file": tls["ca_file"]} if "ca_file" in tls else {}))


def asked_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The given options without unset flags."""
    return {name: value for name, value in given_of(options).items() if value is not False}
