"""How much a model lost: perplexity, and divergence from the original.

Perplexity here always means: the whole text tokenized as one string without special tokens, cut
into windows of 2048 tokens, exp of the mean negative log-likelihood over each window's last 2047
tokens. It is the figure of the GPTQ, QuIP# and AQLM papers, not lm-eval's word perplexity.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vqllm.calibration.data.text_sources import open_source
from vqllm.core.protocols import JSON
from vqllm.errors import CalibrationError, EvaluationError, NumericalError
from vqllm.hf.loading import max_length, runs_beyond
from vqllm.hf.running import explained_run

WINDOW_LENGTH = 2048
# Positions whose logits are in float32 at once: 256 x 49152 are 50 MB.
CHUNK_POSITIONS = 256
# A text longer than needed is cut at a line end; tokens this far from the cut do not depend on it.
CUT_MARGIN_TOKENS = 64

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity over `num_windows` windows of `window_length` tokens of `text`."""

    text: str
    num_windows: int
    window_length: int
    perplexity: float

    def to_dict(self) -> JSON:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Comparison(Perplexity):
    """The same, against the original model on the same tokens."""

    baseline_perplexity: float
    kl: float
    """Mean KL(p_baseline || p_model), nats per token."""
    top1: float
    """Fraction of positions at which both models give the same token the most probability."""


def text_windows(
    source: str | Path,
    tokenizer: Any,
    num_windows: int | None = None,
    window_length: int = WINDOW_LENGTH,
) -> Tensor:
    """The first windows of a text, int64 [num_windows, window_length].

    Args:
        source: a file, a folder or a data set of the hub, as `text_sources.open_source` takes
            it; the rows of structured files are joined by a blank line.
        num_windows: None for all that the text has.

    Raises:
        EvaluationError: a source that cannot be read or has fewer windows.
    """
    check_windows(num_windows, window_length)
    # The text is tokenized as one string, so that windows do not depend on how it is cut in files.
    try:
        pieces = open_source(source).pieces()
        if num_windows is None:
            tokens = _encode(tokenizer, "".join(pieces))
        else:
            tokens = _encode_prefix(tokenizer, pieces, num_windows * window_length)
    except CalibrationError as error:
        raise EvaluationError(str(error)) from error
    available = len(tokens) // window_length
    if available < max(1, num_windows or 1):
        raise EvaluationError(
            f"{source} has {len(tokens)} tokens, that is {available} windows of {window_length}; "
            f"needed are {num_windows or 1}. Pass a longer text, or fewer or shorter windows."
        )
    used = num_windows or available
    return torch.tensor(tokens[: used * window_length]).view(used, window_length)


def check_windows(num_windows: int | None, window_length: int) -> None:
    """Raise EvaluationError where no text could have such windows."""
    if num_windows is not None and num_windows < 1:
        raise EvaluationError(
            f"{num_windows} windows are nothing to measure: use 1 or more, or leave the number "
            "out for the whole text."
        )
    if window_length < 2:
        raise EvaluationError(
            f"windows of {window_length} tokens have nothing to predict: use --window-length 2 or "
            "more."
        )


def check_same_tokens(tokens_SL: Tensor, baseline_SL: Tensor) -> None:
    """Raise EvaluationError where two tokenizers made different windows of one text.

    KL and agreement pair the models' predictions by token number. Two vocabularies of one size
    can number other words.
    """
    if not torch.equal(tokens_SL, baseline_SL):
        raise EvaluationError(
            "the model and the baseline have different tokenizers: the text gives them other "
            "tokens. Compare a model with the one it was made from, or measure each without "
            "--baseline."
        )


def longest_input(model: Any) -> int | None:
    """How many tokens a model with a table of positions takes (OPT, GPT-2); else None."""
    return None if runs_beyond(model.config) else max_length(model.config)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _encode_prefix(tokenizer: Any, pieces: Iterator[str], needed: int) -> list[int]:
    """At least `needed` tokens of the joined pieces if there are as many, without reading on."""
    # A guess of 4 characters a token. Where that is too little, twice the text is read.
    text, exhausted, wanted = "", False, 4 * needed
    while True:
        while not exhausted and len(text) < wanted:
            piece = next(pieces, None)
            exhausted = piece is None
            text += piece or ""
        tokens = _encode(tokenizer, text)
        if exhausted or len(tokens) >= needed + CUT_MARGIN_TOKENS:
            return tokens
        wanted = 2 * len(text)


@torch.inference_mode()
def perplexity(
    model: Any, tokens_SL: Tensor, text: str = "", progress: Progress | None = None
) -> Perplexity:
    """Perplexity of a causal language model, one window at a time.

    Args:
        model: a loaded transformers model, in evaluation mode.
        tokens_SL: int64 windows.
        text: what the tokens are, for the result.
        progress: called with the windows that are done and all windows.

    Raises:
        EvaluationError: no window, windows of one token, or longer ones than the model takes.
        NumericalError: logits that are not finite.
    """
    _check(tokens_SL, model)
    nll = 0.0
    for done, tokens_L in enumerate(tokens_SL):
        # −Σ log p(token) over the window. In float32 are only the logits of a chunk of positions.
        logits_TV = _logits(model, tokens_L)
        nll += sum(
            F.cross_entropy(logits.float(), targets, reduction="sum").item()
            for logits, targets in _chunks(logits_TV, tokens_L[1:].to(logits_TV.device))
        )
        _check_finite(nll, done)
        if progress:
            progress(done + 1, len(tokens_SL))
    return Perplexity(
        text=text,
        num_windows=tokens_SL.shape[0],
        window_length=tokens_SL.shape[1],
        perplexity=_exp(nll / tokens_SL[:, 1:].numel()),
    )


@torch.inference_mode()
def compare(
    model: Any, baseline: Any, tokens_SL: Tensor, text: str = "", progress: Progress | None = None
) -> Comparison:
    """Both models' perplexity, KL divergence and top-1 agreement, one window at a time.

    In memory are the logits of one window of each model in the model's own dtype, and a chunk of
    positions of each in float32. The models may be on different devices. Arguments and errors as
    `perplexity`; `baseline` must have the same vocabulary.
    """
    _check(tokens_SL, model, baseline)
    nll = base_nll = kl = same = 0.0
    for done, tokens_L in enumerate(tokens_SL):
        base_TV = _logits(baseline, tokens_L)
        own_TV = _logits(model, tokens_L)
        if base_TV.shape != own_TV.shape:
            raise EvaluationError(
                f"the models have vocabularies of {own_TV.shape[-1]} and {base_TV.shape[-1]} "
                "tokens; compare a model with the one it was made from"
            )
        # p are the predictions of the baseline, q those of the model; sums over the positions.
        targets_T = tokens_L[1:].to(own_TV.device)
        for own_CV, base_CV, targets_C in _chunks(own_TV, base_TV, targets_T):
            log_p_CV = F.log_softmax(base_CV.to(own_CV.device).float(), -1)
            log_q_CV = F.log_softmax(own_CV.float(), -1)
            nll += F.nll_loss(log_q_CV, targets_C, reduction="sum").item()
            base_nll += F.nll_loss(log_p_CV, targets_C, reduction="sum").item()
            kl += F.kl_div(log_q_CV, log_p_CV, reduction="sum", log_target=True).item()
            same += (log_p_CV.argmax(-1) == log_q_CV.argmax(-1)).sum().item()
        _check_finite(nll + base_nll, done)
        if progress:
            progress(done + 1, len(tokens_SL))
    positions = tokens_SL[:, 1:].numel()
    return Comparison(
        text=text,
        num_windows=tokens_SL.shape[0],
        window_length=tokens_SL.shape[1],
        perplexity=_exp(nll / positions),
        baseline_perplexity=_exp(base_nll / positions),
        kl=kl / positions,
        top1=same / positions,
    )


def _logits(model: Any, tokens_L: Tensor) -> Tensor:
    """The predictions of tokens 1 to L−1, [L−1, V], in the model's dtype."""
    tokens = tokens_L[None].to(model.device)
    with explained_run(model):
        try:
            output = model(input_ids=tokens, use_cache=False)
        except RuntimeError as error:
            if "same dtype" not in str(error):
                raise
            # xLSTM in 16 bits: without a cache its state is float32, and its products fail.
            output = model(input_ids=tokens, use_cache=True)
    return output.logits[0, :-1]


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(CHUNK_POSITIONS) for tensor in tensors))


def _check(tokens_SL: Tensor, *models: Any) -> None:
    if tokens_SL.ndim != 2 or tokens_SL.shape[0] == 0 or tokens_SL.shape[1] < 2:
        raise EvaluationError(
            f"tokens of shape {tuple(tokens_SL.shape)} are no windows; needed is one window of at "
            "least 2 tokens"
        )
    for longest in filter(None, map(longest_input, models)):
        if tokens_SL.shape[1] > longest:
            raise EvaluationError(
                f"windows of {tokens_SL.shape[1]} tokens are longer than the {longest} positions "
                f"of this model: pass --window-length {longest} or less."
            )


def _check_finite(nll: float, window: int) -> None:
    if not math.isfinite(nll):
        raise NumericalError(
            f"the logits of window {window} are not finite: the weights are damaged, or the dtype "
            "is too narrow for this model; try another --device or dtype"
        )


def _exp(mean_nll: float) -> float:
    return math.exp(mean_nll) if mean_nll < 709 else math.inf
