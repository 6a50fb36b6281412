"""Score tables in other projects' layouts."""
