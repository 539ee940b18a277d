"""The memory that ops need on a CPU."""
