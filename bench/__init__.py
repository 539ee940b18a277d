"""Measurements: compiled code, the cost on the host, and speed on a GPU."""
