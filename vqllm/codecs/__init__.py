"""Codecs: how a tile of weights becomes integer symbols, and back. One file a codec.

Importing this package registers all of them in `CODECS`.
"""

from vqllm.codecs import e8p, kmeans, residual, trellis, uniform  # noqa: F401 - importing registers
from vqllm.codecs.base import CODECS, SearchableCodec

__all__ = ["CODECS", "SearchableCodec"]
