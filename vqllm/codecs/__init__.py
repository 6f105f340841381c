"""Codecs: how a tile of weights becomes integer symbols, and back. One file a codec.

Importing this package registers all of them in `CODECS`.
"""

from vqllm.codecs import (  # noqa: F401 - importing registers
    convolutional,
    e8p,
    kmeans,
    learned_lattice,
    pyramid,
    residual,
    trellis,
    uniform,
)
from vqllm.codecs.base import CODECS, SearchableCodec

__all__ = ["CODECS", "SearchableCodec"]
