"""Curate image datasets with Dask: a shard is a partition, an image is a row, curation is a DataFrame query.

Importing this package loads neither torch nor cudf.
"""

from importlib.metadata import version as _version

from . import config as _config  # noqa: F401  (registers the defaults)
from .cluster import start_client
from .collection import embed, read_scores, read_webdataset, score_aesthetic, score_nsfw, to_webdataset
from .filters import filter_frame
from .head_files import save_head
from .job import curate, score_shards, select_rows, write_selection
from .text_steps import caption_stats, embed_text, score_clip, score_head, score_prompts

__all__ = [
    "caption_stats",
    "curate",
    "embed",
    "embed_text",
    "filter_frame",
    "read_scores",
    "read_webdataset",
    "save_head",
    "score_aesthetic",
    "score_clip",
    "score_head",
    "score_nsfw",
    "score_prompts",
    "score_shards",
    "select_rows",
    "start_client",
    "to_webdataset",
    "write_selection",
]

__version__ = _version("dask-imgcurator")
