"""Pages, tables and plots about a run. Pure functions of its records.

May import: core.
Start at `summary.py`.
"""
