"""What errors in the input embedding and the output head cost, from the pass with gradients.

    head        ½ c · mean(W²) · E‖x‖² · (1 − E Σ p²)
    embedding   ½ c · mean(W²) · E‖g‖²

nats a token, with the codec's error c relative to the weights, the head's input x, predictions p,
and the gradient g in the embedding's output. The first is the second-order KL divergence of a
softmax whose logits have independent errors; an embedding that is tied to the head has both.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vqllm.calibration.layer_stream import LayerStream
from vqllm.core import threads
from vqllm.quantization.row_blocks import Matrix

CHUNK = 256
"""Tokens whose probabilities are in memory at once."""


@dataclass
class EndStatistics:
    """Sums over the tokens of the pass."""

    inputs: float = 0.0
    """Σ ‖x‖² of the head"""
    spread: float = 0.0
    """Σ (1 − Σ p²)"""
    gradients: float = 0.0
    """Σ ‖g‖² of the embedding"""
    num_predicted: int = 0
    num_embedded: int = 0

    def watch(self, stream: LayerStream) -> LayerStream:
        """Let the model of the stream add to the sums whenever its ends run with gradients."""
        head: nn.Module | None = stream.model.get_output_embeddings()
        if head is not None:
            head.register_forward_hook(self._predicted)
        stream.model.get_input_embeddings().register_forward_hook(self._embedded)
        return stream

    def loss(self, matrix: Matrix, mean_square: float) -> float:
        """Nats a token for an error of 1 relative to the weights, which have this mean square."""
        total = 0.0
        if matrix.is_head and self.num_predicted:
            total += self.inputs / self.num_predicted * self.spread / self.num_predicted
        if "embeddings" in matrix.keys and self.num_embedded:
            total += self.gradients / self.num_embedded
        return 0.5 * mean_square * total

    def _predicted(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            return
        x_NC, y_NV = (a.detach().flatten(0, -2) for a in (args[0], output))
        self.inputs += float(threads.total(x_NC.float().square().double()))
        for logits in y_NV.split(CHUNK):
            p_NV = torch.softmax(logits.float(), -1)
            self.spread += len(p_NV) - float(threads.total(p_NV.square().double()))
        self.num_predicted += len(x_NC)

    def _embedded(self, _: nn.Module, args: Any, output: Tensor) -> None:
        if not torch.is_grad_enabled() or not output.is_floating_point():
            return
        if not output.requires_grad:
            output.requires_grad_()
        output.register_hook(self._reached)

    def _reached(self, g: Tensor) -> None:
        self.gradients += float(threads.total(g.float().square().double()))
        self.num_embedded += g[..., 0].numel()
