"""A checkpoint as one file with entropy-coded tensors, and back to the same bytes.

May import: core, checkpoint.
Start at `container.py`, what is in the file; `views.py` and `coding.py` are how a tensor is coded.
"""

from vqllm.archive.container import archive, unarchive

__all__ = ["archive", "unarchive"]
