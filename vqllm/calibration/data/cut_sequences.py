"""Token sequences out of text sources, spread evenly over each.

Where in a text the held-out sequences come from does not depend on their length, their number or
the seed: of every `BLOCK_BYTES` of text the last `HELD_OUT_BYTES`, of a shorter text its last
quarter at most. So what one run holds out no other run calibrates on, and a model can be tuned
and measured on other sequences than it was rounded with.

    |---------- calibration ----------|held out|---------- calibration ----------|held out|--- …

A source of more than `WHOLE_BYTES` may be read in parts. Its blocks are counted in bytes of the
source (`TextSource.placed`), which are the same wherever reading begins. Where a calibration or
held-out part ends, a sequence goes on in the next part of the same kind.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqllm.calibration.data.text_sources import TextSource, open_source
from vqllm.calibration.data.vocabulary import leading_token
from vqllm.core import rng
from vqllm.errors import CalibrationError

BLOCK_BYTES = 1 << 18
HELD_OUT_BYTES = 1 << 14
"""About 4,000 tokens: a megabyte of text gives 16 sequences of 1,024 tokens, and loses a sixteenth
of itself."""
FRONT_BYTES = BLOCK_BYTES - HELD_OUT_BYTES
# Up to here a source is tokenized whole: 6 s of one core (0.77 s per MB). Beyond, only what the
# sequences need is read.
WHOLE_BYTES = 8 << 20
# More bytes than a token takes on average, by far: WikiText has 4.3 bytes a token with SmolLM2's
# tokenizer, whose longest token, a run of spaces or signs, has 81.
BYTES_PER_TOKEN = 64
# Bytes for each token of a sequence before the end of its part, where only the sequence is read.
ROOM_PER_TOKEN = 8
# Of a data set that can only be read from its start, this many times the needed text is read, and
# at least one sequence to hold out.
STREAM_FACTOR = 4
PIECE_CHARACTERS = 1 << 14


@dataclass(frozen=True)
class Sequences:
    """int64 [S, L] to calibrate on, and sequences of the same length from other places of the same
    sources to measure on."""

    calibration: Tensor
    held_out: Tensor


def load_tokens(
    sources: str | Path | Sequence[str | Path],
    tokenizer: Any,
    num_sequences: int,
    sequence_length: int,
    seed: int,
    num_held_out: int = 0,
) -> Sequences:
    """Cut sequences out of text.

    Every source gives an equal share of the sequences (the first ones one more where the number
    does not divide), however long it is. A source is divided into as many equal parts as it gives
    sequences, and one sequence starts at a place in each part that the seed decides; sequences do
    not overlap. Text is tokenized without special tokens; where the tokenizer itself puts a token
    before every text, each sequence starts with that token.

    Args:
        sources: what `vqllm.calibration.data.text_sources.open_source` takes, one or several.
        seed: decides, with the place of a source among the `sources`, where in its part of the
            text each sequence starts. The name of a file and its folder do not matter.
        num_held_out: sequences to hold out; fewer where a source has no more of them, but at least
            one.

    Returns:
        sequences of `sequence_length`, source by source, in the order of the text.

    Raises:
        CalibrationError: a source that cannot be read, or with too little text.
    """
    names = [sources] if isinstance(sources, str | Path) else list(sources)
    first = leading_token(tokenizer)
    length = sequence_length - (first is not None)
    calibration, held_out = [], []
    for index, name in enumerate(names):
        places = []
        for total, purpose in ((num_sequences, "windows"), (num_held_out, "held out")):
            share = total // len(names) + (index < total % len(names))
            # By its place in the list: the same text has the same sequences wherever it lies.
            generator = rng.generator(seed, f"source {index}", purpose)
            places.append(torch.rand(share, generator=generator, dtype=torch.float64))
        if any(len(places_S) for places_S in places):
            source = open_source(name)
            own = _cut(source, tokenizer, length, *places)
            _refuse_blank(source, tokenizer, own)
            calibration.append(own.calibration)
            held_out.append(own.held_out)
    return Sequences(_with_first(calibration, first), _with_first(held_out, first))


def _refuse_blank(source: TextSource, tokenizer: Any, sequences: Sequences) -> None:
    """Raise CalibrationError for text of blanks and line ends alone: it has tokens, and says
    nothing about the inputs that a model really gets."""
    tokens = torch.cat([sequences.calibration, sequences.held_out])
    # A sequence may begin or end in a character of several tokens, which is decoded to U+FFFD.
    if len(tokens) and not any(
        tokenizer.decode(own).strip(" \n\t\ufffd").strip() for own in tokens
    ):
        raise CalibrationError(
            f"{source.name} is blank where sequences were taken: nothing but spaces and line ends. "
            "Give text that is like what the model will read."
        )


def _with_first(parts: Sequence[Tensor], first: int | None) -> Tensor:
    tokens_SL = torch.cat(list(parts))
    if first is None:
        return tokens_SL
    return torch.cat([torch.full((len(tokens_SL), 1), first), tokens_SL], dim=1)


def _cut(
    source: TextSource, tokenizer: Any, length: int, places_S: Tensor, held_out_S: Tensor
) -> Sequences:
    """Sequences of one source; a place u in [0, 1) says where in its part a sequence starts."""
    num, num_held_out = len(places_S), len(held_out_S)
    # In a source of so many tokens every sequence has room; a sixteenth of a source is held out.
    needed = max(num, num_held_out * BLOCK_BYTES // HELD_OUT_BYTES) * length
    enough = None
    if source.num_bytes is None:
        enough = (STREAM_FACTOR * num * length, min(1, num_held_out) * length)
    elif source.num_bytes > max(WHOLE_BYTES, BYTES_PER_TOKEN * needed):
        return _cut_far_apart(source, tokenizer, length, places_S, held_out_S)
    calibration_T, held_out_T = _tokens(source, tokenizer, enough)
    if len(calibration_T) < num * length:
        raise _too_little(source, len(calibration_T), len(held_out_T), num, length)
    available = min(num_held_out, len(held_out_T) // length)
    if num_held_out and not available:
        raise CalibrationError(
            f"{source.name} has too little text: a part of it is held out to measure on, here "
            f"{len(held_out_T)} tokens, which is less than one sequence of {length}. Add text, or "
            "lower calibration.length."
        )
    return Sequences(
        _spread(calibration_T, length, places_S),
        _spread(held_out_T, length, held_out_S[:available]),
    )


def _spread(tokens_T: Tensor, length: int, places_S: Tensor) -> Tensor:
    """int64 [S, length]: one sequence out of each of S equal parts."""
    sequences = torch.empty(len(places_S), length, dtype=torch.long)
    for i, place in enumerate(places_S.tolist()):
        part = len(tokens_T) // len(places_S)
        start = i * part + int(place * (part - length + 1))
        sequences[i] = tokens_T[start : start + length]
    return sequences


def _cut_far_apart(
    source: TextSource, tokenizer: Any, length: int, places_S: Tensor, held_out_S: Tensor
) -> Sequences:
    """The same where the parts are so long that only the sequences themselves are read."""
    num_blocks = (source.num_bytes or 0) // BLOCK_BYTES
    parts = []
    for is_held_out, places in ((False, places_S), (True, held_out_S)):
        first, size = (FRONT_BYTES, HELD_OUT_BYTES) if is_held_out else (0, FRONT_BYTES)
        size = max(0, size - ROOM_PER_TOKEN * length)
        sequences = torch.empty(len(places), length, dtype=torch.long)
        for i, place in enumerate(places.tolist()):
            # The first half of each part: what follows is long enough, and of this part.
            blocks = (i + place / 2) / len(places) * num_blocks
            start = int(blocks) * BLOCK_BYTES + first + int(blocks % 1 * size)
            own = (piece for piece in _marked(source, start) if piece[0] == is_held_out)
            tokens = _first_tokens(own, tokenizer, length)
            if len(tokens) < length:
                raise _too_little(source, len(tokens), 0, 1, length)
            sequences[i] = torch.tensor(tokens[:length])
        parts.append(sequences)
    return Sequences(*parts)


def _first_tokens(pieces: Iterator[tuple[bool, str]], tokenizer: Any, num: int) -> list[int]:
    """At least the first `num` tokens of a text that has so many."""
    tokens: list[int] = []
    for _, text in _joined(pieces):
        tokens += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if len(tokens) >= num:
            break
    return tokens


def _tokens(
    source: TextSource, tokenizer: Any, enough: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """The tokens of a text, int64 [T] each: those to calibrate on and those held out; all of them,
    or a few more than `enough` of both."""
    both: tuple[list[int], list[int]] = ([], [])
    for is_held_out, text in _joined(_marked(source)):
        both[is_held_out].extend(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        if enough and all(len(tokens) >= num for tokens, num in zip(both, enough)):
            break
    calibration, held_out = (torch.tensor(tokens, dtype=torch.long) for tokens in both)
    return calibration, held_out


def _marked(source: TextSource, start: int = 0) -> Iterator[tuple[bool, str]]:
    """The text from a place on, cut where held-out parts begin and end; each piece with whether it
    is of a held-out part. `start` is 0 for sources of at most `WHOLE_BYTES`."""
    if source.num_bytes is not None and source.num_bytes > WHOLE_BYTES:
        return _divided(source.placed(start), start, FRONT_BYTES, BLOCK_BYTES)
    # A text shorter than a block holds out its last quarter at most, so its length must be known:
    # up to a block of it is read in advance.
    pieces = source.pieces()
    first, size = [], 0
    for piece in pieces:
        first.append(piece)
        size += len(piece.encode())
        if size >= BLOCK_BYTES:
            break
    front, end = FRONT_BYTES, BLOCK_BYTES
    if size < BLOCK_BYTES:
        front, end = size - min(HELD_OUT_BYTES, size // 4), size
    return _divided(_counted(chain(first, pieces)), 0, front, end)


def _counted(pieces: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Pieces with the byte of the text at which each begins."""
    place = 0
    for piece in pieces:
        yield place, piece
        place += len(piece.encode())


def _divided(
    placed: Iterable[tuple[int, str]], start: int, front: int, end: int
) -> Iterator[tuple[bool, str]]:
    """A text from the place `start` on, cut into pieces with a mark: of every `end` bytes those
    from `front` on are held out."""
    for place, piece in placed:
        # `at` counts bytes of the source; each turn cuts off the rest up to the next edge.
        at = max(place, start)
        rest = piece.encode()[at - place :]
        while rest:
            is_held_out = at % end >= front
            num = (end if is_held_out else front) - at % end
            # A character on an edge is left out.
            yield is_held_out, rest[:num].decode(errors="ignore")
            at += num
            rest = rest[num:]


def _joined(pieces: Iterable[tuple[bool, str]]) -> Iterator[tuple[bool, str]]:
    """Short pieces of one mark joined to at least `PIECE_CHARACTERS`, so that the tokenizer is
    called for few texts."""
    for mark, same in groupby(pieces, key=itemgetter(0)):
        waiting: list[str] = []
        size = 0
        for _, piece in same:
            waiting.append(piece)
            size += len(piece)
            if size >= PIECE_CHARACTERS:
                yield mark, "".join(waiting)
                waiting, size = [], 0
        if waiting:
            yield mark, "".join(waiting)


def _too_little(
    source: TextSource, found: int, held_out: int, num: int, length: int
) -> CalibrationError:
    beside = f" (beside {held_out} that are held out to measure on)" if held_out else ""
    return CalibrationError(
        f"{source.name} has too little text: {found} tokens{beside}, needed are {num * length} "
        f"({num} sequences of {length}). Add text, or lower calibration.sequences or "
        "calibration.length."
    )
