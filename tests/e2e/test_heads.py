"""Models with another head, or with none: loaded so from quantized folders, and as sources."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Qwen3Model,
    pipeline,
)

from tests.support.architectures import save_tiny
from tests.support.mixtures import sample
from tests.support.params import slow
from tests.support.quantized import (
    assert_close,
    assert_same_tensors,
    quantize,
    recipe,
    stored,
)
from tests.support.tiny import save_tiny as save_dense
from tests.support.tiny import tiny_config, tiny_tokenizer
from vqllm.checkpoint.dequantize import dequantize_checkpoint
from vqllm.integrations.transformers import VqllmConfig
from vqllm.runtime import VQEmbedding, VQLinear

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
UNIFORM = {"codec": {"type": "uniform", "bits": 4, "group": 16}}
SMALL = {"embeddings": UNIFORM, "head": UNIFORM}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads")


@pytest.fixture(scope="module")
def causal(root: Path) -> Path:
    """A quantized causal language model, its dense weights beside it."""
    return both(save_dense(root / "source", "qwen3"), root / "causal")


@pytest.fixture(scope="module")
def small(root: Path, causal: Path) -> Path:
    """The same with a quantized embedding, which the head uses too."""
    source = save_dense(root / "tied", "qwen3", tie_word_embeddings=True)
    return both(source, root / "small", recipe=recipe(**SMALL))


@pytest.fixture(scope="module")
def multimodal(root: Path) -> Path:
    return both(save_tiny("gemma3", root / "gemma3"), root / "multimodal")


@pytest.fixture(scope="module")
def experts(root: Path) -> Path:
    return both(save_tiny("mixtral", root / "mixtral"), root / "experts")


def both(source: Path, output: Path, **options: Any) -> Path:
    quantize(source, output, **options)
    dequantize_checkpoint(output, dense(output), dtype="float32")
    return output


def dense(quantized: Path) -> Path:
    return quantized.with_name(f"{quantized.name}-dense")


@torch.no_grad()
def output_of(model: Any) -> Tensor:
    """What the model's class is for: logits, or the last hidden states."""
    output = model.eval()(input_ids=sample(24))
    return output.logits if "logits" in output else output.last_hidden_state


def load(cls: Any, folder: Path, **options: Any) -> Any:
    return cls.from_pretrained(folder, dtype=torch.float32, **options)


def packed(model: nn.Module) -> set[str]:
    return {n for n, m in model.named_modules() if isinstance(m, (VQLinear, VQEmbedding))}


@pytest.mark.parametrize("which", ["causal", "small", "experts"])
def test_a_causal_folder_loads_without_its_head(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(which)
    model = load(AutoModel, folder)
    whole = packed(load(AutoModelForCausalLM, folder))
    assert packed(model) == {n.removeprefix("model.") for n in whole if n != "lm_head"}
    assert_close(output_of(model), output_of(load(AutoModel, dense(folder))))
    expand = VqllmConfig(dequantize=True)
    plain = load(AutoModel, folder, quantization_config=expand)
    assert not packed(plain)
    assert_close(output_of(plain), output_of(model))
    # Saved like this it is a model without a head, and loads as one.
    model.save_pretrained(tmp_path / "again")
    again = load(AutoModel, tmp_path / "again")
    assert packed(again) == packed(model)
    assert torch.equal(output_of(again), output_of(model))


@pytest.mark.parametrize("which", ["causal", "small", "experts"])
def test_a_classifier_on_a_causal_folder(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Its head is new, so it is copied into the dense one."""
    folder: Path = request.getfixturevalue(which)
    options = {"num_labels": 3, "pad_token_id": 2}
    model = load(AutoModelForSequenceClassification, folder, **options)
    plain = load(AutoModelForSequenceClassification, dense(folder), **options)
    assert type(model.score) is nn.Linear
    plain.score.weight.data.copy_(model.score.weight.data)
    assert packed(model)
    assert_close(output_of(model), output_of(plain))
    model.save_pretrained(tmp_path / "again")
    again = load(AutoModelForSequenceClassification, tmp_path / "again")
    assert torch.equal(output_of(again), output_of(model))


def test_features_of_a_causal_folder(causal: Path) -> None:
    tokenizer = tiny_tokenizer()
    found: list[Any] = [
        pipeline("feature-extraction", model=load(AutoModel, folder), tokenizer=tokenizer)(
            "The quick brown fox", return_tensors=True
        )
        for folder in (causal, dense(causal))
    ]
    assert_close(*found)


@pytest.mark.parametrize("cls", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize("which", ["causal", "small", "experts"])
def test_fewer_layers_at_load(cls: Any, which: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(which)
    model = load(cls, folder, num_hidden_layers=1)
    assert packed(model)
    assert not any(".1." in n and "layers.1." in n for n in packed(model))
    plain = load(cls, dense(folder), num_hidden_layers=1)
    assert_close(output_of(model), output_of(plain))


@pytest.mark.parametrize("cls", [AutoModelForImageTextToText, AutoModelForCausalLM, AutoModel])
def test_a_multimodal_folder_loads_with_every_class(cls: Any, multimodal: Path) -> None:
    model, plain = (load(cls, folder) for folder in (multimodal, dense(multimodal)))
    assert type(model) is type(plain)
    assert len(packed(model)) == 14
    assert all("language_model" in name for name in packed(model)) or cls is AutoModelForCausalLM
    assert_close(output_of(model), output_of(plain))


@pytest.mark.parametrize("which", ["experts", slow("llama4"), slow("qwen3_vl_moe")])
def test_every_class_of_a_mixture(which: str, root: Path, request: Any) -> None:
    if which == "experts":
        folder = request.getfixturevalue(which)
    else:
        folder = both(save_tiny(which, root / which), root / f"{which}-quantized")
    classes = [AutoModel] if which == "experts" else [AutoModel, AutoModelForImageTextToText]
    for cls in classes:
        assert_close(output_of(load(cls, folder)), output_of(load(cls, dense(folder))))


def save_headless(folder: Path) -> Any:
    torch.manual_seed(0)
    Qwen3Model(config()).save_pretrained(folder)
    return AutoModel


def save_classifier(folder: Path, num_labels: int) -> Any:
    torch.manual_seed(0)
    Qwen3ForSequenceClassification(config(num_labels=num_labels)).save_pretrained(folder)
    return AutoModelForSequenceClassification


def save_tagger(folder: Path) -> Any:
    torch.manual_seed(0)
    Qwen3ForTokenClassification(config(num_labels=3)).save_pretrained(folder)
    return AutoModelForTokenClassification


def config(**values: Any) -> Qwen3Config:
    return tiny_config("qwen3", **values)


SOURCES = {
    "embedding": save_headless,
    "one label": lambda folder: save_classifier(folder, 1),
    "three labels": lambda folder: save_classifier(folder, 3),
    "tagger": save_tagger,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_models_without_a_head_over_tokens_are_quantized(kind: str, tmp_path: Path) -> None:
    cls = SOURCES[kind](tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    folder = both(tmp_path / "source", tmp_path / "out")
    model, info = load(cls, folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model) is type(load(cls, tmp_path / "source"))
    assert len(packed(model)) == 14
    assert_close(output_of(model), output_of(load(cls, dense(folder))))
    assert stored(dense(folder)).keys() == stored(tmp_path / "source").keys()
    model.to(torch.float32)
    again = cls.from_pretrained(folder, dtype="auto")
    again.save_pretrained(tmp_path / "again")
    assert_same_tensors(tmp_path / "again", folder)
    plain = load(cls, folder, quantization_config=VqllmConfig(dequantize=True))
    assert_close(output_of(plain), output_of(model))
    if kind != "embedding":
        assert not isinstance(model.score, VQLinear)


def test_an_embedding_model_loads_with_a_head_of_its_own(tmp_path: Path) -> None:
    """The names in its files lack the prefix that a model with a head has."""
    save_headless(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    folder = both(tmp_path / "source", tmp_path / "out")
    options = {"num_labels": 2, "pad_token_id": 2}
    model = load(AutoModelForSequenceClassification, folder, **options)
    plain = load(AutoModelForSequenceClassification, dense(folder), **options)
    assert all(name.startswith("model.layers.") for name in packed(model))
    assert len(packed(model)) == 14
    plain.score.weight.data.copy_(model.score.weight.data)
    assert_close(output_of(model), output_of(plain))
