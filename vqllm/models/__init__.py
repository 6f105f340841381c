"""From what a user names (a hub id, a folder, a GGUF file, demo) to a folder or a loaded model.

May import: core, hf, checkpoint.
Start at `resolve.py`.
"""
