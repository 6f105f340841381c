"""A model with several lists of decoder layers says which of them stays as it is."""

from pathlib import Path

import pytest

from tests.support.tiny import tiny_model, tiny_tokenizer
from vqllm import recipes
from vqllm.hf.decoder_layers import layer_names
from vqllm.plan import other_lists
from vqllm.quantization import checks


def test_the_second_of_two_equal_lists_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "model"
    tiny_model("hrm_text").save_pretrained(source, save_original_format=False)
    tiny_tokenizer().save_pretrained(source)
    recipe = recipes.load("rtn-4bit", ())
    other_lists._say.cache_clear()
    for _ in range(2):
        checks.check_model(source, "two", recipe)
    said = [r.getMessage() for r in caplog.records if r.name == other_lists.__name__]
    assert said == [
        "two has several lists of decoder layers: those of model.L_module.layers are quantized, "
        "those of model.H_module.layers stay as they are"
    ]


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe", "mixtral"])
def test_a_list_of_another_kind_is_no_second_one(arch: str) -> None:
    model = tiny_model(arch, num_local_experts=2, num_experts=2)
    assert other_lists.other_lists(model, layer_names(model)) == []
