"""The checkpoint format: its specification (`format`), writing, resuming and reading."""
