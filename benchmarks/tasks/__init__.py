"""Run published tasks of state tracking and reasoning: `python -m benchmarks.tasks`."""
