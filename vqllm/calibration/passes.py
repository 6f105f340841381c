"""Batches of calibration sequences through the loaded layer, for the model that is being quantized
and, where it is asked for, for the original one beside it.

    quantized   states ─► layer with what is quantized so far ─► states of the next layer
    original    states ─► the same layer with its own weights ─► states of the next layer
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from vqllm.calibration.replay import Replay
from vqllm.calibration.store import ActivationStore
from vqllm.calibration.stream import LayerStream, capture_inputs
from vqllm.errors import NumericalError

BATCH_TOKENS = 8192
"""Tokens that run through a layer at once on an accelerator: enough for full matrix units."""
CPU_BATCH_TOKENS = 1024
"""Tokens that run through a layer at once on the CPU. 1024 to 8192 take the same time where memory
is reused (2.2 s for 65,536 tokens of a layer of 576 x 1536), but the larger blocks of 4096 and 8192
come as new pages each time (2.7 to 3.2 s)."""

Model = Literal["quantized", "original"]
Visit = Callable[[str, Tensor], None]
"""Called with a linear's full name and its input, whenever it runs."""


class Passes:
    """Runs `tokens`, int64 [S, L], through the layers of a stream, one layer after another.

    Half of `budget_bytes` is for the hidden states between layers, which beyond that are in mapped
    files below `folder`; half is for outputs inside a layer that its next passes need, which beyond
    that are computed again.
    """

    def __init__(
        self,
        stream: LayerStream,
        tokens: Tensor,
        budget_bytes: int,
        folder: Path,
        models: tuple[Model, ...],
    ) -> None:
        self.stream = stream
        self.tokens = tokens
        self._models = models
        self._budget_bytes = budget_bytes // 2
        self._folder = folder
        self._stores: dict[Model, ActivationStore] = {}
        self._own_weights: dict[nn.Linear, Tensor] = {}
        self._replay = Replay(0)

    def begin(self, linears: Mapping[str, nn.Linear]) -> None:
        """A layer is loaded, in the compute dtype; these linears of it have their own weights."""
        self._replay.close()
        self._replay = Replay(self._budget_bytes)
        if "original" in self._models:
            self._own_weights = {linear: linear.weight.data for linear in linears.values()}

    def settle(self, layer: nn.Module, unfinished: Iterable[nn.Module]) -> None:
        """The linears of `layer` have their final weights but for these: what the next passes need
        of the rest is computed once."""
        self._replay.settle(layer, unfinished)

    def batches(self) -> Iterator[slice]:
        """The sequences that run together."""
        return batches(self.tokens, self.stream.device)

    def run(
        self,
        index: int,
        rows: slice,
        linears: Mapping[str, nn.Linear],
        visit: Visit,
        *,
        model: Model = "quantized",
        beyond: bool = False,
    ) -> Tensor | None:
        """The output of loaded layer `index` for some sequences; None if `visit` ended the pass.

        Args:
            linears: whose inputs `visit` is called with.
            model: which of the two; the quantized one runs with the weights that the layer has.
            beyond: go on with what follows the layer.
        """
        self._replay.begin((model, rows.start))
        # The first layer's input is the embeddings; the store is filled batch by batch by its
        # output, and has nothing yet for the batches that follow.
        states = None
        if index > 0:
            assert model in self._stores, "layers are advanced in order"
            states = self._stores[model].read(rows, self.stream.device)
        with self._weights_of(model), capture_inputs(dict(linears), visit):
            return self.stream.run(index, self.tokens[rows], states, beyond=beyond)

    def advance(self, index: int) -> None:
        """Replace the stored states by the outputs of loaded layer `index`."""
        for model in self._models:
            for rows in self.batches():
                output = self.run(index, rows, {}, lambda name, x: None, model=model)
                assert output is not None, "nothing ends this pass early"
                if not bool(torch.isfinite(output).all()):
                    raise NumericalError(
                        f"the output of {self.stream.names[index]} is not finite in "
                        f"{self.stream.compute_dtype}: run with --compute-dtype float32"
                    )
                self._store(model, output).write(rows, output)
        self._replay.close()

    def close(self) -> None:
        """Free the stored states."""
        self._replay.close()
        for store in self._stores.values():
            store.close()

    def _store(self, model: Model, output: Tensor) -> ActivationStore:
        if model not in self._stores:
            num_sequences, length = self.tokens.shape
            shape = (num_sequences, length, output.shape[-1])
            budget_bytes = self._budget_bytes // len(self._models)
            path = self._folder / f"states-{model}.bin"
            self._stores[model] = ActivationStore(shape, output.dtype, budget_bytes, path)
        return self._stores[model]

    @contextmanager
    def _weights_of(self, model: Model) -> Iterator[None]:
        """The layer's own weights in its linears while the original model runs."""
        if model == "quantized":
            yield
            return
        present = {linear: linear.weight.data for linear in self._own_weights}
        for linear, own in self._own_weights.items():
            linear.weight.data = own
        try:
            yield
        finally:
            for linear, weight in present.items():
                linear.weight.data = weight


def batches(tokens: Tensor, device: torch.device, most: int | None = None) -> Iterator[slice]:
    """The sequences of `tokens` [S, L] that run through a layer together, at most `most`."""
    num_sequences, length = tokens.shape
    step = max(1, (CPU_BATCH_TOKENS if device.type == "cpu" else BATCH_TOKENS) // length)
    step = min(step, most or step)
    for start in range(0, num_sequences, step):
        yield slice(start, min(start + step, num_sequences))
