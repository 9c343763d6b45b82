"""Notebook 01: the float networks."""
