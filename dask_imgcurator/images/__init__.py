"""Bytes to pixels, and measures on pixels."""
