"""transformers' generate with packed linears: with a cache of fixed size, and compiled."""

import pytest
import torch

from tests.support.tiny import save_tiny
from vqllm import api
from vqllm.recipes import from_dict
from vqllm.runtime import describe, set_weight_cache

RECIPE = from_dict(
    {
        "version": 1,
        "name": "trellis",
        "transforms": [
            {"type": "scale", "side": "in", "bits": 2},
            {"type": "hadamard", "side": "both"},
        ],
        "codec": {"type": "trellis", "bits": 2, "code": "bytes2", "state_bits": 8},
        "rounding": {"type": "nearest"},
        "calibration": {"source": ["self"], "sequences": 8, "length": 16},
    },
    "trellis",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("generation")
    source = save_tiny(root / "source")
    api.quantize(source, root / "out", recipe=RECIPE, evaluate=False, device="cpu")
    return api.load(root / "out")[0]


@pytest.fixture(params=["off", "auto"])
def _mode(request):
    set_weight_cache(request.param)
    yield
    set_weight_cache("auto")


def generate(model, **options):
    tokens = torch.arange(3, 11)[None]
    return model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        **options,
    )


@pytest.mark.usefixtures("_mode")
def test_a_cache_of_fixed_size_gives_the_same_tokens(model):
    assert torch.equal(generate(model), generate(model, cache_implementation="static"))


@pytest.mark.usefixtures("_mode")
def test_a_forward_pass_is_one_graph(model):
    tokens = torch.arange(3, 19)[None]
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected)


def test_linears_of_one_input_are_joined(model):
    groups = {run.group for run in describe(model) if run.group}
    layers = [f"model.layers.{i}" for i in range(model.config.num_hidden_layers)]
    attention = {tuple(f"{n}.self_attn.{p}_proj" for p in "qkv") for n in layers}
    assert groups == attention | {(f"{n}.mlp.gate_proj", f"{n}.mlp.up_proj") for n in layers}


def test_the_model_says_that_it_can_be_compiled(model):
    assert model.hf_quantizer.is_compileable
