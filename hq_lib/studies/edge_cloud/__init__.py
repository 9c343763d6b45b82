"""Notebook 09: a network cut in two."""
