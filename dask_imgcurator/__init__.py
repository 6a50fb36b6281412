"""Curate image datasets with Dask."""
