"""Batches of calibration sequences through the loaded layer, for the model that is being quantized
and, if needed, for the original one beside it.

    quantized   states ─► layer, some linears quantized already ─► states of the next layer
    original    states ─► the same layer with its own weights ─► states of the next layer
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from vqllm.calibration.activation_store import StatesStore
from vqllm.calibration.layer_calls import States
from vqllm.calibration.layer_stream import LayerStream
from vqllm.calibration.replay import Replay
from vqllm.calibration.shares import Share
from vqllm.core.distributed import Processes
from vqllm.errors import NumericalError
from vqllm.hf.linears import capture_inputs

BATCH_TOKENS = 8192
"""Tokens that run through a layer at once on an accelerator: enough for full matrix units."""
CPU_BATCH_TOKENS = 1024
"""Tokens that run through a layer at once on the CPU. 1024 to 8192 take the same time where memory
is reused (2.2 s for 65,536 tokens of a layer of 576 x 1536), but the larger blocks of 4096 and 8192
come as new pages each time (2.7 to 3.2 s)."""

GROUP_TOKENS = 2048
"""Tokens that run to find out which linears read the same input."""

Model = Literal["quantized", "original"]
Visit = Callable[[str, Tensor], None]
"""Called with a linear's full name and its input, whenever it runs."""


class Passes:
    """Runs `tokens`, int64 [S, L], through the layers of a stream, one layer after another.

    Half of `budget_bytes` is for the hidden states between layers; states that exceed it are in
    mapped files below `folder`. The other half is for states inside a layer that further passes
    need; those that exceed it are computed again.
    """

    def __init__(
        self,
        stream: LayerStream,
        tokens: Tensor,
        budget_bytes: int,
        folder: Path,
        models: tuple[Model, ...],
        aims: Model | None = None,
        processes: Processes | None = None,
    ) -> None:
        """Args:
        aims: the model whose states `aim` starts from, if it is called; one of `models`. Every
            process then has the states of all sequences, since training takes any of them.
        processes: those that share the sequences.
        """
        self.stream = stream
        self.tokens = tokens
        self.processes = processes or Processes()
        unit = unit_of(tokens, stream.device)
        self._share = Share(self.processes, unit, holds_all=aims is not None)
        self._models = models
        self._aims: Model | None = aims
        self._wanted: StatesStore | None = None
        self._is_next = False
        """the wanted outputs are the original model's states after this layer"""
        self._budget_bytes = budget_bytes // 2
        self._folder = folder
        self._stores: dict[Model, StatesStore] = {}
        self._own: dict[Tensor, Tensor] = {}
        self._replay = Replay(0)

    def begin(self, parameters: Iterable[Tensor]) -> None:
        """A layer is loaded, in the compute dtype. `parameters` are all that will change in it, and
        still have the original values."""
        self._replay.close()
        self._replay = Replay(self._budget_bytes)
        self._is_next = False
        if "original" in self._models:
            self._own = {parameter: parameter.data for parameter in parameters}

    def learning(self, layer: nn.Module) -> AbstractContextManager[None]:
        """Within, the loaded `layer` runs once, to its end, on any sequences."""
        return self._replay.learning(layer)

    def settle(self, layer: nn.Module, unfinished: Iterable[nn.Module]) -> None:
        """All linears of `layer` but `unfinished` have their final weights: what depends on
        finished ones only is computed once for all further passes."""
        self._replay.settle(layer, unfinished)

    def batches(self) -> Iterator[slice]:
        """The sequences that run together."""
        return batches(self.tokens, self.stream.device)

    def rounds(self) -> Iterator[list[slice]]:
        """The batches of this process that run before processes exchange what they saw."""
        return self._share.rounds(self.batches())

    @property
    def few(self) -> slice:
        """The first sequences, on which facts about a layer are found: in the first process, all
        that tell; in the others, a batch that may tell something else."""
        if self.processes.is_first:
            return slice(0, few_of(self.tokens))
        own = filter(self._share.is_own, self.batches())
        return next(own, slice(0, 0))

    def run(
        self,
        index: int,
        rows: slice,
        linears: Mapping[str, nn.Linear],
        visit: Visit,
        *,
        model: Model = "quantized",
        beyond: bool = False,
    ) -> States | None:
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
            states = self._stores[model].read(self._share.held(rows), self.stream.device)
        with self._weights_of(model), capture_inputs(dict(linears), visit):
            return self.stream.run(index, self.tokens[rows], states, beyond=beyond)

    def aim(self, index: int) -> None:
        """Store the wanted output of loaded layer `index` for every sequence. The layer is still
        unchanged, and its input is that of the model `aims`."""
        assert self._aims is not None, "said at the start"
        for rows, output in self._outputs(index, self._aims):
            if self._wanted is None:
                # Two of them take turns with the original's states.
                self._wanted = self._new_store(f"wanted-{index % 2}", output)
            self._wanted.write(self._share.held(rows), output)
        assert self._wanted is not None, "there are sequences"
        self._wanted.turn()
        self._is_next = self._aims == "original"

    def wanted(self, rows_N: Tensor) -> Tensor:
        """The hidden states that `aim` stored, of sequences by number."""
        assert self._wanted is not None, "aimed before"
        return self._wanted.read(rows_N, self.stream.device).hidden

    def output(self, index: int, rows_N: Tensor) -> Tensor:
        """The hidden states that loaded layer `index` gives for sequences by number, in the model
        that is being quantized; with gradients where they are on."""
        states = None
        if index > 0:
            states = self._stores["quantized"].read(rows_N, self.stream.device)
        grad = torch.is_grad_enabled()
        output = self.stream.run(index, self.tokens[rows_N], states, grad=grad)
        assert output is not None, "nothing ends this pass early"
        return output.hidden

    def advance(self, index: int) -> None:
        """Replace the stored states by the outputs of loaded layer `index`."""
        for model in self._models:
            if model == "original" and self._is_next:  # `aim` has computed them
                assert self._wanted is not None, "aimed before"
                old = self._stores.get(model)
                self._stores[model], self._wanted = self._wanted, old
                continue
            for rows, output in self._outputs(index, model):
                self._store(model, output).write(self._share.held(rows), output)
            if model in self._stores:  # there is none in a process without sequences
                self._stores[model].turn()
        self._replay.close()

    def close(self) -> None:
        """Free the stored states."""
        self._replay.close()
        for store in (*self._stores.values(), self._wanted):
            if store is not None:
                store.close()

    def _outputs(self, index: int, model: Model) -> Iterator[tuple[slice, States]]:
        """The outputs of loaded layer `index`, batch by batch: of the sequences of this process, or
        of all where it has the states of all."""
        for rows_of_round in self.rounds():
            found = []
            for rows in rows_of_round:
                output = self.run(index, rows, {}, lambda name, x: None, model=model)
                assert output is not None, "nothing ends this pass early"
                if not bool(torch.isfinite(output.hidden).all()):
                    raise NumericalError(
                        f"the output of {self.stream.names[index]} is not finite in "
                        f"{self.stream.compute_dtype}: run with --compute-dtype float32"
                    )
                found.append((rows, output))
            if self._share.holds_all:
                found = itertools.chain.from_iterable(self.processes.exchange(found))
            yield from found

    def _store(self, model: Model, output: States) -> StatesStore:
        if model not in self._stores:
            self._stores[model] = self._new_store(model, output)
        return self._stores[model]

    def _new_store(self, name: str, output: States) -> StatesStore:
        num_stores = len(self._models) + (self._aims is not None)
        budget_bytes = self._budget_bytes // num_stores
        path = self._folder / f"states-{name}.bin"
        num_held = self._share.num_held(len(self.tokens))
        return StatesStore(num_held, output, budget_bytes, path)

    @contextmanager
    def _weights_of(self, model: Model) -> Iterator[None]:
        """Within, the layer has the weights and vectors of this model."""
        if model == "quantized":
            yield
            return
        present = {parameter: parameter.data for parameter in self._own}
        for parameter, own in self._own.items():
            parameter.data = own
        try:
            yield
        finally:
            for parameter, values in present.items():
                parameter.data = values


def batches(tokens: Tensor, device: torch.device, most: int | None = None) -> Iterator[slice]:
    """The sequences of `tokens` [S, L] that run through a layer together, at most `most`."""
    num_sequences, step = len(tokens), batch_size(tokens, device, most)
    for start in range(0, num_sequences, step):
        yield slice(start, min(start + step, num_sequences))


def batch_size(tokens: Tensor, device: torch.device, most: int | None = None) -> int:
    """How many sequences run together."""
    size = max(1, (CPU_BATCH_TOKENS if device.type == "cpu" else BATCH_TOKENS) // tokens.shape[1])
    return min(size, most or size)


def few_of(tokens: Tensor) -> int:
    """How many sequences run to find out facts about a layer."""
    return max(1, GROUP_TOKENS // tokens.shape[1])


def unit_of(tokens: Tensor, device: torch.device) -> int:
    """How many sequences belong to one process together: batches that hold those of `few_of`."""
    size = batch_size(tokens, device)
    return -(-few_of(tokens) // size) * size
