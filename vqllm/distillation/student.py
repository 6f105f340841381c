"""A quantized model that can be trained: everything continuous a parameter, codes exchangeable.

Every quantized linear becomes y = r ∘ (Ŵ (c ∘ x)) + bias with its decoded weights Ŵ and new scales
of its outputs, r = 1 + δ, and inputs, c = 1 + δ. That is the same for every format. Afterwards the
scales go into the stored ones, or become a stored scale of 16 bits a row or column. All else that
is trained is its old value and a change in units of it, v + s δ. Where neither codebooks nor codes
move, Ŵ is decoded once and for all.

What is trained is always δ, which starts at 0, so that one step size means the same everywhere.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint as recomputed

from vqllm.checkpoint.reader import Checkpoint
from vqllm.core.distributed import Processes
from vqllm.core.tensors import frozen
from vqllm.distillation.coded_weights import CodedWeights, codecs_of
from vqllm.distillation.fit_scales import fit
from vqllm.hf.decoder_layers import layer_names
from vqllm.hf.linears import decoder_name
from vqllm.hf.running import explained_run
from vqllm.plan.packed_spec import as_stored, scaled
from vqllm.runtime import PackedModule, VQLinear
from vqllm.tuning.relative_parameter import RelativeParameter
from vqllm_kernels.linear import LinearSpec


class ScaledLinear(nn.Module):
    """y = r ∘ (Ŵ (c ∘ x)) + bias; Ŵ is in the dtype of the model, the rest float32."""

    def __init__(
        self, linear: VQLinear, bias: Tensor | None, coded: CodedWeights | None = None
    ) -> None:
        """Args:
        bias: as stored, which may be more exact than that of the loaded linear.
        coded: the weights, where codebooks or codes move; without, they are constant.
        """
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        W_RC = linear.dequantize()
        self.weight: Tensor
        self.register_buffer("weight", W_RC, persistent=False)
        self.coded, self._version = coded, 0
        self.rows = frozen(torch.zeros(self.out_features, device=W_RC.device))
        self.columns = frozen(torch.zeros(self.in_features, device=W_RC.device))
        self.bias = None if bias is None else RelativeParameter(bias, W_RC.dtype)

    def split(self, processes: Processes) -> None:
        """From now on each process holds a part of Ŵ, and all of it only while it is computed with.
        All must call the linear equally often."""
        W_RC = self.weight
        del self.weight  # only parameters are split
        self.weight = frozen(W_RC)
        processes.split(self, {self.weight})

    def forward(self, x: Tensor) -> Tensor:
        """y [.., R] of x [.., C], in the dtype of x."""
        if self.columns.requires_grad:
            # Not (1 + δ) x: in bfloat16 every δ below 0.004 would be lost in 1 + δ.
            x = torch.addcmul(x, x, self.columns.to(x.dtype))
        y = F.linear(x, self._weight())
        if self.rows.requires_grad:
            y = torch.addcmul(y, y, self.rows.to(y.dtype))
        return y if self.bias is None else y + self.bias.value().to(y.dtype)

    def decoded(self) -> Tensor:
        """Ŵ, float32 [R, C]."""
        return (
            self.weight.float() if self.coded is None else self.coded.weights_of(self.coded.state())
        )

    def fit(
        self, W_RC: Tensor, H_CC: Tensor, kinds: Collection[str], steps: int
    ) -> tuple[float, float]:
        """Codebooks and scales of these kinds by least squares, as `fit_scales.fit` says."""
        return fit(self, W_RC, H_CC, kinds, steps)

    def renew(self) -> None:
        """Decode weights that are kept anew at the next call: codebooks moved by other means."""
        self._version = -1

    def _weight(self) -> Tensor:
        W_RC, coded = self.weight, self.coded
        if coded is None:
            return W_RC
        if coded.trains:
            return coded.with_recorded_gradient(coded.decoded())
        if self._version != coded.version:
            with torch.no_grad():
                W_RC.copy_(coded.decoded())
            self._version = coded.version
        return coded.with_recorded_gradient(W_RC)


@dataclass(frozen=True)
class Changes:
    """What tuning changed of a checkpoint: specifications and packed tensors of modules by name,
    and other tensors by theirs."""

    specs: dict[str, LinearSpec] = field(default_factory=dict)
    packed: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)


class Student:
    """A loaded quantized model, changed in place so that it can be trained.

    Attributes:
        model: gives logits; nothing in it needs a gradient but what was asked for.
        parameters: float32, by kind ("rows", "columns", "vectors", "head", "codebooks") and name.
        linears: the quantized linears of the layers by name.
        codes: of the quantized linears of the layers by name, where codes or codebooks move.
        not_stored: names of parameters that the checkpoint does not have, which are left alone.
    """

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        kinds: set[str],
        shared_by: Processes | None = None,
    ) -> None:
        """Args:
        model: loaded from the checkpoint, on the device where it will run.
        kinds: what will be trained: the kinds of `parameters`, and "codes".
        shared_by: processes each of which is to hold a part of the decoded weights, which are
            then constant.
        """
        self.model = model
        self._checkpoint = checkpoint = checkpoint.in_model(model)
        self.not_stored: list[str] = []
        # Nothing asks for gradients but what is asked for below.
        model.requires_grad_(False)
        self.linears = self._replace_linears(kinds, shared_by)
        self.codes = {
            n: linear.coded for n, linear in self.linears.items() if linear.coded is not None
        }
        self._moved = {
            "vectors": {
                f"{n}.bias": linear.bias
                for n, linear in self.linears.items()
                if linear.bias is not None
            }
        }
        layers = [model.get_submodule(name) for name in layer_names(model)]
        self._forwards = {layer: layer.forward for layer in layers}
        self._move(kinds)
        # Of all that could move, what is asked for.
        parameters = self._all_parameters()
        self.parameters = {k: own for k, own in parameters.items() if k in kinds and own}
        for own in self.parameters.values():
            for parameter in own.values():
                parameter.requires_grad_(True)

    def _replace_linears(
        self, kinds: set[str], shared_by: Processes | None
    ) -> dict[str, ScaledLinear]:
        """Put a `ScaledLinear` in the place of every quantized linear of the layers, by name."""
        checkpoint = self._checkpoint
        outside = set(checkpoint.quantization.outside_layers)
        found = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, VQLinear) and name in checkpoint.linears and name not in outside
        }
        codecs = codecs_of(checkpoint, found) if kinds & {"codebooks", "codes"} else {}
        linears: dict[str, ScaledLinear] = {}
        for name, module in found.items():
            bias = None if module.bias is None else checkpoint.read(f"{name}.bias")
            # Codebooks and codes move in the codec's own terms; all else has constant weights.
            coded = None
            if codec := codecs.get(name):
                coded = CodedWeights(module.spec, codec, module.packed, module.weight.dtype)
                if "codes" not in kinds and not coded.learned:
                    coded = None  # values that are computed: nothing of it moves
            linears[name] = ScaledLinear(module, bias, coded).to(module.device)
            self.model.set_submodule(name, linears[name])
            if shared_by is not None:
                linears[name].split(shared_by)
        return linears

    def _all_parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """Everything that could be trained, by kind and name."""
        scales_and_codebooks: dict[str, dict[str, nn.Parameter]] = {
            "rows": {name: linear.rows for name, linear in self.linears.items()},
            "columns": {name: linear.columns for name, linear in self.linears.items()},
            "codebooks": {
                f"{name}.{key}": own.delta
                for name, coded in self.codes.items()
                for key, own in coded.learned.items()
            },
        }
        others = {
            kind: {name: own.delta for name, own in moved.items()}
            for kind, moved in self._moved.items()
        }
        return scales_and_codebooks | others

    def _move(self, kinds: set[str]) -> None:
        """Let vectors, and the matrices of head and embedding, move."""
        # Linears are done; embedding and head may share one matrix, which then moves once.
        ends = {self.model.get_input_embeddings(), self.model.get_output_embeddings()}
        decoder = decoder_name(self.model)
        ours = {module for linear in self.linears.values() for module in linear.modules()}
        tied: dict[int, RelativeParameter] = {}
        for prefix, module in list(self.model.named_modules()):
            if module in ours or isinstance(module, PackedModule):
                continue
            for key, parameter in list(module.named_parameters(recurse=False)):
                name = f"{prefix}.{key}" if prefix else key
                kind = "head" if module in ends else "vectors"
                if kind not in kinds or not parameter.is_floating_point():
                    continue
                if kind == "vectors" and (parameter.ndim > 1 or not name.startswith(decoder)):
                    continue  # other towers of a multimodal model have no part in the predictions
                moved = tied.get(id(parameter))
                if moved is None and name not in self._checkpoint.tensors:
                    self.not_stored.append(name)
                    continue
                if moved is None:
                    # As stored: the loaded one may be rounded to a narrower dtype.
                    old = self._checkpoint.read(name).to(parameter.device)
                    moved = tied[id(parameter)] = RelativeParameter(old, parameter.dtype)
                    self._moved.setdefault(kind, {})[name] = moved
                module.register_parameter(key, moved.delta)
                parametrize.register_parametrization(module, key, moved, unsafe=True)
                # It made a copy of its own, which would undo ties.
                module.parametrizations[key].original = moved.delta  # type: ignore[index]

    def logits(self, tokens_SL: Tensor) -> Tensor:
        """Predictions [S, L, V]."""
        with explained_run(self.model):
            return self.model(input_ids=tokens_SL, use_cache=False).logits

    def recompute(self, on: bool) -> None:
        """Whether gradients find only the inputs of layers in memory and compute the rest again.

        Not through transformers' own: it does so in training mode only, where models drop features
        and layers.
        """
        options = {"use_reentrant": False, "preserve_rng_state": False}
        for layer, own in self._forwards.items():
            layer.forward = partial(recomputed, own, **options) if on else own

    def changes(self) -> Changes:
        """What is to be written in the place of what the checkpoint has.

        Raises:
            NumericalError: a value is beyond what its stored dtype holds.
        """
        changes = Changes()
        for name, linear in self.linears.items():
            spec, tensors = self._checkpoint.linears[name], self._checkpoint.packed(name)
            if linear.coded is not None:
                tensors |= linear.coded.packed()
            for side, factor in (("out", linear.rows), ("in", linear.columns)):
                if factor.requires_grad:
                    spec, tensors = scaled(name, spec, tensors, side, 1 + factor.detach().cpu())
            stored = self._checkpoint.name_in_files(name)
            changes.specs[stored], changes.packed[stored] = spec, tensors
        for moved in self._moved.values():
            for name, own in moved.items():
                if own.delta.requires_grad:
                    values = own.wide(own.delta).detach().cpu()
                    changes.others[self._checkpoint.name_in_files(name)] = as_stored(
                        name, values, self._checkpoint.read(name).dtype
                    )
        return changes
