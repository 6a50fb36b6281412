"""The command line: flags become the arguments of the public functions."""

from __future__ import annotations

import click

from . import checks, scoring, tables
from .errors import PlainGroup


@click.group(
    "imgcurator", cls=PlainGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="dask-imgcurator", prog_name="dask-imgcurator")
def cli() -> None:
    """Curate image datasets: score every image once, decide as often as you like.

    \b
    Try it on sample images:     dask-imgcurator demo
    The whole job in one go:     dask-imgcurator curate 'laion/*.tar' --out curated --min-aesthetic 5
    The same, step by step:      dask-imgcurator score 'laion/*.tar' --out run/scores
                                 dask-imgcurator select run/scores --min-aesthetic 5 --out run/selected
                                 dask-imgcurator write run/selected --out run/shards

    SHARDS are webdataset tars: paths, globs, folders, brace notation ({00000..00127}.tar) or URLs.
    """


for _module in (scoring, tables, checks):
    for _command in vars(_module).values():
        if isinstance(_command, click.Command):
            cli.add_command(_command)


def main() -> None:
    """Run ``dask-imgcurator``."""
    cli(prog_name="dask-imgcurator")
