"""transformers' rules where linears have tensors of their own: what they do not concern, and what
saving undoes."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from tests.support.architectures import tiny_config
from vqllm.hf.linear_form import to_linear_form
from vqllm.hf.rules import (
    OthersConverter,
    by_kind,
    made_together,
    undone_by_saving,
    with_linears,
    without_merged,
)

EXPERTS = "model.layers.0.mlp.experts"


def merging() -> WeightConverter:
    return WeightConverter(
        ["experts.*.w1.weight", "experts.*.w3.weight"],
        "experts.gate_up_proj",
        [MergeModulelist(dim=0), Concatenate(dim=1)],
    )


def splitting() -> WeightConverter:
    """For any module: its patterns are parts of the names of all projections."""
    return WeightConverter("shared_w13", ["gate_proj", "up_proj"], [Chunk(dim=1)])


def renamed(name: str, rules: list[Any], reverse: bool = False) -> str:
    renamings, converters = by_kind(rules)
    return rename_source_key(name, renamings, converters, reverse=reverse)[0]


def test_only_rules_that_make_what_is_gone_are_left_out() -> None:
    rules: list[Any] = [merging(), splitting(), WeightRenaming("experts", "mlp.experts")]
    assert without_merged(rules, {f"{EXPERTS}.gate_up_proj"}) == rules[1:]
    assert without_merged(rules, {"model.layers.0.mlp.up_proj"}) == [rules[0], rules[2]]
    assert without_merged(rules, ()) == rules


@pytest.mark.parametrize("in_model", ["model.", ""])
@pytest.mark.parametrize("in_files", ["model.", ""])
def test_a_converter_leaves_linears_with_names_of_their_own_alone(
    in_model: str, in_files: str
) -> None:
    """The model, and the files, may have its prefix or lack it."""
    module = "layers.0.mlp.experts.3.gate_proj"
    merges = WeightConverter(
        ["gate_proj.weight", "up_proj.weight"], "gate_up.weight", [Concatenate(dim=0)]
    )
    (rule,) = with_linears([merges], (), {f"{in_model}{module}"}, "model")
    own = f"{in_files}{module}.weight"
    assert renamed(own, [rule]) == own
    other = "model.layers.0.mlp.gate_proj.weight"
    assert renamed(other, [rule]) == "model.layers.0.mlp.gate_up.weight"


def test_saving_leaves_them_alone_as_well() -> None:
    own, other = "model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj"
    (rule,) = with_linears([splitting()], (), {own}, "model")
    reverse = copy.deepcopy(rule).reverse_transform()
    assert isinstance(reverse, OthersConverter)
    assert renamed(f"{own}.codes", [reverse], reverse=True) == f"{own}.codes"
    assert (
        renamed(f"{other}.codes", [reverse], reverse=True) == "model.layers.1.mlp.shared_w13.codes"
    )
    assert rule.rule.target_patterns == ["gate_proj", "up_proj"]


def test_saving_undoes_what_was_used_and_what_only_packed_tensors_need() -> None:
    used = WeightRenaming("block_sparse_moe", "mlp")
    packed = WeightRenaming("input_linear.weight", "experts.gate_up_proj")
    other_layout = WeightRenaming(r"^layers\.", "model.layers.")
    rules: list[Any] = [used, packed, other_layout, merging()]
    kept = ["model.layers.0.mlp.router.weight", "model.norm.weight"]
    undone = undone_by_saving(rules, [used], kept)
    assert undone == [used, packed, rules[3]]
    assert undone_by_saving(rules, rules, kept) == rules


def test_tensors_that_one_rule_is_undone_for_are_made_together() -> None:
    names = [
        f"{layer}.{key}"
        for layer in ("layers.0", "layers.1")
        for key in ("up_proj", "gate_proj", "down_proj")
    ]
    groups = made_together(names, [splitting()])
    assert [sorted(group) for group in groups] == [
        ["layers.0.gate_proj", "layers.0.up_proj"],
        ["layers.0.down_proj"],
        ["layers.1.gate_proj", "layers.1.up_proj"],
        ["layers.1.down_proj"],
    ]


def test_experts_of_one_tensor_are_one_linear_in_both_places() -> None:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(tiny_config("mixtral"))
    first, second = (model.model.layers[i].mlp.experts for i in (0, 1))
    second.gate_up_proj = first.gate_up_proj
    to_linear_form(model)
    one, two = (model.model.layers[i].mlp.experts.expert(2) for i in (0, 1))
    assert one.up_proj.weight is two.up_proj.weight
    assert one.down_proj.weight is not two.down_proj.weight
    assert isinstance(two.up_proj, nn.Linear)
