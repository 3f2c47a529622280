"""Benchmarks under pytest-benchmark: `pytest benchmarks/`, then `python -m benchmarks.report` (see conftest.py)."""
