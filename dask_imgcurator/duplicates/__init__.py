"""Rows that show the same image."""
