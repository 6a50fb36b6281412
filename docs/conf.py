"""Settings of the documentation's build: ``python -m sphinx -W --keep-going -n docs docs/_build/html``."""

from __future__ import annotations

import sys
from pathlib import Path

import dask_imgcurator

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "dask_imgcurator"
author = "The dask_imgcurator developers"
project_copyright = author
version = release = dask_imgcurator.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc", "sphinx_click", "imgcurator_site"]
exclude_patterns = ["_build", "_ext"]

myst_enable_extensions = ["attrs_inline", "deflist"]
myst_heading_anchors = 3

# The docstrings' numpydoc sections tell the types; annotations would say them twice.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
# In numpydoc's style, single backticks name something of Python; what is no entry of the reference stays plain code.
default_role = "py:obj"
smartquotes = False  # 'EXPR' and --option are meant as they stand
nitpicky = True
_ELSEWHERE = r"(?!dask_imgcurator\.).*"
nitpick_ignore_regex = [("py:obj", r".*"), ("py:class", _ELSEWHERE), ("py:exc", _ELSEWHERE)]

html_theme = "furo"
html_title = f"dask_imgcurator {version}"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
