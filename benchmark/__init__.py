"""Benchmarks: what inference and training cost, in time, positions and FLOPs."""
