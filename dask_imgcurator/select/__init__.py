"""Which rows a selection keeps."""
