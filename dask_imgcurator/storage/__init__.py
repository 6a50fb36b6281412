"""Files and tars on any fsspec URL."""
