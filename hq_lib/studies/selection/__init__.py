"""Notebook 05: the choice of calibration images."""
