"""Perplexity and comparisons against the formulas, on tiny models."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.support.tiny import tiny_model, tiny_tokenizer
from vqllm.errors import EvaluationError, NumericalError
from vqllm.evaluation import perplexity as evaluation
from vqllm.evaluation.perplexity import (
    check_same_tokens,
    compare,
    longest_input,
    perplexity,
    text_windows,
)

TOKENIZER = tiny_tokenizer()


def windows(num: int = 3, length: int = 40) -> torch.Tensor:
    return torch.randint(3, 384, (num, length), generator=torch.Generator().manual_seed(0))


def log_probabilities(model: Any, tokens_SL: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return F.log_softmax(model(tokens_SL).logits[:, :-1].double(), -1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"line {i} of the text\n\n" for i in range(2000)))
    return file


def test_perplexity_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "CHUNK_POSITIONS", 16)  # 39 positions: two chunks and a rest
    model, tokens = tiny_model(), windows()
    log_p = log_probabilities(model, tokens)
    nll = -log_p.gather(-1, tokens[:, 1:, None]).mean().item()
    result = perplexity(model, tokens, "a text")
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    assert result.to_dict() == {
        "text": "a text",
        "num_windows": 3,
        "window_length": 40,
        "perplexity": result.perplexity,
    }


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    assert perplexity(model, windows()).perplexity == pytest.approx(384, rel=1e-5)


def test_comparison_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "CHUNK_POSITIONS", 16)
    base, other, tokens = tiny_model(seed=0), tiny_model(seed=1), windows()
    log_p, log_q = log_probabilities(base, tokens), log_probabilities(other, tokens)
    result = compare(other, base, tokens, "a text")
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert kl > 0.1
    assert result.kl == pytest.approx(kl, rel=1e-4)
    assert result.top1 == (log_p.argmax(-1) == log_q.argmax(-1)).float().mean().item()
    assert result.perplexity == pytest.approx(perplexity(other, tokens).perplexity)
    assert result.baseline_perplexity == pytest.approx(perplexity(base, tokens).perplexity)
    assert compare(base, other, tokens).kl != pytest.approx(result.kl, rel=1e-3)
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


def test_a_model_does_not_differ_from_itself() -> None:
    result = compare(tiny_model(), tiny_model(), windows())
    assert (result.kl, result.top1) == (0.0, 1.0)
    assert result.perplexity == result.baseline_perplexity


def test_windows_are_the_text_cut(text: Path) -> None:
    expected = TOKENIZER(text.read_text()).input_ids
    tokens = text_windows(text, TOKENIZER, window_length=64)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (len(expected) // 64, 64)
    assert tokens.flatten().tolist() == expected[: tokens.numel()]


@pytest.mark.parametrize("num_windows", [1, 7, 300])
def test_few_windows_are_the_first_of_all(
    text: Path, num_windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prefix of the text is tokenized, cut at a line end, where a token may span the cut."""
    expected = text_windows(text, TOKENIZER, window_length=64)[:num_windows]
    monkeypatch.setattr("vqllm.calibration.data.text_sources.BLOCK_BYTES", 50)
    read = []
    monkeypatch.setattr(
        evaluation, "_encode", lambda t, s: read.append(len(s)) or TOKENIZER(s).input_ids
    )
    assert torch.equal(text_windows(text, TOKENIZER, num_windows, 64), expected)
    if num_windows == 1:
        assert max(read) < 0.05 * text.stat().st_size


def test_rows_are_joined_by_a_blank_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [f"row {i}" for i in range(30)]
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    expected = TOKENIZER("\n\n".join(rows)).input_ids
    for num_windows in (None, len(expected) // 2):
        tokens = text_windows(file, TOKENIZER, num_windows, 2)
        assert tokens.flatten().tolist() == expected[: len(expected) // 2 * 2]


def test_no_bos_is_added(text: Path) -> None:
    plain = text_windows(text, TOKENIZER, 2, 32)
    assert torch.equal(text_windows(text, tiny_tokenizer(add_bos=True), 2, 32), plain)


def test_too_little_text_says_how_much_there_is(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("a few words")
    found = len(TOKENIZER("a few words").input_ids)
    with pytest.raises(EvaluationError, match=f"{found} tokens, that is 0 windows of 2048"):
        text_windows(file, TOKENIZER)
    with pytest.raises(EvaluationError, match="2 windows of 2; needed are 9"):
        text_windows(_words(tmp_path, 5), TOKENIZER, 9, 2)
    with pytest.raises(EvaluationError, match="no file or folder"):
        text_windows(tmp_path / "none.txt", TOKENIZER)
    for shape in ((0, 8), (3, 1), (8,)):
        with pytest.raises(EvaluationError, match="are no windows"):
            perplexity(tiny_model(), torch.zeros(shape, dtype=torch.long))


def _words(folder: Path, num_tokens: int) -> Path:
    file = folder / "words.txt"
    file.write_text("é" * (num_tokens // 2) + "q" * (num_tokens % 2))
    assert len(TOKENIZER(file.read_text()).input_ids) == num_tokens
    return file


@pytest.mark.parametrize(("num_windows", "length"), [(0, 64), (-1, 64), (2, 0), (None, 1), (2, -5)])
def test_windows_that_no_text_has_are_refused(
    text: Path, num_windows: int | None, length: int
) -> None:
    with pytest.raises(EvaluationError, match=r"use .* or"):
        text_windows(text, TOKENIZER, num_windows, length)


def test_learned_positions_limit_the_windows_and_rotary_ones_do_not() -> None:
    """Both have `max_position_embeddings` 256."""
    learned, rotary = tiny_model("opt"), tiny_model()
    assert longest_input(learned) == 256
    assert longest_input(rotary) is None
    perplexity(learned, windows(1, 256))
    perplexity(rotary, windows(1, 257))
    for measure in (
        lambda: perplexity(learned, windows(1, 257)),
        lambda: compare(rotary, learned, windows(1, 257)),
    ):
        with pytest.raises(EvaluationError, match=r"257 tokens .* pass --window-length 256"):
            measure()


def test_a_baseline_with_another_tokenizer_is_refused() -> None:
    check_same_tokens(windows(), windows())
    for other in (windows() + 1, windows(2)):
        with pytest.raises(EvaluationError, match="different tokenizers"):
            check_same_tokens(windows(), other)


def test_models_that_cannot_be_compared() -> None:
    with pytest.raises(EvaluationError, match="vocabularies of 384 and 400"):
        compare(tiny_model(), tiny_model(vocab_size=400), windows())
    broken = tiny_model()
    with torch.no_grad():
        broken.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(NumericalError, match="window 0 are not finite"):
        perplexity(broken, windows())
    with pytest.raises(NumericalError, match="window 0 are not finite"):
        compare(broken, tiny_model(), windows())


def test_progress_counts_windows() -> None:
    seen: list[tuple[int, int]] = []
    perplexity(tiny_model(), windows(), progress=lambda done, total: seen.append((done, total)))
    compare(tiny_model(), tiny_model(), windows(), progress=lambda *counts: seen.append(counts))
    assert seen == [(1, 3), (2, 3), (3, 3)] * 2
