"""Notebook 02: what folding batch norms does."""
