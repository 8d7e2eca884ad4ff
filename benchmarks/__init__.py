"""Measure what feedback costs and buys: a case in each file, run by `python -m benchmarks.<case>`.

Finished runs are kept in results/, one in each line.
"""
