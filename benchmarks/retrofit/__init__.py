"""Retrofitted pretrained models, on tasks whose number of steps is a dial."""
