"""A causal language model, one decoder layer in memory at a time.

The Hugging Face model itself is used, unchanged: its layers are on disk (accelerate reads the
original safetensors files), everything outside the layers is in memory. A layer is run by calling
the whole model: the layers before it pass their input on, the layer itself gets the stored hidden
states in place of its input, and the call ends there. So a layer sees exactly the masks,
positions and other arguments that its own model gives it, and no architecture is named.

    model(tokens):  embeddings → 0 ─pass→ 1 ─pass→ … → i: stored states in, new states out, stop
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from vqllm.errors import ModelError


class LayerDone(Exception):
    """Ends the model's forward: raised when the wanted layer has run, or by a hook inside the
    layer that has seen all it wanted."""


class LayerStream:
    """The layers of the model in `folder`, loaded one at a time.

    Attributes:
        model: the model; its layers' weights are on the meta device unless loaded.
        names: full module name of each layer.
        source_dtype: the dtype of the stored weights.
        compute_dtype: the dtype in which layers run.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        offload_folder: Path,
        compute_dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.device = device
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        prefix = _find_layers(skeleton, str(folder))
        self.model = _load(folder, skeleton, prefix, device, offload_folder, trust_remote_code)
        self.model.eval()
        self.layers: nn.ModuleList = self.model.get_submodule(prefix)  # type: ignore[assignment]
        self.names = [f"{prefix}.{i}" for i in range(len(self.layers))]
        self.source_dtype: torch.dtype = self.model.dtype
        self.compute_dtype = compute_dtype or _compute_dtype(self.source_dtype, device)
        self._cast_outside_layers()
        self._returns_tuple = False
        self._own_forward = {
            i: layer.__dict__.get("forward") for i, layer in enumerate(self.layers)
        }

    def __len__(self) -> int:
        return len(self.layers)

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Layer `index` with its weights in memory, in the source dtype; freed on leaving.

        A layer can be loaded once: it loses its connection to the files when it is.
        """
        layer = self.layers[index]
        self._restore_forward(index)
        for module in layer.modules():
            _materialize(module, self.device)
        try:
            yield layer
        finally:
            layer.to("meta")
            gc.collect()

    def run(
        self,
        index: int,
        tokens: Tensor,
        states: Tensor | None,
    ) -> Tensor | None:
        """The output of loaded layer `index` for a batch; None if a hook ended the layer early.

        Args:
            index: the layer; it must be loaded and of `compute_dtype`.
            tokens: int64 [S, L], what the model is called with.
            states: the layer's input [S, L, D], or None for the first layer (the embeddings).
        """
        result: list[Tensor] = []
        reached = False
        layer = self.layers[index]

        def replace_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal reached
            reached = True
            if states is None:
                return None
            if args:
                return (states, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": states}

        def keep_output(_: nn.Module, args: Any, output: Any) -> None:
            self._returns_tuple = isinstance(output, tuple)
            result.append(output[0] if isinstance(output, tuple) else output)
            raise LayerDone

        for earlier in range(index):
            self.layers[earlier].forward = self._pass_on
        handles = [
            layer.register_forward_pre_hook(replace_input, with_kwargs=True),
            layer.register_forward_hook(keep_output),
        ]
        try:
            with torch.no_grad(), contextlib.suppress(LayerDone):
                self.model(input_ids=tokens.to(self.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
            for earlier in range(index):
                self._restore_forward(earlier)
        if not reached:
            raise ModelError(f"{self.names[index]} was never called by {type(self.model).__name__}")
        return result[0] if result else None

    def _pass_on(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Any:
        return (hidden_states,) if self._returns_tuple else hidden_states

    def _restore_forward(self, index: int) -> None:
        layer, own = self.layers[index], self._own_forward[index]
        layer.__dict__.pop("forward", None)
        if own is not None and hasattr(layer, "_hf_hook"):
            layer.forward = own

    def _cast_outside_layers(self) -> None:
        inside = {id(module) for layer in self.layers for module in layer.modules()}
        for module in self.model.modules():
            if id(module) not in inside:
                for name, value in module.named_parameters(recurse=False):
                    if value.is_floating_point() and not value.is_meta:
                        setattr(module, name, _frozen(value.to(self.compute_dtype)))


def linears_of(layer: nn.Module, layer_name: str) -> dict[str, nn.Linear]:
    """The `nn.Linear` modules of a layer by full name, in the order of the module tree."""
    return {
        f"{layer_name}.{name}": module
        for name, module in layer.named_modules()
        if type(module) is nn.Linear
    }


def capture_inputs(
    linears: dict[str, nn.Linear], visit: Callable[[str, Tensor], None]
) -> contextlib.ExitStack:
    """Call `visit(name, x)` with the input of each linear whenever it runs, until closed."""
    stack = contextlib.ExitStack()
    for name, linear in linears.items():

        def hook(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            visit(name, args[0])

        stack.callback(linear.register_forward_pre_hook(hook).remove)
    return stack


def _find_layers(model: nn.Module, origin: str) -> str:
    """Name of the module list that holds the decoder layers: the one with most parameters."""
    best, best_size = "", 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(
            isinstance(parent, nn.ModuleList) for parent in _parents(model, name)
        ):
            size = sum(p.numel() for p in module.parameters())
            if size > best_size:
                best, best_size = name, size
    if not best:
        raise ModelError(
            f"{origin}: {type(model).__name__} has no list of layers (torch.nn.ModuleList), so its "
            "layers cannot be quantized one by one"
        )
    return best


def _parents(model: nn.Module, name: str) -> Iterator[nn.Module]:
    parts = name.split(".")[:-1]
    for i in range(1, len(parts) + 1):
        yield model.get_submodule(".".join(parts[:i]))


def _load(
    folder: Path,
    skeleton: nn.Module,
    prefix: str,
    device: torch.device,
    offload_folder: Path,
    trust_remote_code: bool,
) -> Any:
    num_layers = len(skeleton.get_submodule(prefix))  # type: ignore[arg-type]
    device_map: dict[str, Any] = {f"{prefix}.{i}": "disk" for i in range(num_layers)}
    ancestors = {"", *(".".join(prefix.split(".")[:i]) for i in range(1, prefix.count(".") + 2))}
    for name in ancestors:
        for child, _ in skeleton.get_submodule(name).named_children():
            full = f"{name}.{child}" if name else child
            if full not in ancestors and name != prefix:
                device_map[full] = str(device)
        for own, _ in skeleton.get_submodule(name).named_parameters(recurse=False):
            device_map[f"{name}.{own}" if name else own] = str(device)
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            device_map=device_map,
            offload_folder=offload_folder,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except OSError as error:
        raise ModelError(
            f"{folder} cannot be loaded: {error} The weights must be safetensors files."
        ) from error


def _materialize(module: nn.Module, device: torch.device) -> None:
    """Replace a module's own offloaded tensors by real ones, and drop accelerate's hook."""
    with align_module_device(module, device):
        parameters = {n: p.detach() for n, p in module.named_parameters(recurse=False)}
        buffers = dict(module.named_buffers(recurse=False))
    remove_hook_from_module(module)
    for name, value in parameters.items():
        setattr(module, name, _frozen(value))
    for name, value in buffers.items():
        module._buffers[name] = value


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def _compute_dtype(source: torch.dtype, device: torch.device) -> torch.dtype:
    """The source dtype, except float16 on a CPU: there bfloat16 is 3 times as fast."""
    if device.type == "cpu" and source == torch.float16:
        return torch.bfloat16
    return source
