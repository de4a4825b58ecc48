"""Experiments: python -m benchmarks list | run NAME | report NAME."""
