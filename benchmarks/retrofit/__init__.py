"""Retrofit pretrained models, and test them on tasks whose number of steps can be set."""
