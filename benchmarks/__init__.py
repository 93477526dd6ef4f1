"""Benchmarks against peers, and what the compiler makes of every kernel without a GPU (offline.py)."""
