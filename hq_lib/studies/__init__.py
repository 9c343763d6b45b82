"""The studies of the workbook as plain functions: notebooks call them, and so can a script on any machine.

Each study appends tidy rows to ``data/results/`` as it goes, so that a killed run has lost nothing, and returns them.
"""
