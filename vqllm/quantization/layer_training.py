"""Training of a decoder layer between the roundings of its input groups.

    round q, k, v ─► train o, gate, up, down, norms, scales of q, k, v ─► round o ─► train … ─►
    round down ─► train norms and scales of all

What is not yet rounded takes over what rounding broke, and the next group is rounded to where it
has moved. The loss is the error of the layer's output.

Sources: Tseng et al., "QuIP#", arXiv 2402.04396, section 5 (a layer's later linears trained after
each rounding); Tseng et al., "QTIP", arXiv 2406.11235.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vqllm.calibration.layer_calibrator import LayerCalibrator
from vqllm.core.bits import count
from vqllm.core.protocols import JSON
from vqllm.plan.packed_spec import bit_fields, scaled
from vqllm.quantization.linear import QuantizedLinear
from vqllm.recipes.schema import LayerTraining
from vqllm.tuning.descent import batch, descend
from vqllm.tuning.relative_parameter import Moved


@dataclass(frozen=True)
class Place:
    """Where a module has a parameter."""

    module: nn.Module
    key: str

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.get_parameter(self.key)


def vectors_of(
    layer: nn.Module, name: str, shared: Collection[nn.Module], is_stored: Callable[[str], bool]
) -> dict[str, Place]:
    """The norms and biases of a layer by full name: those that it has alone and that the source
    stores under the names that the model uses."""
    return {
        f"{prefix}.{key}": Place(module, key)
        for prefix, module in layer.named_modules(prefix=name)
        if module not in shared
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 1 and parameter.is_floating_point() and is_stored(f"{prefix}.{key}")
    }


@dataclass(frozen=True)
class TrainedLayer:
    """A loaded layer, in the compute dtype, and what of it may move.

    `weights` and `vectors` are values as the source stores them, of the linears and of the `moving`
    vectors by full name.
    """

    index: int
    name: str
    linears: Mapping[str, nn.Linear]
    weights: Mapping[str, Tensor]
    moving: Mapping[str, Place]
    vectors: Mapping[str, Tensor]


class LayerTrainer:
    """The training of one layer. It begins while the layer is unquantized."""

    def __init__(
        self, settings: LayerTraining, seed: int, layer: TrainedLayer, calibrator: LayerCalibrator
    ) -> None:
        self._settings, self._seed = settings, seed
        self._layer, self._calibrator = layer, calibrator
        self._dtype = next(iter(layer.linears.values())).weight.dtype
        self._rows: dict[str, _Rows] = {}
        self._vectors = {n: Moved(v, self._dtype) for n, v in layer.vectors.items()}
        self._weights: dict[str, Moved] = {}
        if "weights" in settings.train:
            self._weights = {n: Moved(W, self._dtype) for n, W in layer.weights.items()}
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

    def train(self, names: Sequence[str], rounded: Sequence[QuantizedLinear]) -> None:
        """Train what is free after the linears of these names have been dealt with, and put it into
        the layer.

        Args:
            rounded: those that were rounded; what came of it is added to their records.
        """
        for name in names:
            self._weights.pop(name, None)
        if "rows" in self._settings.train:
            self._rows |= {q.name: _Rows(q.W_hat_RC, self._dtype) for q in rounded}
        parameters = [(own.delta, self._settings.rate) for own in self._rows.values()]
        parameters += [(own.delta, self._settings.rate) for own in self._vectors.values()]
        parameters += [(own.delta, self._settings.weight_rate) for own in self._weights.values()]
        if not parameters:
            return
        for parameter, _ in parameters:
            parameter.requires_grad_(True)
        told = descend(parameters, self._settings.steps, self._loss, self._look, self._layer.name)
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        self._num_trainings += 1
        for place, value in self._values().items():
            place.parameter.data = value
        for quantized in rounded:
            quantized.record["training"] = told

    def finished(self, results: Sequence[QuantizedLinear]) -> list[QuantizedLinear]:
        """All rounded linears of the layer, with their scales."""
        return [self._with_rows(quantized) for quantized in results]

    def vectors(self) -> dict[str, Tensor]:
        """Where vectors have moved, float32, by full name."""
        return {name: own.wide(own.delta) for name, own in self._vectors.items()}

    def _with_rows(self, quantized: QuantizedLinear) -> QuantizedLinear:
        own = self._rows.get(quantized.name)
        if own is None:
            return quantized
        tensors = {key: tensor.cpu() for key, tensor in quantized.tensors.items()}
        factor = 1 + own.delta.detach().cpu()
        spec, tensors = scaled(quantized.name, quantized.spec, tensors, "out", factor)
        # Its losses stay those of the rounding: training follows outputs, not weights.
        record: JSON = {
            **quantized.record,
            **bit_fields(count(spec.layout()), spec.rows * spec.cols),
        }
        return replace(quantized, spec=spec, tensors=tensors, record=record)

    def _loss(self, step: int) -> list[Tensor]:
        name = f"{self._layer.name}, training {self._num_trainings}"
        rows = batch(step, self._settings.batch, len(self._training), self._seed, name)
        with _in_place(self._values()):
            return [self._calibrator.error(self._layer.index, self._training[rows])]

    def _look(self) -> float:
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
