"""Whole runs on models with experts, with towers for images, and on GPT-2."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.test_pipeline import KillAt, Killed, same_files
from tests.support.architectures import model_class, save_tiny
from tests.support.mixtures import FORMS, MULTIMODAL, OTHERS, logits, sample
from tests.support.params import slow, slow_but
from tests.support.quantized import (
    Make,
    assert_same_logits,
    assert_same_tensors,
    maker,
    quantize,
    recipe,
    share_quantized,
    stored,
    write_words,
)
from vqllm import api
from vqllm.allocation import sensitivity
from vqllm.calibration import saliency
from vqllm.checkpoint.dequantize import dequantize_checkpoint
from vqllm.checkpoint.reader import Checkpoint
from vqllm.hf.experts import LinearExperts
from vqllm.integrations.transformers import VqllmConfig
from vqllm.runtime import VQEmbedding, VQLinear

QUICK = ("mixtral", "gpt_oss", "qwen3_moe", "llama4", "gemma3", "gpt2")
EVERY = (
    "mixtral",
    "gemma3",
    "gemma3n_text",
    *FORMS,
    *(name for name in OTHERS if name != "mixtral"),
    *MULTIMODAL,
)

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
families = pytest.mark.parametrize("model_type", slow_but(QUICK, EVERY))


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return maker(tmp_path_factory.mktemp("mixtures"))


@families
def test_nearly_all_weights_of_the_layers_are_quantized(model_type: str, make: Make) -> None:
    made = make(model_type)
    share = share_quantized(made.load(made.source), made.load(made.output))
    assert share >= 0.95, share


@families
def test_it_predicts_what_the_dense_folder_does(model_type: str, make: Make) -> None:
    """Which transformers loads by itself: it has no word of vqllm."""
    made = make(model_type)
    assert "vqllm" not in (made.dense / "config.json").read_text()
    assert_same_logits(made.load(made.output), made.load(made.dense))


@families
def test_saving_it_gives_the_same_tensors(model_type: str, make: Make, tmp_path: Path) -> None:
    made = make(model_type)
    made.load(made.output, dtype="auto").save_pretrained(tmp_path / "again")
    assert_same_tensors(tmp_path / "again", made.output)
    again = made.load(tmp_path / "again")
    assert torch.equal(logits(again), logits(made.load(made.output)))


@families
def test_dequantized_at_load_it_is_an_ordinary_model(
    model_type: str, make: Make, tmp_path: Path
) -> None:
    made = make(model_type)
    expand = VqllmConfig(dequantize=True)
    model = made.load(made.output, quantization_config=expand)
    plain = made.load(made.dense)
    kinds = {name: type(module) for name, module in plain.named_modules()}
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert_same_logits(model, plain)
    model.save_pretrained(tmp_path / "plain")
    assert stored(tmp_path / "plain").keys() == stored(made.source).keys()
    assert_same_logits(made.load(tmp_path / "plain"), plain)


@families
def test_it_generates_what_the_dense_folder_does(model_type: str, make: Make) -> None:
    made = make(model_type)
    tokens = [
        made.load(folder).generate(
            sample(16), do_sample=False, max_new_tokens=4, min_new_tokens=4, pad_token_id=2
        )
        for folder in (made.output, made.dense)
    ]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("event", slow_but([9, 30], [4, 9, 16, 23, 30]))
def test_a_stopped_run_on_a_mixture_goes_on_to_the_same_bytes(
    event: int, make: Make, tmp_path: Path
) -> None:
    made = make("mixtral")
    whole = tmp_path / "whole"
    quantize(made.source, whole, calibration=write_words(tmp_path / "words.txt"))
    options = {"calibration": tmp_path / "words.txt"}
    with pytest.raises(Killed):
        quantize(made.source, tmp_path / "out", progress=KillAt(event), **options)
    quantize(made.source, tmp_path / "out", **options)
    assert same_files(whole, tmp_path / "out")


SPREAD: dict[str, Any] = {
    "codec": {"type": "trellis", "bits": 2, "state_bits": 4},
    "rounding": {"type": "two_sided", "rows": 16},
    "hessian": {"weights": "output"},
    "allocation": {"bits": 2.25, "codecs": [{"bits": 1}, {"bits": 3}]},
}


@pytest.mark.parametrize("model_type", ["mixtral", slow("llama4")])
@pytest.mark.parametrize("shared", [slow(False), True], ids=["own", "shared"])
def test_bits_are_spread_over_experts(
    model_type: str,
    shared: bool,
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if shared:
        monkeypatch.setattr(sensitivity, "SHARED_BYTES", 0)
        monkeypatch.setattr(saliency, "SHARED_BYTES", 0)
    made = make(model_type)
    out = tmp_path / "out"
    summary = quantize(made.source, out, recipe=recipe(**SPREAD))
    assert summary.bits_per_weight["all of a quantized linear"] <= 2.25 + 1e-9
    model = made.load(out)
    records = Checkpoint.open(out).records().items()
    bits = {own["bits_codes"] / own["rows"] / own["cols"] for n, own in records if ".experts." in n}
    assert len(bits) > 1, "all experts have the same bits"
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("model_type", ["mixtral", "gemma3"])
def test_tuning_goes_through_experts_and_towers(
    model_type: str, make: Make, tmp_path: Path
) -> None:
    made = make(model_type)
    text = write_words(tmp_path / "words.txt")
    changes = (
        "calibration.sequences=24",
        "calibration.length=32",
        "stages.0.steps=6",
        "stages.0.batch=4",
    )
    summary = api.tune(
        made.output,
        tmp_path / "tuned",
        recipe="end-to-end",
        changes=changes,
        calibration=text,
        evaluate=False,
        device="cpu",
    )
    assert summary is not None
    (told,) = summary.tuning
    history = told["history"]
    assert min(look["held_out_kl"] for look in history) < history[0]["held_out_kl"]
    before, after = stored(made.output), stored(tmp_path / "tuned")
    assert any(name not in before or not torch.equal(after[name], before[name]) for name in after)
    tuned = made.load(tmp_path / "tuned")
    assert not torch.equal(logits(tuned), logits(made.load(made.output)))
    made.load(tmp_path / "tuned", dtype="auto").save_pretrained(tmp_path / "again")
    assert_same_tensors(tmp_path / "again", tmp_path / "tuned")


@pytest.mark.parametrize("model_type", slow_but(["mixtral"], ["mixtral", "gemma3", "gpt2"]))
def test_embedding_and_head_of_a_mixture_are_quantized(
    model_type: str, make: Make, tmp_path: Path
) -> None:
    uniform = {"codec": {"type": "uniform", "bits": 4, "group": 16}}
    made = make(model_type)
    quantize(made.source, tmp_path / "out", recipe=recipe(embeddings=uniform, head=uniform))
    model = made.load(tmp_path / "out")
    assert isinstance(model.get_input_embeddings(), VQEmbedding)
    assert isinstance(model.get_output_embeddings(), VQLinear)
    dequantize_checkpoint(tmp_path / "out", tmp_path / "dense", dtype="float32")
    assert_same_logits(model, made.load(tmp_path / "dense"))
    expand = VqllmConfig(dequantize=True)
    assert_same_logits(model, made.load(tmp_path / "out", quantization_config=expand))
    made.load(tmp_path / "out", dtype="auto").save_pretrained(tmp_path / "again")
    assert_same_tensors(tmp_path / "again", tmp_path / "out")


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_experts_without_tokens_are_quantized_and_named(
    model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # 12 experts get the tokens of three tokens, two or four experts each.
    source = save_tiny(model_type, tmp_path / "source", num_local_experts=12)
    short = {"sequences": 1, "length": 3}
    quantize(source, tmp_path / "out", recipe=recipe(calibration=short))
    warned = [r.getMessage() for r in caplog.records if "no calibration token" in r.getMessage()]
    assert len(warned) == 2, "one for each layer"
    records = [json.loads(own) for own in (tmp_path / "out/report.jsonl").read_text().splitlines()]
    # report.jsonl has names as they are in the files, the page as they are in the model.
    experts = re.compile(r"\.(\d+)\.\w+\.experts\.(\d+)")
    unreached = {tuple(experts.findall(r["name"])) for r in records if r["num_tokens"] == 0}
    page = (tmp_path / "out/report.md").read_text()
    section = page[page.index("## Experts that no calibration token reached") :]
    section = section[: section.index("## Not quantized")]
    assert unreached
    assert set(experts.findall(section)) == {own for (own,) in unreached}
    model: Any = model_class(model_type).from_pretrained(tmp_path / "out")
    for name, module in model.named_modules():
        if isinstance(module, LinearExperts):
            for index in range(12):
                linears = [m for m in module.expert(index).modules() if list(m.parameters(False))]
                assert all(isinstance(m, VQLinear) for m in linears), f"{name}.{index}"
    assert logits(model).isfinite().all()
