"""Codecs: how a tile of weights becomes integer symbols, and back. One file a codec.

Importing this package registers all of them in `CODECS`.
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
