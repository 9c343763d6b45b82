"""Notebook 04: how far one gets without training."""
