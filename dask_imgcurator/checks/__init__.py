"""Is it right, is it installed, does it work."""
