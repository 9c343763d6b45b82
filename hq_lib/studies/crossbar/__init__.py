"""Notebook 08: what analog arrays cost."""
