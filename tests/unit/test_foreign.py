"""Formats of other tools: each linear is decoded as a program that others wrote decodes it.

The files in `tests/data/foreign` were written by `tests/parity/foreign_oracles.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.foreign import Case, cases, decoded, linear_of, told
from vqllm.errors import ModelError
from vqllm.foreign.base import CannotHoldError

CASES = cases(Path(__file__).parents[1] / "data" / "foreign")
HELD = [case for case in CASES if case.is_held]


@pytest.mark.parametrize("case", CASES, ids=told)
def test_weights_are_those_of_another_program(case: Case) -> None:
    dense = linear_of(case).decode(torch.float32)
    torch.testing.assert_close(dense, case.expected.float(), rtol=case.rtol, atol=case.atol)


@pytest.mark.parametrize("case", CASES, ids=told)
def test_blocks_of_rows_make_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = linear_of(case).decode(torch.float32)
    monkeypatch.setattr("vqllm.foreign.base.BLOCK_WEIGHTS", 5 * whole.shape[1])
    assert torch.equal(linear_of(case).decode(torch.float32), whole)


@pytest.mark.parametrize("case", HELD, ids=told)
def test_our_format_holds_the_same_weights(case: Case) -> None:
    linear = linear_of(case)
    spec, make = linear.pack()
    tensors = make()
    for name, layout in spec.layout().items():
        assert (tuple(tensors[name].shape), tensors[name].dtype) == (layout.shape, layout.dtype)
    assert spec.problem(tensors) is None
    assert torch.equal(spec.dequantize(tensors), linear.decode(torch.float32))


@pytest.mark.parametrize("case", [case for case in CASES if not case.is_held], ids=told)
def test_what_our_format_cannot_hold_is_said(case: Case) -> None:
    with pytest.raises(CannotHoldError):
        linear_of(case).pack()


@pytest.mark.parametrize("case", CASES, ids=told)
def test_a_missing_or_misshapen_tensor_is_named(case: Case) -> None:
    optional = {"g_idx", "weight_zero_point", "mcg", "mul1", "rcp", "tp_rank"}
    for name, tensor in case.tensors.items():
        marker = name == linear_of(case).format.marker
        rest = {key: value for key, value in case.tensors.items() if key != name}
        if name not in optional:
            with pytest.raises(ModelError, match=f"no {name}|no module has"):
                linear_of(case, rest)
        if marker or tensor.dim() == 0:
            continue
        changed = {**rest, name: torch.cat([tensor, tensor[:1]])}
        with pytest.raises(ModelError, match=r"expected|and there"):
            linear_of(case, changed)


@pytest.mark.parametrize("case", CASES, ids=told)
def test_an_unknown_option_is_named(case: Case) -> None:
    with pytest.raises(ModelError, match="has rotated: 'yes', an option of"):
        linear_of(case, config={**case.config, "rotated": "yes"})


def _case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gptq-4", {"bits": 5}, "bits is '5'; of gptq can be read: 2, 3, 4, 8"),
        ("gptq-4", {"bits": 8}, r"qweight is I32 \(12, 32\), expected"),
        ("gptq-4", {"group_size": 48}, r"scales is F16 \(3, 32\), expected 2 groups"),
        ("gptq-4", {"group_size": 0}, "group_size is '0'"),
        ("gptq-4", {"checkpoint_format": "marlin"}, "can be read: 'gptq', 'gptq_v2'"),
        ("awq-32", {"bits": 8}, "bits is '8'; of awq can be read: 4"),
        ("awq-32", {"version": "gemv"}, "version is 'gemv'; of awq can be read: 'gemm'"),
        ("awq-32", {"group_size": 64}, r"qzeros is I32 \(3, 4\), expected I32 \(2, 4\)"),
        ("compressed-4-32", {"format": "float-quantized"}, "format is 'float-quantized'"),
        ("compressed-4-32", {"config_groups": {}}, "config_groups is '{}'"),
        ("aqlm-2x8-1x8", {"nbits_per_codebook": 17}, r"can be read: 1\.\.16"),
        ("aqlm-2x8-1x8", {"num_codebooks": 3}, "expected I8"),
        ("quip-e8p12", {"codebook": "E8P24"}, "'e8p12', 'e8p12rvq3b', 'e8p12rvq4b', 'd4'"),
        ("quip-e8p12", {"codebook_version": 0}, "codebook_version is '0'; .* can be read: 1"),
        (
            "quip-e8p12",
            {"codebook": "E8P12RVQ4B"},
            r"Qidxs is I64 \(32, 6\), expected I64 \(32, 12",
        ),
        ("quip-e8p12", {"rescale_WH": True}, "but no scaleWH"),
        ("quip-e8p12", {"lora_rank": 2}, "but no A"),
        ("quip-d4", {"outlier_channel_split": True}, "outlier_channel_split is 'True'"),
        ("qtip-1mad-2", {"decode_mode": "4mad"}, "decode_mode is '4mad'"),
        ("qtip-1mad-2", {"K": 3}, r"trellis is I16 \(12, 32\), expected I16 \(12, 48\)"),
        ("qtip-1mad-2", {"L": 1}, r"L is '1'; of qtip can be read: at least K · V"),
        ("qtip-quantlut_sym-2", {"V": 1, "L": 16}, "with V = 2, of quantlut_sym"),
        ("vptq-8-8x1", {"shared_layer_config": {}}, "an object with the options of each linear"),
    ],
)
def test_a_value_that_the_format_has_not_is_named(
    name: str, changes: Mapping[str, Any], said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        linear_of(_case(name), config={**_case(name).config, **changes})


def test_inputs_quantized_too_are_refused() -> None:
    case = _case("compressed-4-32")
    group = {**case.config["config_groups"]["group_0"], "input_activations": {"num_bits": 8}}
    with pytest.raises(ModelError, match="has input_activations"):
        linear_of(case, config={**case.config, "config_groups": {"group_0": group}})


def test_a_group_that_there_is_not_is_named() -> None:
    case = _case("gptq-4-act-order")
    tensors = {**case.tensors, "g_idx": case.tensors["g_idx"] + 1}
    with pytest.raises(ModelError, match=r"has groups 1\.\.3, and there are scales for 0\.\.2"):
        linear_of(case, tensors).decode(torch.float32)


def test_single_modules_may_have_other_bits_where_the_configuration_says_so() -> None:
    case = _case("gptq-8")
    config = {**case.config, "bits": 4, "dynamic": {"+:.*": {"bits": 8}}}
    assert torch.equal(
        linear_of(case, config=config).decode(torch.float32),
        linear_of(case).decode(torch.float32),
    )


def _layer(case: Case, **changes: Any) -> dict[str, Any]:
    """The configuration of a case of VPTQ with other options of its linear."""
    layer = case.config["shared_layer_config"]["up_proj"] | changes
    return case.config | {"shared_layer_config": {"up_proj": layer}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_centroids": [-1, 100]}, r"num_centroids is .* can be read: a power of two"),
        ({"vector_lens": 8}, "two numbers: of outliers"),
        ({"group_size": 95}, "what makes 96 inputs with the other options"),
        ({"outlier_size": 4}, "outlier_size is '4'"),
        ({"num_centroids": [-1, 512]}, r"indices is I32 \(1, 4, 24\), expected I32 \(1, 4, 27\)"),
        ({"vector_quant_dim": "in"}, "vector_quant_dim is 'in'"),
        ({"rotated": 3}, "has rotated: '3', an option of vptq that is not known"),
    ],
)
def test_a_value_of_a_linear_that_vptq_has_not_is_named(
    changes: Mapping[str, Any], said: str
) -> None:
    case = _case("vptq-8-8x1")
    with pytest.raises(ModelError, match=said):
        linear_of(case, config=_layer(case, **changes))


def test_a_linear_of_vptq_without_options_is_named() -> None:
    case = _case("vptq-8-8x1")
    config = {"quant_method": "vptq", "config_for_layers": {"x": _layer(case)}}
    config["config_for_layers"]["x"] = case.config["shared_layer_config"]["up_proj"]
    with pytest.raises(ModelError, match=r"config_for_layers .* does not have its name"):
        linear_of(case, config=config)


def test_indices_of_vptq_that_are_not_packed_are_the_same() -> None:
    case = _case("vptq-5+7-6x1-bias")
    words = case.tensors["indices"].long() & 0xFFFFFFFF
    bits = (words[..., None] >> torch.arange(32) & 1).flatten(2)[..., : 48 * 12]
    both = (bits.unflatten(-1, (48, 12)) << torch.arange(12)).sum(-1)
    tensors = case.tensors | {
        "indices": (both & 31).to(torch.int16),
        "res_indices": (both >> 5).to(torch.int16).view(torch.float16),
        "perm": case.tensors["perm"].long(),
    }
    config = _layer(case, is_indice_packed=False)
    unpacked = linear_of(case, tensors, config)
    assert torch.equal(unpacked.decode(torch.float32), linear_of(case).decode(torch.float32))
    tensors["indices"][0, 0, 0] = 32
    with pytest.raises(ModelError, match=r"its indices are 0\.\.32, of 32 entries"):
        linear_of(case, tensors, config).decode(torch.float32)


def test_an_order_of_vptq_that_repeats_an_input_is_named() -> None:
    case = _case("vptq-outliers")
    tensors = case.tensors | {"perm": torch.zeros_like(case.tensors["perm"])}
    with pytest.raises(ModelError, match=r"perm does not have every input of 0\.\.95 once"):
        linear_of(case, tensors).decode(torch.float32)


def test_another_codebook_than_config_says_is_named() -> None:
    case = _case("quip-e8p12")
    tensors = case.tensors | {"codebook_id": torch.tensor(17)}
    with pytest.raises(ModelError, match=r"codebook_id is 17, and E8P12 of config.json has 7"):
        linear_of(case, tensors)


def test_a_size_without_a_transform_is_named() -> None:
    case = _case("quip-hi4b1c")
    tensors = case.tensors | {"SV": torch.ones(44).half(), "Qidxs": case.tensors["Qidxs"][:1]}
    tensors["Qidxs"] = tensors["Qidxs"].expand(44, -1)
    with pytest.raises(
        ModelError, match=r"SV is F16 \(44,\), expected a power of two, or one times"
    ):
        linear_of(case, tensors)


def test_other_bits_of_v_proj() -> None:
    case = _case("qtip-3inst-5")
    tensors = {f"model.layers.0.self_attn.v_proj.{key}": own for key, own in case.tensors.items()}
    (weight,) = decoded(tensors, {"quip_params": case.config | {"K": 2, "K_v_proj": 5}}).values()
    torch.testing.assert_close(weight, case.expected, rtol=case.rtol, atol=case.atol)


def test_a_fused_linear_is_its_parts_with_their_scales() -> None:
    case = _case("quip-e8p12")
    scales = torch.tensor([0.5, 2.0, 3.0])
    tensors = case.tensors | {"fuse_scales": scales}
    tensors = {f"model.layers.0.self_attn.qkv_proj.{key}": own for key, own in tensors.items()}
    config = {
        "quip_params": case.config,
        "hidden_size": 192,
        "head_dim": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    found = decoded(tensors, config)
    assert [name.rpartition(".")[2] for name in found] == ["q_proj", "k_proj", "v_proj"]
    whole = linear_of(case).decode(torch.float32)
    for weight, part, scale in zip(found.values(), whole.split([16, 8, 8]), scales, strict=True):
        torch.testing.assert_close(weight, part * scale)
    with pytest.raises(ModelError, match=r"as many outputs as config.json has heads"):
        decoded(tensors, config | {"num_attention_heads": 4})
