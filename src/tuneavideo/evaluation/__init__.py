"""Metrics of edits, and benchmarks that compare settings."""
