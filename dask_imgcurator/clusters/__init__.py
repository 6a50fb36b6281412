"""Connecting to a Dask cluster, and watching its workers."""
