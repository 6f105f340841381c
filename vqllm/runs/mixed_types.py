"""Which type each tensor of a GGUF file gets, where types are mixed: offered before anything is
computed, chosen by what errors in each tensor cost."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqllm.calibration.layer_stream import LayerStream
from vqllm.core.progress import Progress
from vqllm.export import ends, outside_losses, type_losses
from vqllm.export.mix import Mix, Offer
from vqllm.export.native_types import NativeType

ACTIVATION_BYTES = 4 << 30

OpenStream = Callable[[torch.dtype | None], LayerStream]
"""Opens the unquantized model, to run in a dtype."""


@dataclass(frozen=True)
class MixedTypes:
    """A choice that is still to be made."""

    offer: Offer
    linears: Mapping[str, str]
    """names of tensors in the file, by those of linears in the model"""
    tied: bool
    """whether the head has no tensor of its own"""

    @classmethod
    def of(
        cls, mix: Mix, reader: Any, model: Any, linears: Mapping[str, str], folder: Path
    ) -> "MixedTypes":
        """Args:
            mix: what is asked for.
            reader: a `gguf.GGUFReader` of the source.
            model: transformers' model; its weights may be on the meta device.
            linears: the linears that can be coded, and their tensors.
            folder: for a short file.

        Raises:
            RecipeError: no choice gives the size that is asked for.
        """
        offer = Offer.of(mix, reader, {*linears.values(), *ends.names_of(model, reader)}, folder)
        tied = ends.HEAD not in {own.name for own in reader.tensors}
        return cls(offer, linears, tied)

    def choose(
        self,
        open_stream: OpenStream,
        dtype: torch.dtype | None,
        tokens_SL: Tensor,
        seed: int,
        folder: Path,
        progress: Progress,
    ) -> tuple[dict[str, NativeType], dict[str, Tensor]]:
        """Choose.

        Args:
            dtype: in which the pass with gradients runs.
            tokens_SL: calibration sequences, int64.
            seed: of the labels of the loss.
            folder: for what does not fit in memory.

        Returns:
            by name the type of each tensor in the file that there was a choice for, and H of the
            head if it is one.
        """
        head = ends.HeadInput()

        def opened() -> LayerStream:
            stream = open_stream(dtype)
            head.watch(stream.model)
            return stream

        offered = self.offer.types
        gradients = type_losses.Pass(seed, folder / "gradients", ACTIVATION_BYTES)
        of_linears = gradients.losses(
            opened,
            tokens_SL,
            {name: offered[own] for name, own in self.linears.items()},
            progress,
        )
        losses = {own: [0.0] * len(types) for own, types in offered.items()}
        for name, own in self.linears.items():
            losses[own] = [a + b for a, b in zip(losses[own], of_linears[name])]
        hessians = head.hessians(self.tied)
        outside = {own: types for own, types in offered.items() if own not in self.linears.values()}
        if outside:
            progress.phase("divergence by the embedding and the head")
            # In float32: sums that are rounded to 16 bits diverge about as much as 8-bit weights.
            stream = open_stream(torch.float32)
            losses |= outside_losses.losses(stream, tokens_SL, outside, hessians, self.tied)
        return self.offer.choose(losses), hessians
