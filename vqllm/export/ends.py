"""The embedding and the output head of a file of mixed types: which modules they are, how rounded.

A head, and an embedding that is tied to it, are rounded with the H of the head's own input, as the
linears are. In a tied one errors count as rows that are looked up too, in all features alike.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vqllm.core import linalg
from vqllm.export.native_rounding import (
    DAMPING,
    NativeMatrix,
    round_matrix,
    round_to_nearest,
)
from vqllm.export.native_types import NativeType

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
"""Tensors of a GGUF file. One without `HEAD` has them tied."""

TIED_DAMPING = 1.0
"""Of H, in place of `DAMPING`: errors of rows that are looked up count as much as those of the head
do on average, as in `vqllm/recipes/vocabulary.py`."""

ROWS = 8192
"""That are rounded at a time."""


def modules_of(model: Any) -> dict[str, nn.Module]:
    """transformers' modules that use the matrices, by the names of the tensors."""
    found = {EMBEDDING: model.get_input_embeddings(), HEAD: model.get_output_embeddings()}
    return {
        name: module
        for name, module in found.items()
        if isinstance(getattr(module, "weight", None), Tensor)
    }


def names_of(model: Any, reader: Any) -> list[str]:
    """The tensors of a GGUF file that are these matrices, in the shapes that the model has.

    Args:
        model: transformers' model; its weights may be on the meta device.
        reader: a `gguf.GGUFReader`.
    """
    modules = modules_of(model)
    shapes = {name: tuple(own.get_parameter("weight").shape) for name, own in modules.items()}
    return [
        tensor.name
        for tensor in reader.tensors
        if shapes.get(tensor.name) == tuple(int(size) for size in reversed(tensor.shape))
    ]


class HeadInput:
    """H = E[x xᵀ] of the input of a head, measured while its model runs."""

    def __init__(self) -> None:
        self._total_CC: Tensor | None = None
        self._num_tokens = 0

    def watch(self, model: Any) -> None:
        """Take in what the head of a model is called with from now on."""
        head = modules_of(model).get(HEAD)
        if head is not None:
            head.register_forward_pre_hook(self._add)

    def _add(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x_NC = args[0].detach().flatten(0, -2)
        if self._total_CC is None:
            num = x_NC.shape[1]
            self._total_CC = torch.zeros(num, num, device=x_NC.device)
        linalg.add_symmetric(self._total_CC, x_NC, x_NC)
        self._num_tokens += len(x_NC)

    def hessians(self, tied: bool) -> dict[str, Tensor]:
        """H with its damping, float32 [C, C], of the tensor that has the head; of none where the
        head was not called."""
        if self._total_CC is None or linalg.is_zero(self._total_CC):
            return {}
        H_CC = linalg.symmetric(self._total_CC) / self._num_tokens
        if tied:
            return {EMBEDDING: linalg.damp(H_CC, TIED_DAMPING)}
        return {HEAD: linalg.damp(H_CC, DAMPING)}


def round_rows(
    native: NativeType, W_RC: Tensor, H_CC: Tensor | None, passes: int | None = None
) -> NativeMatrix:
    """Rows of a matrix in a type, as `round_matrix` does where H is known, else to nearest."""
    if H_CC is None:
        return round_to_nearest(native, W_RC.float())
    return round_matrix(native, W_RC.to(H_CC), H_CC, passes=passes)
