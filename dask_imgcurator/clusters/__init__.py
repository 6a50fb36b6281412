"""A Dask cluster: how it is reached, and what becomes of its workers."""
