"""`python -m feedback_transformers` is `feedback-transformers`."""

from .cli import main

main()
