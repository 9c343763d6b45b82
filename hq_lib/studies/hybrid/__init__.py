"""Notebook 06: bits where they count."""
