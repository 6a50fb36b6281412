"""Whole jobs, as the command line calls them."""
