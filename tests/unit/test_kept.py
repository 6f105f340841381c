"""Which linears stay because of what they do: routers, and linears of few rows."""

import math
import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from tests.support.tiny import ARCHITECTURES, tiny_config
from vqllm import recipes
from vqllm.allocation.choose_codecs import choose_codecs
from vqllm.errors import RecipeError
from vqllm.hf.decoder_layers import layer_names
from vqllm.hf.linears import is_linear
from vqllm.plan.costs import option_costs, options
from vqllm.plan.kept import has_few_rows, kept_linears
from vqllm.plan.not_quantized import why_not_quantized
from vqllm.plan.selection import Selection, select
from vqllm.recipes import Recipe

KINDS = ("routers", "few_rows")
REAL: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    # Values of the configuration (all others are those of a published model), routers, few rows.
    "afmoe": ({}, {"mlp.router.gate"}, set()),
    "gemma4_text": (
        {"enable_moe_block": True, "num_experts": 128, "moe_intermediate_size": 704},
        {"router.proj"},
        set(),
    ),
    "hunyuan_v1_moe": ({"head_dim": 128, "num_experts": 16}, {"mlp.gate.wg"}, set()),
    "jetmoe": ({}, {"mlp.router.layer", "self_attention.experts.router.layer"}, set()),
    "laguna": ({}, set(), {"self_attn.g_proj"}),
    "longcat_flash": ({}, {"mlp.router.classifier"}, set()),
    "qwen3_next": ({}, set(), {"linear_attn.in_proj_ba", "mlp.shared_expert_gate"}),
    "qwen3_5_text": ({}, set(), {"linear_attn.in_proj_a", "linear_attn.in_proj_b"}),
    "zaya": (
        {},
        {"mlp.gate.down_proj", *(f"mlp.gate.router_mlp.{n}" for n in ("fc1", "fc2", "out_proj"))},
        set(),
    ),
    # Nothing else of them has few rows: x_proj (80 x 1536), low ranks, one head of keys (256).
    "deepseek_v3": ({}, set(), set()),
    "falcon_mamba": ({}, set(), set()),
    "gemma": ({"num_key_value_heads": 1}, set(), set()),
    "mixtral": ({}, set(), set()),
}


def reasons_of(kind: str, **values: Any) -> dict[str, str]:
    """Those of a model of this kind at its real size, by the name inside a layer."""
    config = AutoConfig.for_model(kind, num_hidden_layers=4, **values)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    return {
        name: reason
        for layer in layer_names(model)
        for name, reason in kept_linears(model.get_submodule(layer), KINDS).items()
    }


@pytest.mark.parametrize("kind", REAL)
def test_routers_and_gates_of_real_sizes_stay(kind: str) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip("this transformers does not have it")
    values, routers, few_rows = REAL[kind]
    found = reasons_of(kind, **values)
    assert {name for name, reason in found.items() if reason.startswith("a router")} == routers
    assert found.keys() - routers == few_rows


@pytest.mark.parametrize("hidden_size", [64, 37, 344])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_of_a_tiny_dense_model_stays(arch: str, hidden_size: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(arch, hidden_size=hidden_size))
    for layer in layer_names(model):
        assert not kept_linears(model.get_submodule(layer), KINDS)


@pytest.mark.parametrize(
    ("rows", "cols", "few"),
    [
        (1, 64, True),
        (64, 2048, True),
        (32, 1024, True),
        (64, 576, False),
        (65, 1 << 14, False),
        (32, 64, False),
    ],
)
def test_few_rows_are_few_for_the_columns_too(rows: int, cols: int, few: bool) -> None:
    assert has_few_rows(nn.Linear(cols, rows, device="meta")) == few


class Block(nn.Module):
    """A mixture whose router is a linear of any name."""

    def __init__(self, experts: nn.Module, num_experts: int, name: str = "choose") -> None:
        super().__init__()
        self.experts = experts
        self.add_module(name, nn.Linear(64, num_experts))
        self.shared = nn.Sequential(nn.Linear(64, num_experts), nn.Linear(num_experts, 64))


class Numbered(nn.Module):
    """Experts as children "0" to "7", beside their activation."""

    def __init__(self, stated: bool) -> None:
        super().__init__()
        if stated:
            self.act = nn.SiLU()
            self.num_experts = 8
        for i in range(8):
            self.add_module(str(i), nn.ModuleDict({"down_proj": nn.Linear(32, 64)}))


class Fused(nn.Module):
    def __init__(self, **flags: Any) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.empty(8, 64, 32))
        for name, value in flags.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    "experts",
    [
        nn.ModuleList(nn.Linear(64, 64) for _ in range(8)),
        Numbered(stated=True),
        Numbered(stated=False),
        Fused(num_experts=8),
        Fused(has_gate=True, is_transposed=False),
        Fused(is_transposed=True),
    ],
    ids=["list", "numbered", "digits alone", "fused", "flags", "one flag"],
)
def test_a_router_is_known_by_the_experts_beside_it(experts: nn.Module) -> None:
    layer = nn.ModuleDict({"attention": nn.Linear(64, 8), "mlp": Block(experts, 8)})
    assert kept_linears(layer, KINDS) == {
        "mlp.choose": "a router, it decides which experts run (8 x 64)"
    }
    assert not kept_linears(layer, ["few_rows"])


class TopKRouter(nn.Module):
    """A router that is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 8
        self.weight = nn.Parameter(torch.empty(8, 64))


def test_a_router_that_is_a_parameter_is_called_one() -> None:
    experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))
    mixture = nn.ModuleDict({"experts": experts, "gate": TopKRouter()})
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": mixture})])})
    reasons = why_not_quantized(model, ["layers.0"], (), (), {})
    assert reasons["layers.0.mlp.gate"] == "a router, it decides which experts run (8 x 64)"
    assert kept_linears(model["layers"][0], KINDS) == {}
    model["layers"][0]["other"] = TopKRouter()  # beside no experts
    reasons = why_not_quantized(model, ["layers.0"], (), (), {})
    assert reasons["layers.0.other"].startswith("TopKRouter is not a torch.nn.Linear")


def test_names_are_asked_for_where_the_number_of_experts_does_not_help() -> None:
    other = Block(Fused(has_gate=True), 12, "gate")  # outputs for experts that do nothing too
    assert kept_linears(other, KINDS).keys() == {"gate"}
    alone = nn.ModuleDict({"router": nn.Linear(64, 12), "gate": nn.Linear(64, 12)})
    assert kept_linears(alone, KINDS).keys() == {"router"}
    block = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))  # whatever its name, it is none
    assert not kept_linears(nn.ModuleDict({"router": block}), KINDS)


def recipe(**changes: object) -> Recipe:
    return recipes.from_dict({"name": "test", "base": "e8p-2bit", **changes}, "test")


def selected(**changes: object) -> tuple[set[str], dict[str, str]]:
    """Names and reasons in a tiny mixture whose shared expert has a gate."""
    with torch.device("meta"):
        config = tiny_config("qwen2_moe", num_experts=4, num_experts_per_tok=2)
        model = AutoModelForCausalLM.from_config(config)
    selection = select(model, layer_names(model), recipe(**changes), lambda names: 0)
    linears = {name: m for name, m in model.named_modules() if is_linear(m)}
    assert selection.of(linears).keys() == selection.shapes.keys()
    return set(selection.shapes), dict(selection.kept)


def test_a_recipe_brings_them_in() -> None:
    names, kept = selected()
    gates = {f"model.layers.{i}.mlp.shared_expert_gate" for i in range(2)}
    assert kept == dict.fromkeys(gates, "a linear of few rows (1 x 64)")
    assert not names & gates
    assert "model.layers.1.self_attn.k_proj" in names
    assert "model.layers.1.mlp.shared_expert.down_proj" in names  # 64 x 5632 returns a whole state
    assert selected(skip_kinds=[]) == (names | gates, {})
    assert selected(skip_kinds=["routers", "larger"]) == (names | gates, {})
    assert selected(skip=["gate$"]) == (names, kept)


def test_the_key_is_recorded_where_it_is_not_the_default() -> None:
    assert "skip_kinds" not in recipe().to_dict()
    assert "skip_kinds:\n- routers\n- few_rows\n- larger\n" in recipe().to_yaml()
    changed = recipe(skip_kinds=["few_rows"])
    assert changed.to_dict()["skip_kinds"] == ["few_rows"]
    assert recipes.from_dict(changed.to_dict(), "again") == changed
    with pytest.raises(RecipeError, match=re.escape("skip_kinds")):
        recipe(skip_kinds=["gates"])


KMEANS = {"type": "kmeans", "tile_rows": 1, "tile_cols": 4, "index_bits": 8}


def sizes(**changes: object) -> Selection:
    """What is chosen in a model of 37 features, whose weights are stored in 16 bits."""
    with torch.device("meta"):
        config = tiny_config("llama", hidden_size=37, intermediate_size=530)
        model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    weights = dict(model.named_parameters())
    chosen = recipe(codec=KMEANS, transforms=[], **changes)
    layers = layer_names(model)
    return select(model, layers, chosen, lambda names: sum(2 * weights[n].numel() for n in names))


def test_what_would_be_larger_stays() -> None:
    selection = sizes()
    names = {name.rpartition(".")[2] for name in selection.shapes}
    assert names == {"gate_proj", "up_proj", "down_proj"}
    # A table of 256 x 4 values of 16 bits, beside 37 x 10 bytes of codes for 16 x 37 weights.
    found = selection.larger["model.layers.1.self_attn.k_proj"]
    bits = (16 * 256 * 4 + 8 * 16 * 10) / (16 * 37)
    assert found == (
        f"packed it would not be smaller (16 x 37: {bits:.3g} bits a weight, 16 as it is)"
    )
    assert set(selection.limits.values()) == {16 * 37 * 530}
    assert selection.kept == selection.larger


def test_a_recipe_lets_matrices_become_larger() -> None:
    selection = sizes(skip_kinds=["routers", "few_rows"])
    assert len(selection.shapes) == 14
    assert set(selection.limits.values()) == {math.inf}
    assert not selection.kept


def test_a_codec_that_makes_a_linear_larger_is_no_option() -> None:
    budget = {"bits": 12.0, "codecs": [{"type": "e8p"}, KMEANS]}
    selection = sizes(allocation=budget)
    chosen = recipe(codec=KMEANS, transforms=[], allocation=budget)
    assert not selection.larger
    losses = {name: torch.tensor([2.0, 1.0]) for name in selection.shapes}
    losses["model.layers.0.mlp.up_proj"] = torch.empty(0)
    picks = choose_codecs(selection, losses, chosen)
    for name, (number, loss) in picks.items():
        small = "self_attn" in name or name == "model.layers.0.mlp.up_proj"
        assert number == (0 if small else 1), name
        assert loss == (0 if not losses[name].numel() else 2 if small else 1)


def test_options_cost_less_than_a_limit() -> None:
    shape = (16, 37)
    chosen = recipe(codec=KMEANS, transforms=[])
    (cost,) = option_costs(shape, chosen)
    assert options(shape, chosen, cost) == {}
    assert options(shape, chosen, cost + 1) == options(shape, chosen, math.inf) == {0: cost}
