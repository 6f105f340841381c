"""The checkpoint on disk: its format, reading and writing it; `resume/` is how a run goes on.

May import: core, foreign, hf.
Start at `format.py`, the specification.
"""
