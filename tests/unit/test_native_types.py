"""llama.cpp's native types: bytes by the decoders of the package `gguf`, errors by comparison."""

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from vqllm.core import metrics
from vqllm.errors import RecipeError
from vqllm.export.native_rounding import round_matrix, round_to_nearest
from vqllm.export.native_types import TYPES, type_for, type_of

R, C = 24, 512


@pytest.fixture(scope="module")
def weights() -> Tensor:
    W_RC = torch.randn(R, C, generator=torch.Generator().manual_seed(0)) * 0.05
    W_RC[3] = 0
    W_RC[4, :16] = 0
    W_RC[5] = 0.05 + 0.01 * W_RC[6]
    return W_RC


@pytest.fixture(scope="module")
def hessian() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    mix_CC = torch.eye(C) + 0.4 * torch.randn(C, C, generator=generator) / C**0.5
    x_NC = torch.randn(1024, C, generator=generator) @ mix_CC * torch.rand(C, generator=generator)
    return x_NC.T @ x_NC / len(x_NC)


def decoded(blocks_RB: Tensor, name: str) -> Tensor:
    values = gguf.dequantize(blocks_RB.numpy(), gguf.GGMLQuantizationType[name])
    return torch.from_numpy(np.ascontiguousarray(values))


@pytest.mark.parametrize("name", TYPES)
def test_sizes_are_those_of_gguf(name: str) -> None:
    sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert sizes == (TYPES[name].block, TYPES[name].num_bytes)


@pytest.mark.parametrize("name", TYPES)
def test_gguf_decodes_what_we_say(name: str, weights: Tensor, hessian: Tensor) -> None:
    """Every bit of a file has its meaning there, of codes by LDLQ as of those to nearest."""
    for matrix in (
        round_to_nearest(TYPES[name], weights),
        round_matrix(TYPES[name], weights, hessian),
    ):
        torch.testing.assert_close(
            decoded(matrix.blocks_RB, name), matrix.W_hat_RC, rtol=1e-6, atol=1e-8
        )


@pytest.mark.parametrize("name", [own for own in TYPES if own != "Q8_0"])
def test_full_hessians_lose_less(name: str, weights: Tensor, hessian: Tensor) -> None:
    native = TYPES[name]

    def loss(shrinkage: float, passes: int) -> float:
        matrix = round_matrix(native, weights, hessian, shrinkage, passes)
        return metrics.proxy_loss(weights, matrix.W_hat_RC, hessian)

    nearest = metrics.proxy_loss(weights, round_to_nearest(native, weights).W_hat_RC, hessian)
    assert loss(1.0, 1) < loss(1.0, 0) < 0.9 * nearest
    assert loss(0.8, 1) < loss(0.0, 0)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_nearest_beats_gguf(name: str, weights: Tensor) -> None:
    """The package's own encoder takes the step from the largest weight alone."""
    theirs = gguf.quantize(weights.numpy(), gguf.GGMLQuantizationType[name])
    theirs_RC = torch.from_numpy(gguf.dequantize(theirs, gguf.GGMLQuantizationType[name]))
    ours_RC = round_to_nearest(TYPES[name], weights).W_hat_RC
    assert (ours_RC - weights).square().mean() < (theirs_RC - weights).square().mean()


def test_rows_that_blocks_of_256_do_not_divide() -> None:
    taken = {name: type_for(own, 576) for name, own in TYPES.items()}
    assert {name: own.name for name, own in taken.items() if own and own.name != name} == {
        "Q2_K": "Q4_0",
        "Q3_K": "Q4_0",
        "Q4_K": "Q5_0",
        "Q5_K": "Q5_1",
        "Q6_K": "Q8_0",
        "IQ4_XS": "IQ4_NL",
        "IQ2_XXS": "IQ4_NL",
        "IQ2_XS": "IQ4_NL",
        "IQ2_S": "IQ4_NL",
        "IQ3_XXS": "IQ4_NL",
        "IQ3_S": "IQ4_NL",
    }
    assert type_for(TYPES["Q2_K"], 100) is None


def test_an_unknown_type_is_told() -> None:
    assert type_of("q3_k").name == "Q3_K"
    with pytest.raises(RecipeError, match=r"'Q9' is no GGUF type .* allowed are Q4_0, Q4_1"):
        type_of("Q9")
