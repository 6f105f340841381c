"""Formats of other tools: each linear is decoded as a program that others wrote decodes it.

The files in `tests/data/foreign` were written by `tests/parity/foreign_oracles.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.foreign import Case, cases, linear_of, told
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
