"""Notebook 07: the same integers everywhere."""
