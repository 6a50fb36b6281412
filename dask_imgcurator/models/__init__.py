"""Pixels to vectors, vectors to scores."""
