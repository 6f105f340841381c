"""A matrix from transformed weights to the tensors of its format.

    W, H ── transformed ──► fit ──► round, tune ──► pack
            plan/packed_spec  state   codes, state    tensors

Linears of a layer go this way whole, an embedding or a head block of rows by block of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vqllm.core import metrics, rng
from vqllm.core.distributed import Processes
from vqllm.core.protocols import OutputRounding, State
from vqllm.core.tiles import to_tiles
from vqllm.quantization.spreading import round_rows
from vqllm.recipes import Recipe


@dataclass(frozen=True)
class Encoded:
    """The format's tensors of a matrix, and the entropy of its codes in bits."""

    tensors: dict[str, Tensor]
    entropy: float


def fit(
    name: str, recipe: Recipe, W_RC: Tensor, H_CC: Tensor, weight_R: Tensor | None = None
) -> State:
    """What the codec learns from weights.

    Args:
        name: full name of the module; with the recipe's seed it names the random numbers.
        W_RC: transformed weights, float32.
        H_CC: damped H in the same basis, whose diagonal says what errors in each column cost.
        weight_R: importance of the rows; None for equal.
    """
    importance_RC = torch.diagonal(H_CC).expand(W_RC.shape)
    if weight_R is not None:
        importance_RC = importance_RC * weight_R.to(W_RC.device)[:, None]
    codec = recipe.codec
    generator = rng.generator(recipe.seed, name, "codec")
    return codec.fit(to_tiles(W_RC, codec.tile), to_tiles(importance_RC, codec.tile), generator)


def encode(
    recipe: Recipe,
    W_RC: Tensor,
    H_CC: Tensor,
    state: State,
    output_RR: Tensor | None = None,
    processes: Processes | None = None,
) -> Encoded:
    """Choose codes, move what the codec learned where the recipe says so, and pack.

    Args:
        W_RC: transformed weights, float32.
        H_CC: damped H in the same basis.
        state: of the codec, as `fit` gives it.
        output_RR: H_O in the same basis, for a rounding rule that asks what errors in each output
            do.
        processes: those that round some of the rows each; all of them call this.
    """
    codec, rounding = recipe.codec, recipe.rounding
    if isinstance(rounding, OutputRounding):
        assert output_RR is not None, "measured for such rules"
        rounding = rounding.with_outputs(output_RR)
    codes_IJM, state = round_rows(rounding, W_RC, H_CC, codec, state, processes or Processes())
    for tuning in recipe.tuning:
        codes_IJM, state = tuning(W_RC, H_CC, codec, codes_IJM, state, rounding)
    entropy = sum(map(metrics.code_entropy, codec.streams(codes_IJM)))
    return Encoded(codec.pack(codes_IJM, state), entropy)


def with_transforms(tensors: dict[str, Tensor], states: Sequence[State]) -> dict[str, Tensor]:
    """The tensors of a format with those of the transforms, under the names of `LinearSpec`."""
    stored = {
        f"t{i}_{key}": value for i, state in enumerate(states) for key, value in state.items()
    }
    return {**tensors, **stored}
