"""Token sequences out of text sources, spread evenly over each."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqllm import rng
from vqllm.calibration.vocabulary import leading_token
from vqllm.errors import CalibrationError
from vqllm.texts import TextSource, open_source

# Up to here a source is tokenized whole: 6 s of one core (0.77 s per MB). Beyond, only what the
# sequences need is read.
WHOLE_BYTES = 8 << 20
# Text that yields a token with much to spare: WikiText takes 4.3 bytes a token with SmolLM2's
# tokenizer, whose longest token, a run of spaces or signs, is 81.
BYTES_PER_TOKEN = 64
# Of a data set that can only be read from its start, this many times the needed text is read.
STREAM_FACTOR = 4
PIECE_CHARACTERS = 1 << 14


def load_tokens(
    sources: str | Path | Sequence[str | Path],
    tokenizer: Any,
    num_sequences: int,
    sequence_length: int,
    seed: int,
) -> Tensor:
    """Cut sequences out of text.

    Every source gives an equal share of the sequences (the first ones one more where the number
    does not divide), however long it is. A source is divided into as many equal parts as it gives
    sequences, and one sequence starts at a place in each part that the seed decides; sequences do
    not overlap. Text is tokenized without special tokens; where the tokenizer itself puts a token
    before every text, each sequence starts with that token.

    Args:
        sources: what `vqllm.texts.open_source` takes, one or several.
        seed: decides where in its part of the text each sequence starts.

    Returns:
        int64 [num_sequences, sequence_length], source by source, in the order of the text.

    Raises:
        CalibrationError: a source that cannot be read, or with too little text.
    """
    names = [sources] if isinstance(sources, str | Path) else list(sources)
    first = leading_token(tokenizer)
    length = sequence_length - (first is not None)
    parts = []
    for index, name in enumerate(names):
        share = num_sequences // len(names) + (index < num_sequences % len(names))
        generator = rng.generator(seed, f"{index} {name}", "windows")
        places_S = torch.rand(share, generator=generator, dtype=torch.float64)
        if share:
            parts.append(_cut(open_source(name), tokenizer, length, places_S))
    tokens_SL = torch.cat(parts)
    if first is None:
        return tokens_SL
    return torch.cat([torch.full((len(tokens_SL), 1), first), tokens_SL], dim=1)


def _cut(source: TextSource, tokenizer: Any, length: int, places_S: Tensor) -> Tensor:
    """int64 [S, length] from one source; place u in [0, 1) is where in its part a sequence is."""
    needed = len(places_S) * length
    limit = None
    if source.num_bytes is None:
        limit = STREAM_FACTOR * needed
    elif source.num_bytes > max(WHOLE_BYTES, BYTES_PER_TOKEN * needed):
        return _cut_far_apart(source, tokenizer, length, places_S)
    tokens_T = _tokens(source, source.pieces(), tokenizer, limit)
    if len(tokens_T) < needed:
        raise _too_little(source, len(tokens_T), len(places_S), length)
    part = len(tokens_T) // len(places_S)
    starts = [
        i * part + int(place * (part - length + 1)) for i, place in enumerate(places_S.tolist())
    ]
    return torch.stack([tokens_T[start : start + length] for start in starts])


def _cut_far_apart(source: TextSource, tokenizer: Any, length: int, places_S: Tensor) -> Tensor:
    """The same where the parts are so long that only the sequences themselves are read."""
    sequences = []
    for i, place in enumerate(places_S.tolist()):
        # The first half of each part: what follows is long enough, and of this part.
        start = (i + place / 2) / len(places_S)
        tokens_T = _tokens(source, source.pieces(start), tokenizer, length)
        if len(tokens_T) < length:
            raise _too_little(source, len(tokens_T), 1, length)
        sequences.append(tokens_T[:length])
    return torch.stack(sequences)


def _tokens(source: TextSource, pieces: Iterator[str], tokenizer: Any, limit: int | None) -> Tensor:
    """The tokens of the text, int64 [T]: all of them, or a few more than `limit`."""
    found: list[int] = []
    for piece in _joined(pieces):
        found += tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
        if limit is not None and len(found) >= limit:
            break
    return torch.tensor(found, dtype=torch.long)


def _joined(pieces: Iterator[str]) -> Iterator[str]:
    """Short pieces joined to at least `PIECE_CHARACTERS`, so that few are tokenized apart."""
    waiting: list[str] = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= PIECE_CHARACTERS:
            yield "".join(waiting)
            waiting, size = [], 0
    if waiting:
        yield "".join(waiting)


def _too_little(source: TextSource, found: int, num: int, length: int) -> CalibrationError:
    return CalibrationError(
        f"{source.name} has too little text: {found} tokens, needed are {num * length} ({num} "
        f"sequences of {length}). Add text, or lower calibration.sequences or calibration.length."
    )
