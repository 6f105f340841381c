"""What one decoder layer sees during calibration: input groups, their Hessians, the next states."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vqllm.calibration.hessian import Hessian
from vqllm.calibration.replay import Replay
from vqllm.calibration.store import ActivationStore
from vqllm.calibration.stream import LayerDone, LayerStream, capture_inputs
from vqllm.errors import ModelError, NumericalError

BATCH_TOKENS = 8192
"""Tokens that run through a layer at once on an accelerator: enough for full matrix units."""
CPU_BATCH_TOKENS = 1024
"""Tokens that run through a layer at once on the CPU. 1024 to 8192 take the same time where memory
is reused (2.2 s for 65,536 tokens of a layer of 576 x 1536), but the larger blocks of 4096 and 8192
come as new pages each time (2.7 to 3.2 s)."""
GROUP_TOKENS = 2048
"""Tokens that show which linears read the same input."""


@dataclass(frozen=True)
class InputGroup:
    """Linears of one layer that read the same input, by full name, in the order they run."""

    names: tuple[str, ...]


class LayerCalibrator:
    """Runs the calibration sequences through the layers of a stream, one layer after another.

    `tokens` is int64 [S, L]. Half of `budget_bytes` is for the hidden states between layers, which
    beyond that are in a mapped file below `folder`; half is for outputs inside a layer that its
    next passes need, which beyond that are computed again. `weights` are those of the tokens in the
    Hessians of linears, float32 [S, L] by full name; without, all weigh the same.
    """

    def __init__(
        self,
        stream: LayerStream,
        tokens: Tensor,
        budget_bytes: int,
        folder: Path,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._stream = stream
        self._tokens = tokens
        self._weights = weights or {}
        self._budget_bytes = budget_bytes // 2
        self._folder = folder
        self._store: ActivationStore | None = None
        self._repeats = False
        self._unreached = False
        self._replay = Replay(0)

    def groups(self, index: int, linears: Mapping[str, nn.Linear]) -> list[InputGroup]:
        """Which linears of loaded layer `index` share an input, found by running one batch.

        A linear that the batch does not reach (an expert that was not routed to) is a group of
        its own, after the others.
        """
        inputs: list[tuple[Tensor, list[str]]] = []
        num_calls: Counter[str] = Counter()

        def visit(name: str, x: Tensor) -> None:
            num_calls[name] += 1
            for known, names in inputs:
                if known is x or _same_memory(known, x):
                    names.append(name)
                    return
            inputs.append((x, [name]))

        self._replay.close()
        self._replay = Replay(self._budget_bytes)
        num_sequences = max(1, GROUP_TOKENS // self._tokens.shape[1])
        self._forward(index, slice(0, num_sequences), linears, visit)
        self._repeats = max(num_calls.values(), default=0) > 1
        self._unreached = len(num_calls) < len(linears)
        first_input: dict[str, int] = {}
        for i, (_, names) in enumerate(inputs):
            for name in names:
                first_input.setdefault(name, i)
        groups = [
            InputGroup(tuple(name for name in dict.fromkeys(names) if first_input[name] == i))
            for i, (_, names) in enumerate(inputs)
        ]
        return [group for group in groups if group.names] + [
            InputGroup((name,)) for name in linears if name not in first_input
        ]

    def hessians(
        self, index: int, linears: Mapping[str, nn.Linear], groups: list[InputGroup]
    ) -> list[Hessian]:
        """The Hessian of each group over all sequences.

        The weight of a token is the mean of its weights for the linears of the group. Where a
        linear sees some tokens only (an expert), all weigh the same.
        """
        first = {group.names[0]: i for i, group in enumerate(groups)}
        device = self._stream.device
        hessians = [Hessian.empty(linears[g.names[0]].in_features, device) for g in groups]
        weights = {group.names[0]: self._weight(group) for group in groups}

        waiting: set[str] = set()
        batch = slice(0)

        def visit(name: str, x: Tensor) -> None:
            weight_SL = weights[name]
            weight_N = None
            if weight_SL is not None and x.shape[:-1] == weight_SL[batch].shape:
                weight_N = weight_SL[batch].flatten().to(device)
            hessians[first[name]].add(x.reshape(-1, x.shape[-1]), weight_N)
            waiting.discard(name)
            # The rest of the layer is of no use here. Four input groups measured one after the
            # other cost 1.4 passes through a Llama layer instead of 4.
            if not waiting and not self._repeats:
                raise LayerDone

        watched = {name: linears[name] for name in first}
        for batch in self._batches():
            waiting |= watched.keys()
            self._forward(index, batch, watched, visit)
        return hessians

    def _weight(self, group: InputGroup) -> Tensor | None:
        """The weights of all tokens in the Hessian of a group, [S, L]."""
        known = [self._weights[name] for name in group.names if name in self._weights]
        return torch.stack(known).mean(0) if known else None

    def hessian_beyond(self, index: int, name: str, linear: nn.Linear) -> Hessian:
        """The Hessian of a linear that runs after loaded layer `index`, the last one, such as the
        output head, over all sequences.

        Raises:
            ModelError: the model does not call it.
        """
        hessian = Hessian.empty(linear.in_features, self._stream.device)

        def visit(_: str, x: Tensor) -> None:
            hessian.add(x.reshape(-1, x.shape[-1]))
            raise LayerDone

        for rows in self._batches():
            self._forward(index, rows, {name: linear}, visit, beyond=True)
        if hessian.num_tokens == 0:
            raise ModelError(
                f"{type(self._stream.model).__name__} does not call its output head {name}, so "
                "there is no Hessian of its input. Leave it as it is: --set head=null, into "
                "another output folder (and embeddings=null where the two are tied)."
            )
        return hessian

    def settle(self, layer: nn.Module, unfinished: Iterable[nn.Module]) -> None:
        """The linears of `layer` have their final weights but for these: what the next passes need
        of the rest is computed once."""
        # A linear that `groups` did not reach is finished last, wherever it runs.
        if not self._unreached:
            self._replay.settle(layer, unfinished)

    def advance(self, index: int) -> None:
        """Replace the stored states by the outputs of loaded layer `index`."""
        for rows in self._batches():
            output = self._forward(index, rows, {}, lambda name, x: None)
            assert output is not None, "no hook ends this pass early"
            if self._store is None:
                num_sequences, length = self._tokens.shape
                shape = (num_sequences, length, output.shape[-1])
                self._store = ActivationStore(
                    shape, output.dtype, self._budget_bytes, self._folder / "states.bin"
                )
            if not bool(torch.isfinite(output).all()):
                raise NumericalError(
                    f"the output of {self._stream.names[index]} is not finite in "
                    f"{self._stream.compute_dtype}: run with --compute-dtype float32"
                )
            self._store.write(rows, output)
        self._replay.close()

    def close(self) -> None:
        """Free the stored states."""
        self._replay.close()
        if self._store is not None:
            self._store.close()

    def _batches(self) -> Iterator[slice]:
        return batches(self._tokens, self._stream.device)

    def _forward(
        self,
        index: int,
        rows: slice,
        linears: Mapping[str, nn.Linear],
        visit: Callable[[str, Tensor], None],
        beyond: bool = False,
    ) -> Tensor | None:
        self._replay.begin(rows.start)
        # The first layer's input is the embeddings; the store is filled batch by batch by its
        # output, and has nothing yet for the batches that follow.
        states = None
        if index > 0:
            assert self._store is not None, "layers are advanced in order"
            states = self._store.read(rows, self._stream.device)
        with capture_inputs(dict(linears), visit):
            return self._stream.run(index, self._tokens[rows], states, beyond=beyond)


def batches(tokens: Tensor, device: torch.device, most: int | None = None) -> Iterator[slice]:
    """The sequences of `tokens` [S, L] that run through a layer together, at most `most`."""
    num_sequences, length = tokens.shape
    step = max(1, (CPU_BATCH_TOKENS if device.type == "cpu" else BATCH_TOKENS) // length)
    step = min(step, most or step)
    for start in range(0, num_sequences, step):
        yield slice(start, min(start + step, num_sequences))


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
