"""Calibration of one decoder layer: its input groups, their Hessians, the states of the next."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from vqllm.calibration.drift import Drift, Writer, silenced, writers
from vqllm.calibration.expert_hessians import LayerExperts
from vqllm.calibration.hessian import InputGroup, InputHessian
from vqllm.calibration.layer_stream import LayerStream
from vqllm.calibration.layers import LayerDone
from vqllm.calibration.passes import Model, Passes
from vqllm.calibration.shares import gather_sums, share_sums
from vqllm.core import metrics
from vqllm.core.distributed import Processes
from vqllm.errors import ModelError
from vqllm.hf.experts import expert_linears


@dataclass
class _Observed:
    """Inputs of a layer's linears for a batch, one for each time they ran, and the residual stream
    before the linear that is silenced, if one is."""

    inputs: dict[str, list[Tensor]]
    routed: dict[str, list[Tensor | None]]
    """for each input, the weights of its tokens, where a router chose them"""
    residual: Tensor | None = None


@dataclass
class _Batch:
    """What was observed of some sequences in the two models."""

    rows: slice
    quantized: _Observed
    original: _Observed | None = None


@dataclass
class _Layer:
    """Facts about the loaded layer, found when its groups are."""

    repeats: bool = False
    """a linear runs more than once"""
    unreached: bool = False
    """the first tokens did not reach all linears"""
    writers: dict[str, Writer] = field(default_factory=dict)
    experts: LayerExperts = field(default_factory=LayerExperts)


class LayerCalibrator:
    """Runs the calibration sequences through the layers of a stream, one layer after another.

    `tokens` is int64 [S, L]; `budget_bytes` and `folder` are for states, as `Passes` says.
    `weights` are those of the tokens in the Hessians of linears, float32 [S, L] by full name;
    without, all weigh the same. With `target` "outputs" the original model runs beside the one
    with quantized layers, and Hessians come with the drift of the inputs between the two; with
    "residual" that of the residual stream is measured too. `aims` is the model for whose input the
    unquantized layer's output is the aim of training. `shrinkage` is that of experts' Hessians.
    `processes` share the sequences and the sums; all of them call the same methods.
    """

    def __init__(
        self,
        stream: LayerStream,
        tokens: Tensor,
        budget_bytes: int,
        folder: Path,
        weights: Mapping[str, Tensor] | None = None,
        target: Literal["weights", "outputs", "residual"] = "weights",
        aims: Model | None = None,
        shrinkage: float = 1.0,
        processes: Processes | None = None,
    ) -> None:
        self._shrinkage = shrinkage
        self._weights = weights or {}
        self._target = target
        models: tuple[Model, ...] = ("quantized",)
        if target != "weights" or aims == "original":
            models = ("quantized", "original")
        self._processes = processes or Processes()
        self._passes = Passes(stream, tokens, budget_bytes, folder, models, aims, processes)
        self._stream = stream
        self._layer = _Layer()

    def begin(self, linears: Mapping[str, nn.Linear], vectors: Iterable[nn.Parameter] = ()) -> None:
        """A layer is loaded, in the compute dtype. Its `linears` and those of its `vectors` that
        will change still have the original values."""
        self._passes.begin([*(linear.weight for linear in linears.values()), *vectors])
        self._layer = _Layer()

    def groups(self, index: int, linears: Mapping[str, nn.Linear]) -> list[InputGroup]:
        """Which linears of loaded layer `index` share an input, found by running one batch.

        A linear that the batch does not reach (an expert that was not routed to) is a group of
        its own, after the others.
        """
        layer, name = self._stream.layers[index], self._stream.names[index]
        self._layer.experts = LayerExperts(expert_linears(layer, name, linears), self._shrinkage)
        found = self._found(index, linears)
        # The first process has run the sequences that tell.
        groups, facts = self._processes.broadcast(lambda: found)
        self._layer.repeats, self._layer.unreached, told = facts
        self._layer.writers = {
            name: Writer(gain, tuple(linears[own] for own in later))
            for name, (gain, later) in told.items()
        }
        return groups

    def _found(
        self, index: int, linears: Mapping[str, nn.Linear]
    ) -> tuple[list[InputGroup], tuple[bool, bool, dict[str, tuple[float, list[str]]]]]:
        """The groups of a layer, and the facts of `_Layer`, modules by their names."""
        # Linears share an input if they get the same tensor, or another view of the same memory.
        inputs: list[tuple[Tensor, list[str]]] = []
        num_calls: Counter[str] = Counter()

        def visit(name: str, x: Tensor) -> None:
            num_calls[name] += 1
            for known, names in inputs:
                if known is x or _same_memory(known, x):
                    names.append(name)
                    return
            inputs.append((x, [name]))

        few = self._passes.few
        if few.start < few.stop:  # otherwise a process without sequences
            with self._passes.learning(self._stream.layers[index]):
                self._passes.run(index, few, linears, visit)
        experts = self._layer.experts.linears.keys()
        repeats = max(num_calls.values(), default=0) > 1
        unreached = len(num_calls.keys() - experts) < len(linears.keys() - experts)
        # A linear that ran more than once belongs to the group of its first input.
        first_input: dict[str, int] = {}
        for i, (_, names) in enumerate(inputs):
            for name in names:
                first_input.setdefault(name, i)
        groups = [
            InputGroup(tuple(name for name in dict.fromkeys(names) if first_input[name] == i))
            for i, (_, names) in enumerate(inputs)
        ]
        groups = [group for group in groups if group.names]
        groups += [InputGroup((name,)) for name in linears if name not in first_input]
        groups = self._layer.experts.grouped(groups)
        told: dict[str, tuple[float, list[str]]] = {}
        if self._target == "residual" and self._processes.is_first:
            names = {linear: name for name, linear in linears.items()}
            for name, writer in self._find_writers(index, few, linears, groups).items():
                told[name] = writer.gain, [names[own] for own in writer.later]
        return groups, (repeats, unreached, told)

    def hessians(
        self, index: int, linears: Mapping[str, nn.Linear], groups: list[InputGroup]
    ) -> list[InputHessian]:
        """The Hessian of each group over all sequences.

        The weight of a token is the mean of its weights for the linears of the group. Where a
        linear gets only some of the tokens, all weigh the same and its drift is not measured; in an
        expert they weigh as the router has them too, and its Hessian is shrunk towards that of all.
        """
        hessians = {group: self._empty(linears[group.names[0]], group) for group in groups}
        # A linear that adds to the residual stream is silenced while the stream before it is
        # measured, so it needs a pass of its own.
        alone = [group for group in groups if group.names[0] in self._layer.writers]
        others = [group for group in groups if group not in alone]
        for together in [others, *([group] for group in alone)]:
            if together:
                self._measure(index, linears, {group: hessians[group] for group in together})
        return [self._layer.experts.shrunk(group, hessians.pop(group)) for group in groups]

    def chunks(
        self, linears: Mapping[str, nn.Linear], groups: Iterable[InputGroup], budget_bytes: int
    ) -> Iterator[list[InputGroup]]:
        """The groups in pieces whose Hessians fit the budget, at least one group in each."""
        chunk: list[InputGroup] = []
        total = 0
        for group in groups:
            size = 4 * linears[group.names[0]].in_features ** 2
            if chunk and total + size > budget_bytes:
                yield chunk
                chunk, total = [], 0
            chunk.append(group)
            total += size
        if chunk:
            yield chunk

    def hessian_beyond(self, index: int, name: str, linear: nn.Linear) -> InputHessian:
        """The Hessian of a linear that runs after loaded layer `index`, the last one, such as the
        output head, over all sequences.

        Raises:
            ModelError: the model does not call it.
        """
        hessian = InputHessian.empty(linear.in_features, self._stream.device)
        inputs: list[Tensor] = []

        def visit(_: str, x: Tensor) -> None:
            inputs.append(x.reshape(-1, x.shape[-1]).clone())
            raise LayerDone

        share_sums([hessian], self._processes)
        for batches in self._passes.rounds():
            inputs.clear()
            for rows in batches:
                self._passes.run(index, rows, {name: linear}, visit, beyond=True)
            for x_NC in itertools.chain.from_iterable(self._processes.exchange(inputs)):
                hessian.add(x_NC)
        gather_sums([hessian], self._processes)
        if hessian.num_tokens == 0:
            raise ModelError(
                f"{type(self._stream.model).__name__} does not call its output head {name}, so "
                "there is no Hessian of its input. Leave it as it is: --set head=null, into "
                "another output folder (and embeddings=null where the two are tied)."
            )
        return hessian

    def settle(self, layer: nn.Module, unfinished: Iterable[nn.Module]) -> None:
        """All linears of `layer` but `unfinished` have their final weights: what depends on
        finished ones only is computed once for all further passes."""
        # A linear that `groups` did not reach is finished last, wherever it runs.
        if not self._layer.unreached:
            self._passes.settle(layer, unfinished)

    @property
    def tokens(self) -> Tensor:
        """The sequences, int64 [S, L]."""
        return self._passes.tokens

    def aim(self, index: int) -> None:
        """Store the output of loaded layer `index`, which is still unquantized, for `error`."""
        self._passes.aim(index)

    def error(self, index: int, rows_N: Tensor) -> Tensor:
        """How far the output of loaded layer `index` is from its aim, for sequences by number: the
        squared error of a token's output relative to the power of the aim, mean over tokens. With
        gradients if they are enabled."""
        wanted = self._passes.wanted(rows_N)
        return metrics.output_error(self._passes.output(index, rows_N), wanted)

    def advance(self, index: int) -> None:
        """Replace the stored states by the outputs of loaded layer `index`."""
        self._passes.advance(index)

    def close(self) -> None:
        """Free the stored states."""
        self._passes.close()

    def _find_writers(
        self,
        index: int,
        few: slice,
        linears: Mapping[str, nn.Linear],
        groups: Iterable[InputGroup],
    ) -> dict[str, Writer]:
        def run() -> Tensor:
            output = self._passes.run(index, few, {}, lambda name, x: None)
            assert output is not None, "nothing ends this pass early"
            return output.hidden

        return writers(run, linears, [group.names for group in groups])

    def _empty(self, linear: nn.Linear, group: InputGroup) -> InputHessian:
        hessian = InputHessian.empty(linear.in_features, self._stream.device)
        # The tokens of an expert are not the same in the two models.
        if self._target != "weights" and group.side is None:
            adds = group.names[0] in self._layer.writers
            hessian.drift = Drift.empty(linear, adds, self._stream.device)
        return hessian

    def _measure(
        self,
        index: int,
        linears: Mapping[str, nn.Linear],
        hessians: Mapping[InputGroup, InputHessian],
    ) -> None:
        """Add all tokens to the Hessians of these groups."""
        watched = {group.names[0]: linears[group.names[0]] for group in hessians}
        others = self._layer.experts.others(hessians, linears, self._stream.device)
        watched |= {name: linears[name] for name in others}
        all_sums = [*hessians.values(), *{id(own): own for own in others.values()}.values()]
        share_sums(all_sums, self._processes)
        for batch in self._observed(index, watched):
            for group, hessian in hessians.items():
                self._add(hessian, group.names, batch.rows, batch.quantized)
                if hessian.drift is not None and batch.original is not None:
                    hessian.drift = self._with(hessian.drift, group, batch, batch.original)
            for name, hessian in others.items():
                self._add(hessian, (name,), batch.rows, batch.quantized)
        gather_sums(all_sums, self._processes)
        self._layer.experts.share(hessians)

    def _observed(self, index: int, watched: Mapping[str, nn.Linear]) -> Iterator[_Batch]:
        """Run all batches as far as the watched linears, each process its own; they come in order,
        in every process."""
        for rows_of_round in self._passes.rounds():
            own = []
            for rows in rows_of_round:
                original = None
                if self._target != "weights":
                    original = self._observe(index, rows, watched, "original")
                quantized = self._observe(index, rows, watched, "quantized")
                own.append(_Batch(rows, quantized, original))
            yield from itertools.chain.from_iterable(self._processes.exchange(own))

    def _add(
        self, hessian: InputHessian, names: tuple[str, ...], batch: slice, observed: _Observed
    ) -> None:
        """Add a batch of a linear's inputs; its weights are those of linears with these names."""
        for x, routed in zip(observed.inputs[names[0]], observed.routed[names[0]]):
            weight_N = self._weight(names, batch, x, routed)
            hessian.add(x.reshape(-1, x.shape[-1]), weight_N)

    def _observe(
        self, index: int, batch: slice, watched: Mapping[str, nn.Linear], model: Model
    ) -> _Observed:
        """Run a batch through the layer as far as the watched linears."""
        writer = next((self._layer.writers.get(name) for name in watched), None)
        observed = _Observed({name: [] for name in watched}, {name: [] for name in watched})
        waiting = set(watched)

        def visit(name: str, x: Tensor) -> None:
            observed.inputs[name].append(x.clone())  # a layer may write into it later
            observed.routed[name].append(self._layer.experts.weights(name, x))
            waiting.discard(name)
            # The rest of the layer is of no use here. With what `settle` stores, four input groups
            # measured one after the other cost one pass through a Llama layer instead of 4.
            if not waiting and not self._layer.repeats and writer is None:
                raise LayerDone

        # Without the linear and all after it, the layer returns gain · r, the stream before it.
        with silenced([] if writer is None else [*watched.values(), *writer.later]):
            output = self._passes.run(index, batch, watched, visit, model=model)
        if writer is not None and output is not None:
            observed.residual = output.hidden.float() / writer.gain
        return observed

    def _with(
        self,
        drift: Drift,
        group: InputGroup,
        batch: _Batch,
        original: _Observed,
    ) -> Drift | None:
        """The drift with a batch added; None where the linear runs on other tokens in the two
        models, or more than once."""
        quantized = batch.quantized
        num_tokens = self._passes.tokens[batch.rows].numel()
        inputs = [*original.inputs[group.names[0]], *quantized.inputs[group.names[0]]]
        if len(inputs) != 2 or any(x.shape[:-1].numel() != num_tokens for x in inputs):
            return None
        weight_N = self._weight(group.names, batch.rows, inputs[1])
        x0_NC, x_NC = (x.reshape(num_tokens, -1) for x in inputs)
        drift.add(x0_NC, x_NC, weight_N)
        if original.residual is not None and quantized.residual is not None:
            gap_NR = (original.residual - quantized.residual).reshape(num_tokens, -1)
            drift.add_residual(gap_NR, x_NC, weight_N)
        return drift

    def _weight(
        self,
        names: tuple[str, ...],
        batch: slice,
        x: Tensor,
        routed: Tensor | None = None,
    ) -> Tensor | None:
        """The weights of a batch's tokens in the Hessian of these linears, [N]; None if all weigh
        the same, or x has only some of them and no router says which."""
        if routed is not None:
            return routed
        known = [self._weights[name][batch] for name in names if name in self._weights]
        if not known or x.shape[:-1] != known[0].shape:
            return None
        return torch.stack(known).mean(0).flatten().to(x.device)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
