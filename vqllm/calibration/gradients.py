"""Gradients of the model's loss in the outputs of its linears, one layer in memory at a time.

The loss is the cross entropy of labels drawn from the model's own predictions. With these labels
the mean of the squared gradients is the Fisher information, the curvature of the KL divergence of
the predictions: it measures how much an error in each output would change them.

    forward     layer 0 → 1 → … → n − 1, the input of every layer is stored
    loss        layer n − 1 and what follows it; labels are drawn; back to the input of layer n − 1
    backward    layer n − 2 → … → 0: each runs once more on its stored input, with gradients

Every layer is read twice from disk and run twice, once with gradients. Stored are the inputs of
all layers, 2 · layers · tokens · features bytes in a 16-bit dtype, in mapped files where they do
not fit the budget.

Source: the labels and their use for rounding: Tseng et al., "YAQA", arXiv 2505.22988, section 3;
Kim et al., "GuidedQuant", arXiv 2505.07004.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqllm.calibration.activation_store import StatesStore
from vqllm.calibration.layer_calls import States
from vqllm.calibration.layer_stream import LayerStream
from vqllm.calibration.passes import batch_size, batches
from vqllm.calibration.shares import Share
from vqllm.calibration.visitors import Calls, Findings, Record, Visitor
from vqllm.core import rng
from vqllm.core.distributed import Processes
from vqllm.errors import ModelError, NumericalError
from vqllm.hf.decoder_layers import linears_of
from vqllm.hf.experts import expert_linears

T = TypeVar("T")

WITHOUT = (
    "--preset fast, or --set hessian.weights=none --set allocation=null and a rounding rule other "
    "than two_sided"
)
LOGIT_BYTES = 1 << 28
"""Size of the logits of a batch in float32, unless a single sequence has more. Their gradients and
the probabilities take as much each."""
DRAWN = 16
"""Tokens whose labels are drawn, and gradients computed, at a time on a CPU."""
FORWARD = 0.1
"""Rough share of the forward pass in the time of both; the visitors run in the backward pass."""

Choice = Callable[[Mapping[str, nn.Linear]], Mapping[str, nn.Linear]]


class GradientPass:
    """The forward and the backward pass over all calibration sequences.

    `open_stream` opens the unquantized model. `tokens` is
    int64 [S, L]. Within `budget_bytes` the stored inputs are in memory, beyond in files below
    `folder`. `processes` share the sequences; all of them make one and call `run`.
    """

    def __init__(
        self,
        open_stream: Callable[[], LayerStream],
        tokens: Tensor,
        seed: int,
        budget_bytes: int,
        folder: Path,
        processes: Processes | None = None,
    ) -> None:
        self._open_stream = open_stream
        self._tokens = tokens
        self._seed = seed
        self._budget_bytes = budget_bytes
        self._folder = folder
        self._processes = processes or Processes()
        self._share = Share(self._processes)
        self._inputs: list[StatesStore] = []
        self._gradient: StatesStore | None = None

    def run(
        self,
        chosen: Choice,
        visitors: Mapping[str, Visitor],
        record: Record,
        share: Callable[[float], None],
    ) -> None:
        """Pass every call of every linear to the visitors, the last layer first. Layers that are in
        the record are skipped: they are not even read.

        Args:
            chosen: selects the wanted linears of a layer.
            visitors: by the name for their findings.
            share: called after every layer with the share of the work that is done, from 0 to 1.

        Raises:
            ModelError: the loss has no gradient in the output of some layer.
            NumericalError: a gradient is not finite.
        """
        try:
            # `done` is the lowest layer that is finished: the inputs of those below it are needed,
            # and the gradient in its own input to start from.
            done, gradient = record.last() or (None, None)
            if done == 0:
                return
            stream = self._forward(share, done)
            last = len(stream) - 1
            if gradient is not None:
                for rows in self._own_batches(stream):
                    own = gradient.each(lambda values, rows=rows: values[rows])
                    self._write_gradient(len(stream), rows, own)
                self._turn_gradient()
                del gradient  # it is in the store
            for index in reversed(range(done or len(stream))):
                with stream.layer(index) as layer:
                    name = stream.names[index]
                    linears = chosen(linears_of(layer, name, stream.shared))
                    experts = expert_linears(layer, name, linears)
                    for visitor in visitors.values():
                        visitor.share({own: expert.role for own, expert in experts.items()})
                        visitor.begin(linears)
                    roles = {own: expert.role for own, expert in experts.items()}
                    calls = Calls([*visitors.values()], linears, roles, self._processes)
                    stream.cast(index)
                    self._backward(stream, index, linears, calls, index == last)
                    self._turn_gradient()
                found = {name: visitor.finish() for name, visitor in visitors.items()}
                gradient = self._gradient_of_all(stream) if index else None
                record.finish(index, self._merged(found), gradient)
                del gradient
                share(FORWARD + (1 - FORWARD) * (1 - index / len(stream)))
        finally:
            self.close()

    def close(self) -> None:
        """Free the stored inputs and gradients."""
        for store in [*self._inputs, self._gradient]:
            if store is not None:
                store.close()
        self._inputs, self._gradient = [], None

    def _forward(self, share: Callable[[float], None], num_layers: int | None) -> LayerStream:
        """Store the inputs of all layers, or of the first `num_layers`. Those of layer 0 are the
        embeddings, which are computed again."""
        stream = self._open_stream()
        sizes = [batch_size(self._tokens, stream.device, n) for n in (None, self._at_loss(stream))]
        self._share = Share(self._processes, math.lcm(*sizes))
        for index in range((num_layers or len(stream)) - 1):
            with stream.ready(index):
                for rows in self._own_batches(stream):
                    output = stream.run(index, self._tokens[rows], self._input(stream, index, rows))
                    assert output is not None, "no hook ends this pass early"
                    if len(self._inputs) == index:
                        store = self._store(len(stream), output, f"input-{index + 1}")
                        self._inputs.append(store)
                    self._inputs[index].write(self._share.held(rows), output)
                if len(self._inputs) > index:  # there is none in a process without sequences
                    self._inputs[index].turn()
            share(FORWARD * (index + 1) / len(stream))
        return stream

    def _backward(
        self,
        stream: LayerStream,
        index: int,
        linears: Mapping[str, nn.Linear],
        calls: "Calls",
        last: bool,
    ) -> None:
        """Run loaded layer `index` with gradients; store those in its input."""
        per_batch = self._at_loss(stream) if last else None
        for rows in self._in_rounds(batches(self._tokens, stream.device, per_batch), calls):
            states = self._input(stream, index, rows)
            if states is not None:
                states = states.each(_recording)

            def visit(name: str, x: Tensor, g: Tensor, rows: slice = rows) -> None:
                calls.add(name, rows, x, g)

            with watched(linears, visit):
                if last:
                    self._backward_of_loss(stream, index, rows, states)
                else:
                    output = stream.run(index, self._tokens[rows], states, grad=True)
                    assert output is not None
                    assert self._gradient is not None
                    _check_gradient(output.hidden, stream.names[index])
                    held = self._share.held(rows)
                    _backward(output, self._gradient.read(held, stream.device))
            if states is not None:
                self._keep_gradient(stream, rows, states, stream.names[index])

    def _backward_of_loss(
        self, stream: LayerStream, index: int, rows: slice, states: States | None
    ) -> None:
        """Run the last layer and what follows it, and go back from the summed cross entropy of
        labels drawn from the predictions, one for every token."""
        logits = []

        def keep(_: nn.Module, args: object, output: Any) -> None:
            logits.append(output.logits)

        handle = stream.model.register_forward_hook(keep)
        try:
            stream.run(index, self._tokens[rows], states, beyond=True, grad=True)
        finally:
            handle.remove()
        _check_gradient(logits[0], stream.names[index])
        generator = rng.generator(self._seed, f"sequence {rows.start}", "labels")
        gradient_NV = _gradient_in_logits(logits[0].detach().flatten(0, 1), generator)
        logits[0].backward(gradient_NV.view_as(logits[0]))

    def _input(self, stream: LayerStream, index: int, rows: slice) -> States | None:
        """The input of layer `index`; None for layer 0, whose input are the embeddings."""
        held = self._share.held(rows)
        return self._inputs[index - 1].read(held, stream.device) if index else None

    def _at_loss(self, stream: LayerStream) -> int:
        """How many sequences fit in memory with the logits, which are behind the last layer."""
        vocabulary = stream.model.config.get_text_config().vocab_size
        return max(1, LOGIT_BYTES // (4 * vocabulary * self._tokens.shape[1]))

    def _own_batches(self, stream: LayerStream) -> Iterator[slice]:
        return filter(self._share.is_own, batches(self._tokens, stream.device))

    def _in_rounds(self, rows: Iterable[slice], calls: "Calls") -> Iterator[slice]:
        """The batches of this process; after each round calls go to those that add them up."""
        for rows_of_round in self._share.rounds(rows):
            yield from rows_of_round
            calls.deliver()

    def _keep_gradient(self, stream: LayerStream, rows: slice, states: States, name: str) -> None:
        hidden = states.hidden.grad
        # What is beside the states may be for other layers than this and the later ones.
        beside = {
            key: torch.zeros_like(values) if values.grad is None else values.grad
            for key, values in states.beside.items()
            if values.requires_grad
        }
        found = [] if hidden is None else [hidden, *beside.values()]
        if hidden is None or not all(bool(g.isfinite().all()) for g in found):
            what = "no" if hidden is None else "a NaN or infinite"
            raise NumericalError(
                f"the loss has {what} gradient in the input of {name} in {stream.compute_dtype}. "
                "Run with --compute-dtype float32, or without gradients: "
                f"{WITHOUT}"
            )
        self._write_gradient(len(stream), rows, States(hidden, beside))

    def _write_gradient(self, num_layers: int, rows: slice, gradient: States) -> None:
        if self._gradient is None:
            self._gradient = self._store(num_layers, gradient, "gradient")
        self._gradient.write(self._share.held(rows), gradient)

    def _turn_gradient(self) -> None:
        if self._gradient is not None:  # a model of one layer has none
            self._gradient.turn()

    def _gradient_of_all(self, stream: LayerStream) -> States | None:
        """That of all sequences, in the first process."""
        cpu = torch.device("cpu")
        if self._processes.size == 1:
            assert self._gradient is not None, "a layer is done"
            return self._gradient.read(slice(None), cpu)
        own = []
        for rows in self._own_batches(stream):
            assert self._gradient is not None, "a layer is done"
            own.append((rows.start, self._gradient.read(self._share.held(rows), cpu)))
        found = self._to_first(own)
        if found is None:
            return None
        parts = [states for _, states in sorted(itertools.chain(*found), key=lambda own: own[0])]
        hidden = torch.cat([states.hidden for states in parts])
        names = parts[0].beside
        return States(hidden, {n: torch.cat([own.beside[n] for own in parts]) for n in names})

    def _merged(self, found: dict[str, Findings]) -> dict[str, Findings]:
        """The findings of all processes, in the first one."""
        merged: dict[str, Findings] = {kind: {} for kind in found}
        for others in self._to_first(found) or ():
            for kind, findings in others.items():
                merged[kind] |= findings
        return merged

    def _to_first(self, value: T) -> list[T] | None:
        """The values of all processes by rank, in the first one."""
        none: list[Any] = [None] * (self._processes.size - 1)
        found = self._processes.deliver([value, *none])
        return found if self._processes.is_first else None

    def _store(self, num_layers: int, states: States, name: str) -> StatesStore:
        budget_bytes = self._budget_bytes // num_layers
        path = self._folder / f"{name}.bin"
        return StatesStore(self._share.num_held(len(self._tokens)), states, budget_bytes, path)


def watched(
    linears: Mapping[str, nn.Linear], visit: Callable[[str, Tensor, Tensor], None]
) -> ExitStack:
    """Call `visit(name, x, g)` with the input of each linear and the gradient in its output, for
    every time it runs until closed. The call comes in the backward pass."""
    stack = ExitStack()
    for name, linear in linears.items():

        def hook(_: nn.Module, args: tuple[Tensor, ...], y: Tensor, name: str = name) -> None:
            x = args[0].detach()
            if not y.requires_grad:  # in the first layer, where no input needs a gradient
                y.requires_grad_()
            y.register_hook(lambda g: visit(name, x, g.detach()))

        stack.callback(linear.register_forward_hook(hook).remove)
    return stack


def draw(log_p_NV: Tensor, generator: torch.Generator) -> Tensor:
    """A label for each token from its predictions, int64 [N]; the same on every device but for
    ties in rounding.

    Args:
        log_p_NV: logarithms of probabilities, float32.
        generator: on the CPU.
    """
    # The label is the first token whose cumulative probability is above u.
    u_N1 = torch.rand(len(log_p_NV), 1, generator=generator, dtype=torch.float64)
    below_NV = log_p_NV.exp().cumsum(-1, dtype=torch.float64)
    u_N1 = u_N1.to(below_NV.device) * below_NV[:, -1:]
    label_N = torch.searchsorted(below_NV, u_N1, right=True)[:, 0]
    return label_N.clamp(max=log_p_NV.shape[1] - 1)


def _gradient_in_logits(logits_NV: Tensor, generator: torch.Generator) -> Tensor:
    """That of the summed cross entropy of drawn labels, in the dtype of the logits: the
    probabilities, less 1 at the labels."""
    # A few tokens at a time on a CPU: for tensors of all of them the system has to find memory,
    # which takes three times as long as to compute them.
    num = DRAWN if logits_NV.device.type == "cpu" else max(1, len(logits_NV))
    gradient_NV = torch.empty_like(logits_NV)
    for own_NV, gradient in zip(logits_NV.split(num), gradient_NV.split(num)):
        log_p_NV = F.log_softmax(own_NV.float(), -1)
        label_N = draw(log_p_NV, generator)
        p_NV = log_p_NV.exp_()
        p_NV[torch.arange(len(p_NV), device=p_NV.device), label_N] -= 1
        gradient.copy_(p_NV)
    return gradient_NV


def _recording(values: Tensor) -> Tensor:
    return values.requires_grad_() if values.is_floating_point() else values


def _backward(output: States, gradient: States) -> None:
    """The backward pass of a layer from the gradients in its output. In what it gives beside its
    hidden states there is one where a later layer has used it."""
    # Copies: the hooks may get this very memory, which is written next.
    pairs = [(output.hidden, gradient.hidden.clone())]
    pairs += [
        (values, gradient.beside[key].clone())
        for key, values in output.beside.items()
        if key in gradient.beside and values.requires_grad
    ]
    tensors = [values for values, _ in pairs]
    torch.autograd.backward(tensors, [given.to(values.dtype) for values, given in pairs])


def _check_gradient(output: Tensor, name: str) -> None:
    if not output.requires_grad:
        raise ModelError(
            f"the output of {name} has no gradient in its linears: the layer computes in a way "
            "that cannot be differentiated. Choose a recipe that needs no gradients: "
            f"{WITHOUT}"
        )
