"""Paired benchmarks; each prints a table and returns rows that `python -m benchmarks` stores."""
