"""Training of a decoder layer between the roundings of its input groups.

    round q, k, v ─► train o, gate, up, down, norms, scales of q, k, v ─► round o ─► train … ─►
    round down ─► train norms and scales of all

What is not yet rounded takes over what rounding broke, and the next group is rounded to where it
has moved. The loss is the error of the layer's output.

Sources: Tseng et al., "QuIP#", arXiv 2402.04396, section 5 (a layer's later linears trained after
each rounding); Tseng et al., "QTIP", arXiv 2406.11235.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from vqllm.calibration.layer_calibrator import LayerCalibrator
from vqllm.checkpoint.packed_matrix import PackedMatrix, bit_fields
from vqllm.plan.packed_spec import scaled
from vqllm.quantization.loaded_layer import LoadedLayer, Place
from vqllm.recipes.schema import LayerTraining
from vqllm.tuning.descent import batch, descend
from vqllm.tuning.relative_parameter import RelativeParameter


class LayerTrainer:
    """The training of one layer. It begins while the layer is unquantized."""

    def __init__(
        self, settings: LayerTraining, seed: int, layer: LoadedLayer, calibrator: LayerCalibrator
    ) -> None:
        self._settings, self._seed = settings, seed
        self._layer, self._calibrator = layer, calibrator
        self._dtype = next(iter(layer.linears.values())).weight.dtype
        self._rows: dict[str, _Rows] = {}
        self._vectors = {n: RelativeParameter(v, self._dtype) for n, v in layer.vectors.items()}
        self._weights: dict[str, RelativeParameter] = {}
        if "weights" in settings.train:
            self._weights = {n: RelativeParameter(W, self._dtype) for n, W in layer.weights.items()}
        num = len(calibrator.tokens)
        num_held_out = max(1, round(settings.held_out * num))
        # Spread evenly: sequences of one source follow each other.
        self._held_out = torch.arange(num_held_out) * num // num_held_out
        chosen = torch.ones(num, dtype=torch.bool).index_fill(0, self._held_out, False)
        self._training = chosen.nonzero().flatten()
        self._num_trainings = 0
        calibrator.aim(layer.index)

    def weights(self, names: Sequence[str]) -> dict[str, Tensor] | None:
        """Where the weights of linears have moved, float32; None if they do not move."""
        if not self._weights:
            return None
        return {name: self._weights[name].wide(self._weights[name].delta) for name in names}

    def train(self, names: Sequence[str], rounded: Sequence[PackedMatrix]) -> list[PackedMatrix]:
        """Train what is free after the linears of these names have been dealt with, and put it into
        the layer.

        Args:
            rounded: those that were rounded; they come back with what came of it in their records.
        """
        # Rounded weights stay; their rows get scales that move.
        for name in names:
            self._weights.pop(name, None)
        if "rows" in self._settings.train:
            self._rows |= {q.name: _Rows(q.W_hat_RC, self._dtype) for q in rounded}
        parameters = [(own.delta, self._settings.rate) for own in self._rows.values()]
        parameters += [(own.delta, self._settings.rate) for own in self._vectors.values()]
        parameters += [(own.delta, self._settings.weight_rate) for own in self._weights.values()]
        if not parameters:
            return list(rounded)
        for parameter, _ in parameters:
            parameter.requires_grad_(True)
        training = descend(
            parameters, self._settings.steps, self._loss, self._held_out_error, self._layer.name
        )
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        self._num_trainings += 1
        # The layer computes with where they have moved, and the next group is rounded to it.
        for place, value in self._values().items():
            place.parameter.data = value
        return [replace(q, record=replace(q.record, training=training)) for q in rounded]

    def finished(self, results: Sequence[PackedMatrix]) -> list[PackedMatrix]:
        """All rounded linears of the layer, with their scales."""
        return [self._with_rows(quantized) for quantized in results]

    def vectors(self) -> dict[str, Tensor]:
        """Where vectors have moved, float32, by full name."""
        return {name: own.wide(own.delta) for name, own in self._vectors.items()}

    def _with_rows(self, quantized: PackedMatrix) -> PackedMatrix:
        own = self._rows.get(quantized.name)
        if own is None:
            return quantized
        tensors = {key: tensor.cpu() for key, tensor in quantized.tensors.items()}
        factor = 1 + own.delta.detach().cpu()
        spec, tensors = scaled(quantized.name, quantized.spec, tensors, "out", factor)
        record = replace(quantized.record, **bit_fields(spec))
        return PackedMatrix(quantized.name, spec, tensors, record)

    def _loss(self, step: int) -> list[Tensor]:
        name = f"{self._layer.name}, training {self._num_trainings}"
        rows = batch(step, self._settings.batch, len(self._training), self._seed, name)
        with _in_place(self._values()):
            return [self._calibrator.error(self._layer.index, self._training[rows])]

    def _held_out_error(self) -> float:
        total = 0.0
        with _in_place(self._values()):
            for rows in self._held_out.split(self._settings.batch):
                total += float(self._calibrator.error(self._layer.index, rows)) * len(rows)
        return total / len(self._held_out)

    def _values(self) -> dict[Place, Tensor]:
        """What the layer computes with, as far as it moves."""
        linears, moving = self._layer.linears, self._layer.moving
        values = {
            Place(linears[name], "weight"): own.value()
            for name, own in (*self._rows.items(), *self._weights.items())
        }
        return values | {moving[name]: own.value() for name, own in self._vectors.items()}


class _Rows:
    """(1 + δ) ∘ Ŵ in the dtype of the layer, a δ for each row."""

    def __init__(self, W_hat_RC: Tensor, dtype: torch.dtype) -> None:
        self._W_hat_RC, self._dtype = W_hat_RC, dtype
        zeros = torch.zeros(len(W_hat_RC), device=W_hat_RC.device)
        self.delta = nn.Parameter(zeros, requires_grad=False)

    def value(self) -> Tensor:
        W = torch.addcmul(self._W_hat_RC, self._W_hat_RC, self.delta[:, None])
        return W.to(self._dtype)


@contextmanager
def _in_place(values: Mapping[Place, Tensor]) -> Iterator[None]:
    """Within, modules compute with these tensors, through which gradients pass."""
    present = {place: place.parameter for place in values}
    for place, value in values.items():
        place.module._parameters[place.key] = value  # type: ignore[assignment]
    try:
        yield
    finally:
        for place, parameter in present.items():
            place.module._parameters[place.key] = parameter
