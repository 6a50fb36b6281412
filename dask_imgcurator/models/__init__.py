"""Models: pixels to vectors, vectors to scores."""


class ModelError(ValueError):
    """A model, its weights or its dtype cannot be used."""
