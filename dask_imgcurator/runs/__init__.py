"""The plan of a run, and the records in its folder."""
