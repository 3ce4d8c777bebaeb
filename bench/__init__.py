"""Benchmarks: one question a file, one command each (``python -m bench.throughput``); prints a table and a JSON line.

Figures are ratios within one run where they can be: machines are shared and noisy. Dated results: docs/benchmarks.md.
"""
