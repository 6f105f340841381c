"""Adapters on quantized models: training, saving, loading, merging, by PEFT and transformers."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tests.support.fake_checkpoint import FORMATS, FakeCheckpoint, fake_checkpoint
from tests.support.params import slow, slow_but
from tests.support.quantized import quantize
from tests.support.tiny import save_tiny
from vqllm import recipes
from vqllm.checkpoint.dequantize import dequantize_checkpoint
from vqllm.errors import PackedWeightError
from vqllm.runtime import PackedModule, VQEmbedding, VQLinear, set_weight_cache

peft = pytest.importorskip("peft", reason="the extra `peft` is not installed")

# PEFT asks transformers for a property by the name that it had before, and Trainer has both names.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

TOKENS = torch.arange(3, 40)[None]
TASK = {"task_type": "CAUSAL_LM"}
METHODS: dict[str, Callable[[], Any]] = {
    "q_proj": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], **TASK),
    "all-linear": lambda: peft.LoraConfig(r=4, target_modules="all-linear", **TASK),
    "dora": lambda: peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True, **TASK),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK
    ),
    "embedding and head": lambda: peft.LoraConfig(
        r=4, target_modules=["embed_tokens", "lm_head", "q_proj"], **TASK
    ),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=["q_proj", "up_proj"], **TASK),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"], **TASK),
}
RATES = {"ia3": 0.1, "oft": 0.05}


@pytest.fixture(autouse=True)
def default_weight_cache() -> Iterator[None]:
    yield
    set_weight_cache("auto")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], FakeCheckpoint]:
    """Checkpoints of which the layers are quantized ("plain"), or embedding and head too."""
    made: dict[str, FakeCheckpoint] = {}

    def make(which: str) -> FakeCheckpoint:
        if which not in made:
            outside = FORMATS["residual"] if which == "small" else None
            folder = tmp_path_factory.mktemp(which)
            made[which] = fake_checkpoint(
                folder, "llama", outside=outside, tie_word_embeddings=False
            )
        return made[which]

    return make


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(TOKENS).logits


def packed_of(model: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, PackedModule)
        for key, tensor in module.packed.items()
    }


def train(model: Any, steps: int = 12, rate: float = 1e-2) -> list[float]:
    """The losses of so many steps on one sequence; packed tensors stay as they are."""
    before = packed_of(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, rate)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    after = packed_of(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    return losses


def assert_close(got: Tensor, want: Tensor, within: float = 1e-4) -> None:
    assert float((got - want).norm() / want.norm()) < within


@pytest.mark.parametrize("which", ["plain", slow("small")])
@pytest.mark.parametrize("method", slow_but(["all-linear", "dora", "ia3"], METHODS))
def test_from_get_peft_model_to_the_merged_model(
    method: str, which: str, folders: Callable[[str], FakeCheckpoint], tmp_path: Path
) -> None:
    folder = folders(which).folder
    model = load(folder)
    before = logits(model)
    adapted = peft.get_peft_model(model, METHODS[method]())
    assert_close(logits(adapted), before, 1e-5 if method in ("oft", "dora") else 1e-12)
    losses = train(adapted, rate=RATES.get(method, 1e-2))
    assert losses[-1] < losses[0] - 0.1
    trained = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))

    assert torch.equal(
        logits(peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter")), trained
    )
    dequantize_checkpoint(folder, tmp_path / "dense", dtype="float32")
    dense = peft.PeftModel.from_pretrained(load(tmp_path / "dense"), tmp_path / "adapter")
    assert_close(logits(dense), trained)
    merged = dense.merge_and_unload()
    assert_close(logits(merged), trained)
    merged.save_pretrained(tmp_path / "merged")
    assert_close(logits(load(tmp_path / "merged")), trained)

    with pytest.raises(PackedWeightError, match=r"model\.dequantize\(\), or `vqllm dequantize`"):
        adapted.merge_and_unload()
    assert torch.equal(logits(adapted), trained)
    adapted.get_base_model().dequantize()
    assert not any(isinstance(module, PackedModule) for module in adapted.modules())
    assert_close(logits(adapted), trained)
    assert_close(logits(adapted.merge_and_unload()), trained)


@pytest.mark.parametrize("which", ["plain", slow("small")])
def test_by_transformers_own_functions(
    which: str, folders: Callable[[str], FakeCheckpoint], tmp_path: Path
) -> None:
    folder = folders(which).folder
    model = load(folder)
    before = logits(model)
    assert model.hf_quantizer.is_trainable
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(model, TrainingArguments(str(tmp_path / "runs"), use_cpu=True, report_to="none"))
    model.add_adapter(METHODS["all-linear"]())
    assert torch.equal(logits(model), before)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.5
    trained = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "adapter" / "config.json").exists()
    again = load(folder)
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again), trained)
    again.disable_adapters()
    assert torch.equal(logits(again), before)
    dense = load(folder).dequantize()
    dense.load_adapter(str(tmp_path / "adapter"))
    assert_close(logits(dense), trained)


@pytest.mark.filterwarnings("ignore::UserWarning")  # it pins memory where there is no device
@pytest.mark.parametrize("own", [False, slow(True)], ids=["get_peft_model", "add_adapter"])
@pytest.mark.parametrize("checkpointing", [False, slow(True)])
def test_trainer(
    own: bool, checkpointing: bool, folders: Callable[[str], FakeCheckpoint], tmp_path: Path
) -> None:
    model = load(folders("plain").folder)
    if own:
        model.add_adapter(METHODS["all-linear"]())
    else:
        model = peft.get_peft_model(model, METHODS["all-linear"]())
    options = TrainingArguments(
        str(tmp_path / "runs"),
        max_steps=8,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=8,
        gradient_checkpointing=checkpointing,
        use_cpu=True,
        report_to="none",
    )
    row = {"input_ids": TOKENS[0], "labels": TOKENS[0]}
    trainer = Trainer(model, options, train_dataset=[row] * 8)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    saved = tmp_path / "runs" / "checkpoint-8"
    assert (saved / "adapter_model.safetensors").is_file()
    again = peft.PeftModel.from_pretrained(load(folders("plain").folder), saved)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("mode", ["off", slow("on")])
@pytest.mark.parametrize("format", slow_but(["e8p"], FORMATS))
def test_every_format_trains(format: str, mode: str, tmp_path: Path) -> None:
    set_weight_cache(mode)
    fake = fake_checkpoint(tmp_path, "qwen2", FORMATS[format], num_hidden_layers=1)
    model = peft.get_peft_model(load(fake.folder), METHODS["all-linear"]())
    losses = train(model, 6)
    assert losses[-1] < losses[0] - 0.1
    if mode == "off":
        assert all(m._dense is None for m in model.modules() if isinstance(m, PackedModule))


RECIPES = ("small", "spread-small", "kmeans", "leech", "trellis-2bit-fast", "aqlm", "grouped")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in sorted(recipes.available()) if n.startswith(RECIPES)])
def test_checkpoints_of_recipes_train(name: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama", num_hidden_layers=1, tie_word_embeddings=True)
    changes = ("calibration.sequences=8", "calibration.length=32")
    quantize(source, tmp_path / "quantized", recipe=recipes.load(name, changes))
    model = load(tmp_path / "quantized", dtype=torch.float32)
    before = logits(model)
    adapted = peft.get_peft_model(model, METHODS["all-linear"]())
    assert torch.equal(logits(adapted), before)
    losses = train(adapted)
    assert losses[-1] < losses[0] - 0.3


def test_preparation_for_training_leaves_packed_tensors_alone(
    folders: Callable[[str], FakeCheckpoint],
) -> None:
    model = load(folders("plain").folder, dtype=torch.bfloat16)
    before = packed_of(model)
    assert any(tensor.dtype == torch.float16 for tensor in before.values())
    model = peft.prepare_model_for_kbit_training(model)
    after = packed_of(model)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)
    assert model.model.norm.weight.dtype == torch.float32
    losses = train(peft.get_peft_model(model, METHODS["all-linear"]()))
    assert losses[-1] < losses[0] - 0.5


def test_initializations_that_change_weights_are_refused(
    folders: Callable[[str], FakeCheckpoint],
) -> None:
    model = load(folders("plain").folder)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa", **TASK)
    with pytest.raises(PackedWeightError, match="cannot be written into"):
        peft.get_peft_model(model, config)


def test_a_scaled_embedding_merges(tmp_path: Path) -> None:
    """Gemma multiplies looked-up rows, and so what an adapter adds to them."""
    fake = fake_checkpoint(
        tmp_path, "gemma3_text", outside=FORMATS["residual"], tie_word_embeddings=False
    )
    model = load(fake.folder)
    assert isinstance(model.get_input_embeddings(), VQEmbedding)
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens"], **TASK)
    adapted = peft.get_peft_model(model, config)
    train(adapted, 4)
    dense = copy.deepcopy(adapted)
    dense.get_base_model().dequantize()
    assert_close(logits(dense), logits(adapted))
    assert_close(logits(dense.merge_and_unload()), logits(adapted))


def test_a_copy_of_a_model_with_an_adapter(folders: Callable[[str], FakeCheckpoint]) -> None:
    model = peft.get_peft_model(load(folders("plain").folder), METHODS["dora"]())
    train(model, 2)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    assert all(isinstance(m, VQLinear) for m in model.modules() if isinstance(m, PackedModule))
