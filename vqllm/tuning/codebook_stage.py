"""Codes fixed, codebooks and scales of every linear by least squares, layer by layer.

    quantized   states ─► layer, H = E[x xᵀ] of every linear ─► fit to the original's weights
                       ─► layer ─► states ─► next layer

H is measured on what reaches a linear in the quantized model, whose layers before it are fitted
already. What the step for one linear is: `vqllm.distillation.fit_scales`.
"""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vqllm.core.protocols import JSON
from vqllm.errors import NumericalError
from vqllm.hf.linears import capture_inputs
from vqllm.tuning.base import MODEL_TUNINGS, FittedLinear, ModelTask
from vqllm.tuning.by_layers import LayerRun, LayerTuning

logger = logging.getLogger(__name__)


@MODEL_TUNINGS.register("codebook")
class Refit(LayerTuning):
    """Codebooks and scales of least tr((W − Ŵ) H (W − Ŵ)ᵀ) for the codes."""

    type: Literal["codebook"] = "codebook"
    train: tuple[Literal["codebooks", "columns", "rows"], ...] = Field(
        ("codebooks", "rows"),
        min_length=1,
        description="codebooks: codebooks, tables and scales of groups, as the codec has them; "
        "columns: a scale for every input of every quantized linear; rows: one for every output",
    )
    steps: int = Field(20, ge=1, description="conjugate-gradient steps on codebooks")
    damping: float = Field(
        0.01, gt=0, le=10, description="added to the diagonal of H, relative to its mean"
    )

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(self.train)

    @property
    def reads_weights(self) -> bool:
        return True

    def __call__(self, task: ModelTask) -> JSON:
        with _constant(task.parameters.get("codebooks", {}).values()):
            for linear in task.linears.values():
                linear.renew()
            report = _Run(self, task).run()
        linears = [own for layer in report["layers"] for own in layer["linears"]]
        return {"linears": linears}


@contextmanager
def _constant(parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Within, these do not ask for gradients, so that weights are decoded once after each change
    and not in every call."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class _Run(LayerRun[Refit]):
    def _read_original(self, index: int, original: object) -> None:
        assert isinstance(original, nn.Module)
        prefix = f"{self._student.names[index]}."
        self._weights = {
            name: original.get_parameter(f"{name.removeprefix(prefix)}.weight").detach().float()
            for name in self._linears(index)
        }

    def _linears(self, index: int) -> Mapping[str, FittedLinear]:
        prefix = f"{self._student.names[index]}."
        return {n: own for n, own in self._task.linears.items() if n.startswith(prefix)}

    def _train(self, index: int, parameters: dict[str, nn.Parameter]) -> None:
        stage, fitted = self._stage, []
        for name, H_CC in self._hessians(index).items():
            if not bool(H_CC.isfinite().all()):
                raise NumericalError(
                    f"{name}: its inputs in the quantized model are not finite: the checkpoint is "
                    "damaged, or tuned too far. Measure it with vqllm eval before you tune it."
                )
            H_CC.diagonal().add_(stage.damping * H_CC.diagonal().mean())
            linear = self._task.linears[name]
            before, after = linear.fit(self._weights[name], H_CC, stage.train, stage.steps)
            fitted.append({"name": name, "before": before, "after": after})
        self._layers.append({"layer": index, "faults": 0, "linears": fitted})
        if fitted and self._task.processes.is_first:
            mean = {k: sum(own[k] for own in fitted) / len(fitted) for k in ("before", "after")}
            line = "%s: mean proxy loss %.4g, fitted %.4g"
            logger.info(line, self._student.names[index], mean["before"], mean["after"])

    def _load(self, record: JSON, tensors: dict[str, Tensor]) -> int:
        num_done = super()._load(record, tensors)
        # Codebooks moved without the linears noticing.
        for linear in self._task.linears.values():
            linear.renew()
        return num_done

    def _hessians(self, index: int) -> dict[str, Tensor]:
        """The sum of x xᵀ of every linear that tokens reach, float32 [C, C], over all processes."""
        linears = self._linears(index)
        sums = {
            name: torch.zeros(own.in_features, own.in_features, device=self._task.device)
            for name, own in linears.items()
        }

        def add(name: str, x: Tensor) -> None:
            x_NC = x.reshape(-1, x.shape[-1]).float()
            sums[name].addmm_(x_NC.T, x_NC)

        with capture_inputs(linears, add):
            mine = self._task.processes.own(torch.arange(len(self._parts[0])))
            states = self._states[0]
            for rows in mine.split(self._together):
                given = None if states is None else states[rows].to(self._task.device)
                self._run(self._student, index, self._parts[0][rows], given, grad=False)
        summed = {name: self._task.processes.sum(H_CC) for name, H_CC in sums.items()}
        return {name: H_CC for name, H_CC in summed.items() if bool(H_CC.any())}
