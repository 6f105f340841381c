"""The tokens that a sequence must begin with or may be drawn from, by its tokenizer."""

from typing import Any

import torch
from torch import Tensor


def leading_token(tokenizer: Any) -> int | None:
    """The id that the tokenizer itself puts before every text (its BOS), or None.

    Models trained with such a tokenizer give much of their attention to that token, and have
    unusual activations without it; so every calibration sequence starts with it.
    """
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a", add_special_tokens=False).input_ids[:1] == [bos]:
        return None
    return bos if tokenizer("a").input_ids[:1] == [bos] else None


def ordinary_tokens(tokenizer: Any) -> Tensor:
    """The ids of the vocabulary that are not special tokens, int64 [V], ascending."""
    special = set(tokenizer.all_special_ids)
    special |= {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    return torch.tensor([id_ for id_ in range(len(tokenizer)) if id_ not in special])
