"""The seam between CPU and GPU, and where work runs."""
