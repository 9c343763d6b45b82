"""Notebook 03: training through the quantizer."""
