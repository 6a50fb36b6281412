"""Rows that are most like a text, an image or a row."""
