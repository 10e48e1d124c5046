"""Benchmarks: quality with its report, speed and memory next to PyTorch's, and the loader."""
