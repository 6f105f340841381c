"""Codecs: a tile of weights as integer symbols, and back. One file a codec.

May import: core.
Start at `base.py`, then a short codec such as `d4.py`; `search/` finds nearest points.
"""

from vqllm.codecs import (  # noqa: F401 - importing registers
    additive,
    convolutional,
    d4,
    e8p,
    grouped,
    grouped_kmeans,
    kmeans,
    learned_lattice,
    leech,
    pyramid,
    residual,
    sparse,
    split,
    trellis,
    uniform,
)
from vqllm.codecs.base import CODECS, SearchableCodec

__all__ = ["CODECS", "SearchableCodec"]
