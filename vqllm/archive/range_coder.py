"""The range coder of the package `constriction`, which is only needed here.

Bamler, "Understanding entropy coding with asymmetric numeral systems", arXiv 2201.01741, describes
the package.
"""

from typing import Any

import numpy as np

from vqllm.errors import VqllmError


def range_encoded(symbols: list[np.ndarray], weights_KA: np.ndarray) -> bytes:
    """A stream of the symbols of each class, each with its histogram, one after the other."""
    stream = _library().stream
    encoder = stream.queue.RangeEncoder()
    for own, weights_A in zip(symbols, weights_KA, strict=True):
        if len(own):
            encoder.encode(own.astype(np.int32), _model(stream, weights_A))
    return encoder.get_compressed().astype("<u4").tobytes()


def range_decoded(data: bytes, sizes: list[int], weights_KA: np.ndarray) -> list[np.ndarray]:
    """The symbols of each class, `sizes` of them."""
    stream = _library().stream
    decoder = stream.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))
    return [
        decoder.decode(_model(stream, weights_A), size).astype(np.uint16)
        if size
        else np.zeros(0, np.uint16)
        for size, weights_A in zip(sizes, weights_KA, strict=True)
    ]


def _model(stream: Any, weights_A: np.ndarray) -> Any:
    # It wants two symbols at least; a second one that never comes takes 2^-24 of the range.
    if len(weights_A) == 1:
        weights_A = np.append(weights_A, 1.0)
    return stream.model.Categorical(weights_A.astype(np.float32), perfect=False)


def check_installed() -> None:
    """VqllmError if the package is not installed."""
    _library()


def _library() -> Any:
    try:
        import constriction
    except ImportError as error:
        raise VqllmError(
            'archives need the package constriction: pip install "vqllm[archive]"'
        ) from error
    return constriction
