"""Bytes to pixels, and what is measured on them."""
