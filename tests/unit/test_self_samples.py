"""Sampling from tiny models."""

from typing import Any

import pytest
import torch

from tests.support.params import slow
from tests.support.tiny import tiny_model, tiny_tokenizer
from vqllm.calibration.data import self_samples as samples
from vqllm.calibration.data.self_samples import generate_samples
from vqllm.calibration.data.vocabulary import leading_token, ordinary_tokens
from vqllm.calibration.decode_attention import NAME, fast_decoding
from vqllm.core import rng
from vqllm.errors import NumericalError

BOS, EOS, PAD = 0, 1, 2


def without_end(arch: str = "llama", **overrides: object) -> torch.nn.Module:
    """A tiny model whose generation configuration names no end of text."""
    model = tiny_model(arch, **overrides)
    model.generation_config.eos_token_id = None
    return model


def warnings_of(module: Any, caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == module.__name__]


def test_shape_dtype_and_range() -> None:
    tokens = generate_samples(tiny_model(), tiny_tokenizer(), 5, 20, seed=0)
    assert tokens.shape == (5, 20)
    assert tokens.dtype == torch.int64
    assert tokens.min() >= 0
    assert tokens.max() < 384


@pytest.mark.parametrize("arch", ["llama", slow("gpt_neox"), slow("gemma2"), "gemma3_text"])
def test_the_batch_size_changes_nothing(arch: str) -> None:
    """Over 70 tokens, so that the cache grows; gemma2 has eager attention, gemma3 windows."""
    overrides = {"sliding_window": 16} if arch.startswith("gemma") else {}
    model, tokenizer = tiny_model(arch, **overrides), tiny_tokenizer()
    expected = generate_samples(model, tokenizer, 5, 140, seed=1)
    assert torch.equal(generate_samples(model, tokenizer, 5, 140, seed=1, batch_size=2), expected)
    assert not torch.equal(generate_samples(model, tokenizer, 5, 140, seed=2), expected)


def test_held_out_sequences_are_no_others() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    sampled = {tuple(row) for row in generate_samples(model, tokenizer, 40, 12, seed=1).tolist()}
    held_out = [
        generate_samples(model, tokenizer, num, 12, seed=1, num_held_out=4)[num:] for num in (1, 40)
    ]
    assert held_out[0].shape == (4, 12)
    assert torch.equal(*held_out)
    assert not sampled & {tuple(row) for row in held_out[0].tolist()}


def test_the_global_generator_is_left_alone() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    torch.manual_seed(3)
    first = generate_samples(model, tokenizer, 2, 12, seed=0)
    state = torch.get_rng_state()
    torch.manual_seed(4)
    assert torch.equal(generate_samples(model, tokenizer, 2, 12, seed=0), first)
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3_text", "phi3", "gpt_neox", "opt"])
def test_fast_decoding_gives_the_models_own_logits(arch: str) -> None:
    overrides = {"sliding_window": 32} if arch == "gemma3_text" else {}
    model = tiny_model(arch, **overrides)
    tokens = torch.randint(3, 384, (3, 100), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(tokens).logits
        with fast_decoding(model) as new_cache:
            assert model.config._attn_implementation == NAME
            cache = new_cache()
            logits = [model(tokens[:, :2], past_key_values=cache, use_cache=True).logits]
            for step in range(2, tokens.shape[1]):
                fresh = tokens[:, step : step + 1]
                logits.append(model(fresh, past_key_values=cache, use_cache=True).logits)
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=2e-5, rtol=1e-4)


def test_tokens_follow_the_models_distribution() -> None:
    """The second token against the model's probabilities: total variation of 6000 draws.

    Of 384 tokens, 6000 exact draws differ from their distribution by about 0.08 on average.
    """
    model = without_end(initializer_range=0.3)
    tokenizer = tiny_tokenizer()
    tokens = generate_samples(model, tokenizer, 6000, 2, seed=5, batch_size=6000)
    with torch.inference_mode():
        p_SV = torch.softmax(model(tokens[:, :1]).logits[:, 0], -1)
    expected_V = p_SV.mean(0)
    frequency_V = torch.bincount(tokens[:, 1], minlength=384) / len(tokens)
    distance = 0.5 * (frequency_V - expected_V).abs().sum()
    uniform = 0.5 * (1 / 384 - expected_V).abs().sum()
    assert distance < 0.12 < uniform


def test_the_first_token_is_any_ordinary_one() -> None:
    tokens = generate_samples(tiny_model(), tiny_tokenizer(), 3000, 1, seed=0)
    assert set(tokens.flatten().tolist()) >= {3, 383}
    assert not set(tokens.flatten().tolist()) & {BOS, EOS, PAD}
    assert ordinary_tokens(tiny_tokenizer()).tolist() == list(range(3, 384))


def test_bos_leads_where_the_tokenizer_adds_it() -> None:
    assert leading_token(tiny_tokenizer()) is None
    assert leading_token(tiny_tokenizer(add_bos=True)) == BOS
    tokens = generate_samples(tiny_model(), tiny_tokenizer(add_bos=True), 4, 10, seed=0)
    assert (tokens[:, 0] == BOS).all()
    assert (tokens[:, 1] > PAD).all()


def test_after_the_end_of_a_text_comes_a_random_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler that wants to end at every step alternates with fresh tokens."""
    monkeypatch.setattr(
        samples, "_invert", lambda logits_BV, u_B: torch.full(u_B.shape, EOS, dtype=torch.long)
    )
    tokens = generate_samples(tiny_model(), tiny_tokenizer(), 6, 9, seed=0)
    assert (tokens[:, 1::2] == EOS).all()
    assert (tokens[:, 0::2] > PAD).all()
    assert len(tokens[:, 0::2].unique()) > 20


def test_inversion_picks_the_quantile() -> None:
    p_BV = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).repeat(6, 1)
    u_B = torch.tensor([0.0, 0.0999, 0.1001, 0.5999, 0.6001, 1 - 2**-53], dtype=torch.float64)
    assert samples._invert(p_BV.log(), u_B).tolist() == [0, 0, 1, 2, 3, 3]
    never = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    assert samples._invert(never, torch.tensor([0.0], dtype=torch.float64)).tolist() == [1]


def test_progress_counts_tokens() -> None:
    seen: list[tuple[int, int]] = []
    generate_samples(
        tiny_model(),
        tiny_tokenizer(),
        5,
        4,
        seed=0,
        batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (20, 20)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_what_cannot_be_sampled_says_so() -> None:
    broken = tiny_model()
    with torch.no_grad():
        broken.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(NumericalError, match="not finite"):
        generate_samples(broken, tiny_tokenizer(), 1, 5, seed=0)


@pytest.mark.parametrize(
    ("arch", "values"),
    [
        ("mamba", {"state_size": 8}),
        ("rwkv", {"attention_hidden_size": 64}),
        ("recurrent_gemma", {"lru_width": 64, "num_hidden_layers": 3}),
        ("openai-gpt", {}),
    ],
)
def test_models_without_a_cache_are_sampled_from_whole_prefixes(
    arch: str, values: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = without_end(arch, **values), tiny_tokenizer()
    tokens = generate_samples(model, tokenizer, 3, 10, seed=0, batch_size=2)
    (warning,) = warnings_of(samples, caplog)
    assert warning.startswith(f"{type(model).__name__} has no cache")
    U_SL = torch.rand(
        3, 10, generator=rng.generator(0, "calibration", "samples"), dtype=torch.float64
    )
    with torch.inference_mode():
        logits = model(input_ids=tokens, use_cache=False).logits
    for step in range(1, 10):
        expected = samples._invert(logits[:, step - 1], U_SL[:, step])
        ended = tokens[:, step - 1] == EOS
        assert ((tokens[:, step] == expected) | ended).all()


def test_a_cache_of_the_models_own_is_used(caplog: pytest.LogCaptureFixture) -> None:
    """MiniMax takes no other; with it and without any the tokens are the same."""
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model, tokenizer = without_end("minimax", **moe), tiny_tokenizer()
    tokens = generate_samples(model, tokenizer, 2, 10, seed=0)
    assert not warnings_of(samples, caplog)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "_working_cache", lambda *_: None)
        assert torch.equal(generate_samples(model, tokenizer, 2, 10, seed=0), tokens)
