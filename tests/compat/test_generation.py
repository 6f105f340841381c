"""transformers' generate with packed linears: with a cache of fixed size, and compiled."""

import copy
import shutil
from typing import Any

import pytest
import torch
from transformers import CompileConfig

from tests.support.pages import ROOT, blocks, text_of
from tests.support.tiny import save_tiny
from vqllm import api
from vqllm.recipes import from_dict
from vqllm.runtime import describe, set_weight_cache
from vqllm.runtime.replace import group_inputs
from vqllm_kernels.cpu import instructions

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


@pytest.fixture(scope="module")
def packed(model):
    if instructions.instructions() == "portable":
        pytest.skip("decoded weights are faster here")
    own = copy.deepcopy(model).to(torch.bfloat16)
    group_inputs(own)
    return own


def test_compiled_decoding_with_a_static_cache_gives_the_same_tokens(packed):
    settings: Any = {"fullgraph": True, "backend": "aot_eager", "mode": None}
    config: Any = CompileConfig(**settings)
    config._compile_all_devices = True  # transformers compiles on GPUs by itself
    options = {"cache_implementation": "static", "compile_config": config}
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(generate(packed), generate(packed, **options))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, inside its compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's default backend needs a compiler")
def test_the_example_of_the_page_runs(packed):
    (example,) = [
        block.body
        for block in blocks(text_of(ROOT / "docs" / "kernels.md"))
        if block.title == "compiled decoding"
    ]
    ids = torch.arange(3, 11)[None]
    names = {"model": packed, "tokens": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}
    torch.compiler.reset()
    exec(example, names)
    assert names["text"].shape[1] > ids.shape[1]


def test_a_graph_has_one_operator_for_the_linears_of_an_input(packed):
    found = []

    def look(graph, inputs):
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        found.extend(str(node.target) for node in calls)
        found.append(f"{len(inputs)} inputs")
        return graph.forward

    tokens = torch.arange(3, 19)[None]
    with torch.no_grad():
        expected = packed(tokens, use_cache=False).logits
        compiled = torch.compile(packed.forward, fullgraph=True, backend=look)
        assert torch.equal(compiled(tokens, use_cache=False).logits, expected)
        packed.model.layers[0].self_attn.q_proj.t2_signs.bitwise_not_()
        changed = compiled(tokens, use_cache=False).logits
        assert not torch.equal(changed, expected)
        assert torch.equal(changed, packed(tokens, use_cache=False).logits)
    layers = packed.config.num_hidden_layers
    assert sum("packed_products" in target for target in found) == 4 * layers
    assert not any("dense" in target or "vqllm_kernels" in target for target in found)
    # A number for each operator, the norms, embedding, head: and no packed tensor.
    assert int(found[-1].split()[0]) < 10 * layers + 10


def test_linears_of_one_input_are_joined(model):
    groups = {run.group for run in describe(model) if run.group}
    layers = [f"model.layers.{i}" for i in range(model.config.num_hidden_layers)]
    attention = {tuple(f"{n}.self_attn.{p}_proj" for p in "qkv") for n in layers}
    assert groups == attention | {(f"{n}.mlp.gate_proj", f"{n}.mlp.up_proj") for n in layers}


def test_the_model_says_that_it_can_be_compiled(model):
    assert model.hf_quantizer.is_compileable
