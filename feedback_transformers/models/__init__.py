"""The model code: flat, because every file here travels inside a Hub checkpoint and nothing else does."""
