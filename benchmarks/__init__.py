"""Measurements, each by one command, compared within one run: `python -m benchmarks [NAME…]` prints JSON lines."""
