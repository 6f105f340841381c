"""The model's own samples as calibration text: no download, no licence, and it suits any model.

Source: LLM-QAT, arXiv 2305.17888, section 2.1: text that the model generates from a random first
token calibrates better than real text of another distribution. It takes 3 to 5 greedy tokens
before it samples; here all are sampled at temperature 1 from the whole distribution, so that
tokens of the sequence have the model's own distribution from the second on.

    [BOS]  random token  sample  sample  …  EOS  random token  sample  …

A sequence starts with BOS if the tokenizer adds one by itself. After an end-of-text token it goes
on with a new random token, as at its start, until it has its full length.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from vqllm.calibration.data.vocabulary import leading_token, ordinary_tokens
from vqllm.calibration.decode_attention import fast_decoding
from vqllm.core import rng
from vqllm.errors import NumericalError
from vqllm.hf.running import explained_run

logger = logging.getLogger(__name__)

BATCH_SIZE = 128
LOGITS_BYTES = 1 << 30
"""Size of the logits of all tokens of a batch, which a model without a cache computes."""


def generate_samples(
    model: PreTrainedModel,
    tokenizer: Any,
    num_sequences: int,
    sequence_length: int,
    seed: int,
    *,
    num_held_out: int = 0,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Sample sequences from a model.

    One uniform number decides each token by inversion of the cumulative distribution, so the
    result depends on the seed and the model's logits alone: not on the batch size, nor on the
    global generator.

    Args:
        model: an ordinary transformers model, in evaluation mode. On a CPU pass it in bfloat16:
            float16 is 10 times as slow there without AMX.
        num_held_out: so many sequences more, of other random numbers. They never occur among the
            `num_sequences` of any call, whatever its length and number of sequences.
        batch_size: sequences sampled at once; their key-value caches must fit in memory.
        progress: called with the tokens that are done and the tokens in all.

    Returns:
        int64 [num_sequences + num_held_out, sequence_length], on the CPU.

    Raises:
        NumericalError: logits that are not finite.
    """
    # A uniform number for each token. Held-out sequences have a generator of their own.
    U_SL = torch.cat(
        [
            torch.rand(
                num,
                sequence_length,
                generator=rng.generator(seed, "calibration", purpose),
                dtype=torch.float64,
            )
            for num, purpose in ((num_sequences, "samples"), (num_held_out, "held-out samples"))
        ]
    )
    restart = _Restart(model, tokenizer)
    total = U_SL.numel()
    batches = []
    with torch.inference_mode(), explained_run(model), fast_decoding(model) as fast_cache:
        new_cache = _working_cache(model, fast_cache)
        if new_cache is None:
            logger.warning(
                "%s has no cache that can be used here, so each token is sampled from all tokens "
                "before it, which is slow; a text as --calibration needs no sampling",
                type(model).__name__,
            )
            # Each step then computes the logits of all tokens so far, in float32.
            per_sequence = 4 * sequence_length * model.config.get_text_config().vocab_size
            batch_size = min(batch_size, max(1, LOGITS_BYTES // per_sequence))
        for begin in range(0, len(U_SL), batch_size):
            U_BL = U_SL[begin : begin + batch_size]

            def report(step: int, before: int = begin * sequence_length, batch: int = len(U_BL)):
                if progress:
                    progress(before + step * batch, total)

            U_BL = U_BL.to(model.device)
            batches.append(_sample_batch(model, restart, U_BL, new_cache, report))
    return torch.cat(batches) if batches else torch.empty(0, sequence_length, dtype=torch.long)


def _working_cache(
    model: PreTrainedModel, fast_cache: Callable[[], Cache | None]
) -> Callable[[], Cache | None] | None:
    """A function that makes a cache which the model accepts and returns: the fast one, or its own
    (made from None). None for a model that has neither, such as most with a recurrent state."""
    # Tried with two calls: the second one gets the cache that the first one returned.
    tokens_BT = torch.zeros(2, 2, dtype=torch.long, device=model.device)
    for make in (fast_cache, lambda: None):
        try:
            output = model(input_ids=tokens_BT, past_key_values=make(), use_cache=True)
            cache = output.past_key_values
            again = model(input_ids=tokens_BT[:, :1], past_key_values=cache, use_cache=True)
            if cache is not None and again.past_key_values is not None:
                return make
        except Exception:  # of any type: how a model refuses a cache is not agreed upon
            logger.debug("%s refuses a cache", type(model).__name__, exc_info=True)
    return None


class _Restart:
    """The tokens at the start of a sequence and after the end of a text, where the model's
    distribution does not apply."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        self.bos = leading_token(tokenizer)
        self.ordinary_V = ordinary_tokens(tokenizer).to(model.device)
        self.num_tokens = len(tokenizer)
        generation = model.generation_config
        ends = generation.eos_token_id if generation is not None else None
        ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self.end_E = torch.tensor(sorted(ids), dtype=torch.long, device=model.device)

    def random_token(self, u_B: Tensor) -> Tensor:
        return self.ordinary_V[(u_B * len(self.ordinary_V)).long()]


def _sample_batch(
    model: PreTrainedModel,
    restart: _Restart,
    U_BL: Tensor,
    new_cache: Callable[[], Cache | None] | None,
    report: Callable[[int], None],
) -> Tensor:
    """Tokens int64 [B, L], one for each uniform number."""
    num_sequences, length = U_BL.shape
    tokens_BL = torch.empty(num_sequences, length, dtype=torch.long, device=U_BL.device)
    first = 0
    if restart.bos is not None:
        tokens_BL[:, 0] = restart.bos
        first = 1
    # [BOS] and a random token; the model then gives one token a step for all sequences.
    tokens_BL[:, first : first + 1] = restart.random_token(U_BL[:, first : first + 1])
    fresh_BT = tokens_BL[:, : first + 1]
    cache = new_cache() if new_cache else None
    for step in range(first + 1, length):
        if new_cache:
            output = model(input_ids=fresh_BT, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
        else:
            output = model(input_ids=tokens_BL[:, :step], use_cache=False)
        # Embeddings are often padded beyond the tokenizer's vocabulary.
        logits_BV = output.logits[:, -1, : restart.num_tokens].float()
        sampled_B = _invert(logits_BV, U_BL[:, step])
        # After an end of text the same uniform number picks a random token in place of the sample.
        ended_B = torch.isin(tokens_BL[:, step - 1], restart.end_E)
        tokens_BL[:, step] = torch.where(ended_B, restart.random_token(U_BL[:, step]), sampled_B)
        fresh_BT = tokens_BL[:, step : step + 1]
        report(step + 1)
    return tokens_BL.cpu()


def _invert(logits_BV: Tensor, u_B: Tensor) -> Tensor:
    """The token at quantile u of the softmax of the logits.

    torch.multinomial draws a random number for every token of the vocabulary; this needs one for
    each sequence.
    """
    cumulative_BV = torch.softmax(logits_BV, -1).cumsum_(-1)
    total_B1 = cumulative_BV[:, -1:].clone()
    if not bool(torch.isfinite(total_B1).all()):
        raise NumericalError(
            "the model's logits are not finite: its weights are damaged, or its dtype is too "
            "narrow; calibrate on a text, or in another dtype"
        )
    at_B1 = (u_B[:, None] * total_B1).to(cumulative_BV.dtype)
    index_B1 = torch.searchsorted(cumulative_BV, at_B1, right=True)
    return index_B1[:, 0].clamp(max=logits_BV.shape[-1] - 1)
