"""Benchmarks against peers, and what every kernel compiles to, without a GPU (offline.py)."""
