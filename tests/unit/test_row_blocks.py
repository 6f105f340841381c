"""Embeddings and output heads: what can be quantized, and in blocks of rows as in one piece."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.tiny import save_tiny, tiny_model
from vqllm.codecs import CODECS
from vqllm.errors import ModelError, NumericalError
from vqllm.quantization import checks as preflight
from vqllm.quantization import embeddings as outside
from vqllm.quantization import row_blocks as rows
from vqllm.quantization.row_blocks import Matrix, quantize_rows
from vqllm.recipes import Recipe, from_dict
from vqllm_kernels import linear

UNIFORM = {"type": "uniform", "bits": 4, "group": 16}
HADAMARD = [{"type": "hadamard", "side": "in"}]


def recipe(**changes: object) -> Recipe:
    values = {"name": "x", "codec": {"type": "e8p"}, "rounding": {"type": "nearest"}}
    return from_dict({**values, **changes}, "test recipe")


BOTH = recipe(embeddings={"codec": UNIFORM}, head={"codec": UNIFORM})


def matrix(num_rows: int, cols: int, *, is_head: bool = False, **part: object) -> Matrix:
    key = "head" if is_head else "embeddings"
    whole = recipe(**{key: {"codec": UNIFORM, **part}})
    own = whole.of(getattr(whole, key))
    spec = linear.LinearSpec(
        rows=num_rows,
        cols=cols,
        format=own.codec.spec(),
        transforms=tuple(t.spec(cols) for t in own.transforms),
    )
    return Matrix(names=("emb",), recipe=own, spec=spec, is_head=is_head)


def weights(num_rows: int, cols: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    scale = 0.1 + torch.rand(num_rows, 1, generator=generator)
    return scale * torch.randn(num_rows, cols, generator=generator)


def hessian(cols: int) -> torch.Tensor:
    x_NC = torch.randn(4 * cols, cols, generator=torch.Generator().manual_seed(4))
    x_NC[:, 0] *= 5
    x_NC[:, 1] += x_NC[:, 0]
    return x_NC.T @ x_NC / len(x_NC)


CPU = torch.device("cpu")


def reader(W_RC: torch.Tensor) -> rows.ReadRows:
    return lambda start, stop: W_RC[start:stop]


@pytest.mark.parametrize(
    ("part", "same"),
    [
        ({}, True),  # scales of a row, fitted on its block
        ({"transforms": HADAMARD}, True),
        ({"codec": {"type": "kmeans", "tile_cols": 2, "index_bits": 4}}, False),
        ({"codec": {"type": "e8p"}, "transforms": [*HADAMARD, {"type": "scale"}]}, False),
        ({"codec": {"type": "sparse", "share": 0.1, "base": UNIFORM}}, True),
        ({"codec": {"type": "kmeans", "tile_rows": 4, "tile_cols": 1, "index_bits": 4}}, False),
    ],
)
@pytest.mark.parametrize("is_head", [True, False])
def test_blocks_of_rows(
    part: dict[str, object], same: bool, is_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "transforms" in part:
        part = {**part, "transforms": [{**t, "side": "in"} for t in part["transforms"]]}
    num_rows, cols = 3 * 256 + 50, 32
    W_RC, one = weights(num_rows, cols), matrix(num_rows, cols, is_head=is_head, **part)
    H_CC = hessian(cols) if is_head else None
    whole = quantize_rows(one, reader(W_RC), CPU, H_CC, 9)
    whole_RC = one.spec.dequantize(whole.tensors)
    monkeypatch.setattr(linear, "BLOCK_WEIGHTS", 256 * cols)
    assert len(one.spec.row_blocks()) == 4
    parts = quantize_rows(one, reader(W_RC), CPU, H_CC, 9)
    assert parts.tensors.keys() == whole.tensors.keys() == one.spec.layout().keys()
    for name, expected in one.spec.layout().items():
        tensor = parts.tensors[name]
        assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
        assert not same or torch.equal(tensor, whole.tensors[name])
    decoded_RC = one.spec.dequantize(parts.tensors)
    if same:
        assert torch.equal(
            one.spec.dequantize(whole.tensors, torch.bfloat16), decoded_RC.bfloat16()
        )
    # What is fitted on a quarter of the rows is nearly as good as what is fitted on all.
    loss, whole_loss = parts.record.proxy_loss, whole.record.proxy_loss
    assert loss < 1.15 * whole_loss
    E_RC, H = decoded_RC - W_RC, torch.eye(cols) if H_CC is None else H_CC
    expected = float(((E_RC @ H) * E_RC).sum() / ((W_RC @ H) * W_RC).sum())
    assert parts.record.proxy_loss == pytest.approx(expected, rel=1e-4)
    assert float((whole_RC - W_RC).square().sum()) > 0


def test_feedback_makes_use_of_the_hessian() -> None:
    W_RC, H_CC = weights(100, 32), hessian(32)
    loss = {
        rounding: quantize_rows(
            matrix(100, 32, is_head=True, rounding={"type": rounding}), reader(W_RC), CPU, H_CC, 9
        ).record.proxy_loss
        for rounding in ("nearest", "ldlq")
    }
    assert loss["ldlq"] < 0.9 * loss["nearest"]


def test_frequent_rows_count_more_in_what_is_learned() -> None:
    W_RC = weights(200, 32)
    kmeans = {"codec": {"type": "kmeans", "tile_cols": 2, "index_bits": 4}}
    weight_R = torch.ones(200)
    weight_R[:20] = 1000
    error = []
    for weight in (None, weight_R):
        made = quantize_rows(matrix(200, 32, **kmeans), reader(W_RC), CPU, weight_R=weight)
        W_hat_RC = matrix(200, 32, **kmeans).spec.dequantize(made.tensors)
        error.append(float((W_hat_RC - W_RC)[:20].square().mean()))
    assert error[1] < 0.9 * error[0]


def test_codecs_that_are_fitted_while_they_code_are_not_split() -> None:
    spec = matrix(999, 32).spec
    read = reader(weights(999, 32))
    assert rows._fits_blocks(CODECS.get("uniform")(), spec, read)

    class Refitted(CODECS.get("uniform")):  # type: ignore[misc]
        @property
        def refit_cols(self) -> int:
            return 16

    assert not rows._fits_blocks(Refitted(), spec, read)


def test_a_rule_that_tunes_the_state_gets_the_whole_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kmeans = {"type": "kmeans", "tile_cols": 2, "index_bits": 4}
    solved = {"type": "coordinate", "start": "ldlq", "state": "solved"}
    one = matrix(600, 32, is_head=True, codec=kmeans, rounding=solved)
    W_RC, H_CC = weights(600, 32), hessian(32)
    whole = quantize_rows(one, reader(W_RC), CPU, H_CC, 9)
    monkeypatch.setattr(linear, "BLOCK_WEIGHTS", 256 * 32)
    assert len(one.spec.row_blocks()) == 3
    again = quantize_rows(one, reader(W_RC), CPU, H_CC, 9)
    assert all(torch.equal(again.tensors[name], t) for name, t in whole.tensors.items())


def test_rows_that_are_not_finite() -> None:
    W_RC = weights(30, 16)
    W_RC[7, 3] = torch.nan
    with pytest.raises(NumericalError, match="emb: 1 of the weights of rows 0 to 30 are NaN"):
        quantize_rows(matrix(30, 16), reader(W_RC), CPU)


def test_plan() -> None:
    assert outside.plan(tiny_model("llama"), recipe()) == []
    tied = tiny_model("llama", tie_word_embeddings=True)
    (both,) = outside.plan(tied, BOTH)
    assert both.names == ("model.embed_tokens", "lm_head")
    assert both.tied == {"lm_head": "model.embed_tokens"}
    assert (both.is_head, both.recipe.rounding.type) == (True, "ldlq")
    assert both.recipe.hessian.damping == 1
    given = recipe(embeddings={"codec": UNIFORM}, head={"codec": UNIFORM, "damping": 0.2})
    assert outside.plan(tied, given)[0].recipe.hessian.damping == 0.2
    embedding, head = outside.plan(tiny_model("llama", tie_word_embeddings=False), BOTH)
    assert (embedding.names, embedding.recipe.rounding.type) == (
        ("model.embed_tokens",),
        "nearest",
    )
    assert (head.names, head.is_head, head.tied) == (("lm_head",), True, {})
    assert head.recipe.hessian.damping == embedding.recipe.hessian.damping == 0.01
    skipped = recipe(embeddings={"codec": UNIFORM}, head={"codec": UNIFORM}, skip=["lm_head"])
    assert outside.plan(tied, skipped) == []


class Twice(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * self.weight[input]


def test_what_cannot_be_done_is_refused_with_the_reason() -> None:
    tied = tiny_model("llama", tie_word_embeddings=True)
    with pytest.raises(ModelError, match=r"one matrix \(tied\), .* `embeddings` and no `head`"):
        outside.plan(tied, recipe(embeddings={"codec": UNIFORM}))
    with pytest.raises(ModelError, match=r"has `head` and no `embeddings`"):
        outside.plan(tied, recipe(head={"codec": UNIFORM}))

    own = tiny_model("llama", tie_word_embeddings=False)
    own.model.embed_tokens = Twice(384, 64)
    with pytest.raises(ModelError, match=r"model.embed_tokens cannot be decoded .*: Twice does"):
        outside.plan(own, BOTH)
    own.model.embed_tokens = nn.Embedding(384, 64)
    own.lm_head = nn.Sequential(nn.Linear(64, 384))
    with pytest.raises(ModelError, match=r"`head` cannot .* lm_head is a Sequential, not a torch"):
        outside.plan(own, BOTH)
    own.lm_head = None
    with pytest.raises(ModelError, match=r"get_output_embeddings\(\) gives none"):
        outside.plan(own, BOTH)

    third = tiny_model("llama", tie_word_embeddings=True)
    third.model.draft = nn.Linear(64, 384, bias=False)
    third.model.draft.weight = third.lm_head.weight
    with pytest.raises(ModelError, match=r"its weight is also model\.draft\.weight"):
        outside.plan(third, BOTH)


def test_a_head_that_is_not_called_is_found_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tmp_path / "source", "llama", tie_word_embeddings=False)
    preflight.check_model(source, "a model", BOTH)
    from transformers import LlamaForCausalLM

    def forward(self, input_ids: torch.Tensor, **options: object) -> torch.Tensor:
        states = self.model(input_ids=input_ids, **options).last_hidden_state
        return states @ self.lm_head.weight.T

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with pytest.raises(ModelError, match=r"does not call lm_head when it runs.* --set head=null"):
        preflight.check_model(source, "a model", BOTH)
    preflight.check_model(source, "a model", recipe(embeddings={"codec": UNIFORM}))


def test_names_of_tensors_may_differ_from_those_of_modules(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "gpt_neox", tie_word_embeddings=False)
    preflight.check_model(source, "a model", BOTH)  # the files have embed_out for lm_head
