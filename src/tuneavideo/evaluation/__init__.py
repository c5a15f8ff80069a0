"""Benchmarks: clips and edits whose results can be compared."""
