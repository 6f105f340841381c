"""A causal language model, one decoder layer in memory at a time.

The Hugging Face model itself is used, with its experts in linear form: its layers are on disk, in
the original safetensors files, everything outside the layers is in memory.
"""

import contextlib
import gc
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from vqllm.calibration.layers import Layers
from vqllm.checkpoint.source import SourceTensors
from vqllm.core.tensors import frozen
from vqllm.hf.decoder_layers import layer_names
from vqllm.hf.dtypes import kept_dtypes, tensors_of
from vqllm.hf.linears import shared_modules
from vqllm.hf.loading import make_buffers, skeleton


class LayerStream(Layers):
    """The layers of the model in `folder`, in linear form, loaded one at a time.

    Attributes:
        model: the model; its layers' weights are on the meta device unless loaded.
        names: full module name of each layer.
        tensors: the stored tensors by their names in the model.
        shared: modules that several layers, or a layer and the rest of the model, have in common;
            they stay in memory from the beginning.
        source_dtype: the dtype of the stored weights.
        compute_dtype: the dtype in which layers run.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        compute_dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        tensors: SourceTensors | None = None,
    ) -> None:
        """Args:
        tensors: those of the folder, opened before; their model becomes that of the stream.
        """
        # The skeleton has no weights. It shows which modules can stay on disk.
        self.tensors = tensors or SourceTensors.open(folder, trust_remote_code)
        blueprint = self.tensors.blueprint
        model = blueprint.model.eval()
        super().__init__(model, layer_names(model), device)
        self.shared = shared_modules(model, self.names)
        self.source_dtype: torch.dtype = model.dtype
        self.compute_dtype = compute_dtype or _compute_dtype(self.source_dtype, device)
        # What transformers keeps in float32 is read so, and stays so in the compute dtype.
        self._kept = kept_dtypes(model, model, self.source_dtype, blueprint.origin)
        self._cast("", model, self.source_dtype)
        if self.compute_dtype != self.source_dtype:
            own = skeleton(folder, trust_remote_code=trust_remote_code, dtype=self.compute_dtype)
            self._kept = kept_dtypes(model, own, self.compute_dtype, blueprint.origin)
        # Everything outside the layers is cast now; a layer is cast when it is loaded.
        self._load_outside_layers()
        self._cast_outside_layers()

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Layer `index` with its weights in memory, in the source dtype; freed on leaving."""
        layer, name = self.layers[index], self.names[index]
        self._restore_forward(index)
        modules = {n: m for n, m in layer.named_modules(prefix=name) if m not in self.shared}
        self._fill(modules)
        try:
            yield layer
        finally:
            self._free(modules)
            gc.collect()

    def _load_outside_layers(self) -> None:
        """Read everything that is not in a layer or that layers share, and make all buffers that
        are computed, those in layers too."""
        model = self.model
        inside = {id(module) for layer in self.layers for module in layer.modules()}
        inside -= {id(module) for module in self.shared}
        modules = {n: m for n, m in model.named_modules() if id(m) not in inside}
        missing = self._fill(modules)
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
        make_buffers(model, self.device)

    def _fill(self, modules: Mapping[str, nn.Module]) -> set[str]:
        """Read the stored tensors of these modules, by full name; the names of those that are not
        stored."""
        places = {
            f"{prefix}.{key}" if prefix else key: (module, key, value)
            for prefix, module in modules.items()
            for key, value in module.state_dict(keep_vars=True).items()
            if "." not in key
        }
        stored = [name for name in places if name in self.tensors]
        for name, values in self.tensors.read_many(stored):
            module, key, old = places[name]
            values = values.to(self.device, old.dtype)
            if key in module._buffers:
                module._buffers[key] = values
            else:
                setattr(module, key, frozen(values))
        return places.keys() - set(stored)

    def _free(self, modules: Mapping[str, nn.Module]) -> None:
        """Free all tensors of these modules but buffers that no file stores: they were computed
        once, for all layers."""
        for prefix, module in modules.items():
            computed = {
                key: value
                for key, value in module.named_buffers(recurse=False)
                if f"{prefix}.{key}" not in self.tensors
            }
            module._apply(lambda tensor: tensor.to("meta"), recurse=False)
            module._buffers.update(computed)

    @contextlib.contextmanager
    def ready(self, index: int) -> Iterator[nn.Module]:
        with self.layer(index) as layer:
            self.cast(index)
            yield layer

    def cast(self, index: int) -> None:
        """Cast loaded layer `index` to the compute dtype, without what transformers keeps in
        float32 in a model of that dtype."""
        self._cast(self.names[index], self.layers[index], self.compute_dtype)

    def _cast(self, name: str, module: nn.Module, dtype: torch.dtype) -> None:
        for own, tensor in tensors_of(module, name):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(self._kept.get(own, dtype))

    def _cast_outside_layers(self) -> None:
        inside = {id(module) for layer in self.layers for module in layer.modules()}
        cast: dict[nn.Parameter, nn.Parameter] = {}  # so that tied parameters stay tied
        for prefix, module in self.model.named_modules():
            if id(module) in inside:
                continue
            for key, value in module.named_parameters(recurse=False):
                if value.is_floating_point() and not value.is_meta:
                    if value not in cast:
                        cast[value] = frozen(value.to(self._dtype(f"{prefix}.{key}")))
                    setattr(module, key, cast[value])
            # Tables of positions have the model's dtype (XGLM's), inverse frequencies float32.
            for key, value in module.named_buffers(recurse=False):
                if value.is_floating_point():
                    module._buffers[key] = value.to(self._dtype(f"{prefix}.{key}"))

    def _dtype(self, name: str) -> torch.dtype:
        return self._kept.get(name.removeprefix("."), self.compute_dtype)


def _compute_dtype(source: torch.dtype, device: torch.device) -> torch.dtype:
    """The source dtype, except float16 on a CPU: there bfloat16 is 3 times as fast."""
    if device.type == "cpu" and source == torch.float16:
        return torch.bfloat16
    return source
