"""A recipe made for several processes: where transforms end, and which numbers are refused."""

import logging
import re
from typing import Any

import pytest
import torch

from tests.support.tiny import tiny_model
from vqllm import recipes
from vqllm.errors import RecipeError
from vqllm.plan.cuts import COLUMNS, ROWS, Cut, cuts_of, divided
from vqllm.plan.packed_spec import linear_spec
from vqllm.quantization.linear import Statistics, quantize_group
from vqllm.recipes import Recipe
from vqllm.transforms.hadamard import RandomizedHadamard
from vqllm_kernels.transforms import HadamardSpec

SHAPES = {
    "layers.0.self_attn.q_proj": (576, 576),
    "layers.0.self_attn.k_proj": (192, 576),
    "layers.0.self_attn.o_proj": (576, 576),
    "layers.0.mlp.experts.1.gate_proj": (1536, 576),
    "layers.0.mlp.experts.1.down_proj": (576, 1536),
}


def recipe(num: int, name: str = "trellis-2bit-fast", **changes: Any) -> Recipe:
    made = recipes.load(name)
    return Recipe.model_validate({**made.to_dict(), "tensor_parallel": num, **changes})


def model(heads: int = 9, keys: int = 3) -> torch.nn.Module:
    sizes = {"hidden_size": 8 * heads, "num_attention_heads": heads, "num_key_value_heads": keys}
    return tiny_model("llama", **sizes)


def orders(num: int) -> dict[str, dict[str, int]]:
    """Features that are mixed, on each side of each linear."""
    made = recipe(num)
    cuts = cuts_of(model(), SHAPES, made)
    found = {}
    for name, shape in SHAPES.items():
        spec = linear_spec(*shape, divided(made, cuts.get(name)))
        hadamards = [t for t in spec.transforms if isinstance(t, HadamardSpec)]
        found[name.rpartition(".")[2]] = {t.side: t.order for t in hadamards}
    return found


def test_transforms_mix_all_that_a_process_has() -> None:
    assert orders(1) == {
        "q_proj": {"in": 576, "out": 576},
        "k_proj": {"in": 576, "out": 192},
        "o_proj": {"in": 576, "out": 576},
        "gate_proj": {"in": 576, "out": 1536},
        "down_proj": {"in": 1536, "out": 576},
    }
    assert orders(3) == {
        "q_proj": {"in": 576, "out": 192},
        "k_proj": {"in": 576, "out": 64},
        "o_proj": {"in": 192, "out": 576},
        "gate_proj": {"in": 576, "out": 512},
        "down_proj": {"in": 512, "out": 576},
    }


def test_blocks_of_a_recipe_stay_and_divide_parts() -> None:
    transform = RandomizedHadamard(side="in", block=128)
    assert transform.spec(1536).block == 128
    assert transform.divided(192).spec(576).block == 96
    assert transform.divided(64).spec(576).block == 64
    assert RandomizedHadamard(side="in").divided(576).spec(576).block is None


def test_one_process_changes_nothing() -> None:
    assert cuts_of(model(), SHAPES, recipe(1)) == {}
    made = recipe(1)
    assert divided(made, None) is made
    assert "tensor_parallel" not in made.to_dict()
    assert recipe(3).to_dict()["tensor_parallel"] == 3


def test_heads_are_whole() -> None:
    message = "tensor_parallel is 2, but 9 attention heads do not divide by 2.*by 1, 3: --set "
    with pytest.raises(RecipeError, match=message + "tensor_parallel=3"):
        cuts_of(model(), SHAPES, recipe(2))
    with pytest.raises(RecipeError, match="4 heads of keys and values neither divide by 6 nor"):
        cuts_of(model(12, 4), SHAPES, recipe(6))


def test_fewer_heads_of_keys_than_processes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        cuts = cuts_of(model(8, 2), {"k_proj": (128, 64), "q_proj": (512, 64)}, recipe(4))
    assert cuts == {"k_proj": Cut("out", 64), "q_proj": Cut("out", 128)}
    assert "2 heads of keys and values, so 2 processes hold the same ones" in caplog.text


def test_tiles_and_transforms_end_where_parts_do() -> None:
    with pytest.raises(RecipeError, match=r"128 rows.*have 32 of them, but tiles have 64 rows"):
        cuts_of(model(8, 4), {"mlp.up_proj": (128, 64)}, recipe(4))
    with pytest.raises(RecipeError, match="1536 rows, and they do not divide"):
        cuts_of(model(), SHAPES, recipe(9))
    with pytest.raises(RecipeError, match=r"uniform-v1 packs a row as a whole.*divided by 1: "):
        cuts_of(model(8, 4), {"down_proj": (128, 64)}, recipe(2, "gptq-4bit"))
    permuted = recipe(2, "e8p-2bit", transforms=[{"type": "permutation", "side": "in"}])
    with pytest.raises(RecipeError, match="the transform permutation mixes them"):
        cuts_of(model(8, 4), {"down_proj": (128, 64)}, permuted)
    assert cuts_of(model(8, 4), {"up_proj": (128, 64)}, permuted) == {"up_proj": Cut("out", 64)}


def test_without_a_hadamard_transform_only_sizes_are_checked() -> None:
    plain = recipe(3, "e8p-2bit", transforms=[])
    cuts = cuts_of(model(), SHAPES, plain)
    assert set(cuts) == set(SHAPES)
    assert linear_spec(576, 576, divided(plain, Cut("out", 192))).transforms == ()


def test_several_matrices_in_one_are_not_cut(caplog: pytest.LogCaptureFixture) -> None:
    assert not ROWS & COLUMNS
    with caplog.at_level(logging.WARNING):
        assert cuts_of(model(), {"self_attn.qkv_proj": (960, 576)}, recipe(3)) == {}
    assert "it is not known how qkv_proj are shared out" in caplog.text


@pytest.mark.parametrize("num", [0, -1, 1.5, "two"])
def test_what_is_no_number_of_processes(num: Any) -> None:
    with pytest.raises(RecipeError, match=re.escape("tensor_parallel: ")):
        recipes.from_dict({"name": "a", "base": "e8p-2bit", "tensor_parallel": num}, "a")


def test_a_group_whose_linears_end_elsewhere() -> None:
    """q, k and v share the transform of their input and have their own of the output."""
    made = recipe(2, "e8p-2bit")
    generator = torch.Generator().manual_seed(0)
    W = {name: torch.randn(rows, 64, generator=generator) for name, rows in (("q", 64), ("k", 32))}
    cuts = {"q": Cut("out", 32), "k": Cut("out", 16)}
    q, k = quantize_group(W, Statistics(torch.eye(64), 100), made, cuts=cuts)
    assert [t.order for t in q.spec.transforms if isinstance(t, HadamardSpec)] == [64, 32]
    assert [t.order for t in k.spec.transforms if isinstance(t, HadamardSpec)] == [64, 16]
    for done, W_RC in zip((q, k), W.values()):
        error = (done.spec.dequantize(done.tensors) - W_RC).square().mean() / W_RC.square().mean()
        assert error < 0.12
