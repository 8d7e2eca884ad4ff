"""Measurements: a case a file, `python -m benchmarks.<case>`; finished runs are kept in results/, one line each."""
