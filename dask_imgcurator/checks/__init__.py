"""Checks of results and of the installation, and sample data."""
