"""Whole jobs, as the command line runs them."""
