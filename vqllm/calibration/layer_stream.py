"""A causal language model, one decoder layer in memory at a time.

The Hugging Face model itself is used, with its experts in linear form: its layers are on disk, in
the original safetensors files, everything outside the layers is in memory. A layer is run by
calling the whole model: the layers before it return their input, the layer itself gets the stored
hidden states in place of its input, and the call ends there. So a layer gets exactly the masks,
positions and other arguments that its own model computes, and no architecture is named.

    model(tokens):  embeddings → 0 ─pass→ 1 ─pass→ … → i: stored states in, new states out, stop
"""

import contextlib
import gc
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqllm.checkpoint.source import SourceTensors
from vqllm.core.protocols import JSON
from vqllm.errors import ModelError
from vqllm.hf.linears import decoder_name, is_linear, shared_modules
from vqllm.hf.loading import make_buffers, skeleton


class LayerDone(Exception):
    """Ends the model's forward: raised when the wanted layer has run, or by a hook inside the
    layer that needs no more of it."""


class Layers:
    """The layers of a model, run one at a time on given states.

    Attributes:
        model: the model.
        names: full module name of each layer.
        layers: the modules.
        device: where they run.
    """

    def __init__(self, model: nn.Module, names: list[str], device: torch.device) -> None:
        self.model: Any = model
        self.names, self.device = names, device
        self.layers = [model.get_submodule(name) for name in names]
        self._returns: dict[int, _Output] = {}
        self._own_forward = {
            i: layer.__dict__.get("forward") for i, layer in enumerate(self.layers)
        }

    def __len__(self) -> int:
        return len(self.layers)

    def run(
        self,
        index: int,
        tokens: Tensor,
        states: Tensor | None,
        *,
        beyond: bool = False,
        grad: bool = False,
    ) -> Tensor | None:
        """The output of loaded layer `index` for a batch; None if a hook ended the layer early; its
        input where the model does not call it for text alone.

        Args:
            index: the layer; it must be loaded and of `compute_dtype`.
            tokens: int64 [S, L], what the model is called with.
            states: the layer's input [S, L, D], or None for the first layer (the embeddings).
            beyond: go on with what follows the layer, for a hook there that ends the call.
            grad: record what is needed for gradients in `states`.
        """
        # Two hooks on the layer: one puts the stored states in place of its input, one takes its
        # output and ends the call. Layers before it cost nothing: their forward returns its input.
        result: list[Tensor] = []
        reached = False
        layer = self.layers[index]

        def replace_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal reached
            reached = True
            if states is None:
                return None
            place = _place_of_states(args, kwargs)
            if isinstance(place, int):
                return (*args[:place], states, *args[place + 1 :]), kwargs
            return args, {**kwargs, place: states}

        def keep_output(_: nn.Module, args: Any, output: Any) -> None:
            self._returns[index] = returns = _Output.of(output, self.names[index])
            result.append(returns.states(output))
            if not beyond:
                raise LayerDone

        def end(*args: Any, **kwargs: Any) -> None:
            raise LayerDone

        for earlier in range(index):
            self.layers[earlier].forward = self._passing_on(earlier)
        for later in range(index + 1, len(self)):
            self.layers[later].forward = end  # a layer that is for other inputs is passed over
        handles = [
            layer.register_forward_pre_hook(replace_input, with_kwargs=True),
            layer.register_forward_hook(keep_output),
        ]
        try:
            with torch.set_grad_enabled(grad), contextlib.suppress(LayerDone):
                self.model(input_ids=tokens.to(self.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
            for other in range(len(self)):
                if other != index:
                    self._restore_forward(other)
        if not reached and states is not None and index + 1 < len(self):
            return states  # such as the layers that read images, where there are none
        if not reached:
            raise ModelError(f"{self.names[index]} was never called by {type(self.model).__name__}")
        return result[0] if result else None

    def run_all(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The model's logits [S, L, V] for tokens [S, L], and what its last layer gives [S, L, D].
        All layers must be loaded."""
        states: list[Tensor] = []

        def watch(index: int) -> Callable[..., None]:
            def read_output(_: nn.Module, args: Any, output: Any) -> None:
                self._returns[index] = returns = _Output.of(output, self.names[index])
                states[:] = [returns.states(output)]

            return read_output

        handles = [
            layer.register_forward_hook(watch(index)) for index, layer in enumerate(self.layers)
        ]
        try:
            logits = self.model(input_ids=tokens.to(self.device), use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return logits, states[0]

    def after(self, tokens: Tensor, states: Tensor) -> Tensor:
        """The model's logits [S, L, V] if its last layer returned `states`: only what follows the
        layers runs. No layer is loaded for it, but each must have run once, in this stream or in
        one of the same model, so that the form of its output is known.

        Args:
            tokens: int64 [S, L], what the model is called with.
            states: [S, L, D].
        """
        # Layer 0 returns the states, all others their input, which are then the same states.
        first = self._returns[0].like(states.to(self.device))
        self.layers[0].forward = lambda *args, **kwargs: first
        for index in range(1, len(self)):
            self.layers[index].forward = self._passing_on(index)
        try:
            with torch.no_grad():
                return self.model(input_ids=tokens.to(self.device), use_cache=False).logits
        finally:
            for index in range(len(self)):
                self._restore_forward(index)

    @property
    def returned(self) -> list[JSON]:
        """The forms of the outputs of all layers that have run, as JSON values."""
        return [
            {"sequence": own.sequence and own.sequence.__name__, "length": own.length}
            for _, own in sorted(self._returns.items())
        ]

    @returned.setter
    def returned(self, values: list[JSON]) -> None:
        types = {None: None, "tuple": tuple, "list": list}
        outputs = [_Output(types[own["sequence"]], own["length"]) for own in values]
        self._returns = dict(enumerate(outputs))

    def ready(self, index: int) -> contextlib.AbstractContextManager[nn.Module]:
        """Within, layer `index` can run."""
        return contextlib.nullcontext(self.layers[index])

    def _passing_on(self, index: int) -> Callable[..., Any]:
        returns = self._returns.get(index, _Output(None))

        def forward(*args: Any, **kwargs: Any) -> Any:
            place = _place_of_states(args, kwargs)
            return returns.like(args[place] if isinstance(place, int) else kwargs[place])

        return forward

    def _restore_forward(self, index: int) -> None:
        layer, own = self.layers[index], self._own_forward[index]
        layer.__dict__.pop("forward", None)
        if own is not None and hasattr(layer, "_hf_hook"):
            layer.forward = own


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
        model = self.tensors.blueprint.model.eval()
        super().__init__(model, layer_names(model), device)
        self.shared = shared_modules(model, self.names)
        self.source_dtype: torch.dtype = model.dtype
        # Everything outside the layers is cast now; a layer is cast when it is loaded.
        self.compute_dtype = compute_dtype or _compute_dtype(self.source_dtype, device)
        self._load_outside_layers()
        self._cast_outside_layers()
        if self.compute_dtype != self.source_dtype:
            self._cast_buffers(
                skeleton(folder, trust_remote_code=trust_remote_code, dtype=self.compute_dtype)
            )

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
            for module in modules.values():
                module._apply(lambda tensor: tensor.to("meta"), recurse=False)
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
                setattr(module, key, _frozen(values))
        return places.keys() - set(stored)

    @contextlib.contextmanager
    def ready(self, index: int) -> Iterator[nn.Module]:
        with self.layer(index) as layer:
            yield layer.to(self.compute_dtype)

    def _cast_outside_layers(self) -> None:
        inside = {id(module) for layer in self.layers for module in layer.modules()}
        cast: dict[nn.Parameter, nn.Parameter] = {}  # so that tied parameters stay tied
        for module in self.model.modules():
            if id(module) not in inside:
                for name, value in module.named_parameters(recurse=False):
                    if value.is_floating_point() and not value.is_meta:
                        if value not in cast:
                            cast[value] = _frozen(value.to(self.compute_dtype))
                        setattr(module, name, cast[value])

    def _cast_buffers(self, like: nn.Module) -> None:
        """Cast buffers outside the layers to the dtypes that they have in `like`, a model made in
        the compute dtype: tables of positions have it (XGLM's), inverse frequencies stay float32.
        """
        inside = {id(module) for layer in self.layers for module in layer.modules()}
        for prefix, module in self.model.named_modules():
            if id(module) not in inside:
                made = dict(like.get_submodule(prefix).named_buffers(recurse=False))
                for name, value in module.named_buffers(recurse=False):
                    if value.is_floating_point():
                        module._buffers[name] = value.to(made[name].dtype)


@dataclass(frozen=True)
class _Output:
    """What a layer returns: its states alone, or a tuple or list that begins with them."""

    sequence: type | None
    length: int = 1

    @staticmethod
    def of(output: Any, name: str) -> "_Output":
        form = _Output(None)
        if type(output) in (tuple, list):
            form = _Output(type(output), len(output))
        states = form.states(output) if form.length else None
        if not isinstance(states, Tensor) or states.dim() != 3:
            shape = f" {tuple(states.shape)}" if isinstance(states, Tensor) else ""
            raise ModelError(
                f"{name} returns {type(states).__name__}{shape}; only layers that return states of "
                "[sequences, tokens, features] can be quantized one by one"
            )
        return form

    def states(self, output: Any) -> Any:
        return output[0] if self.sequence else output

    def like(self, states: Tensor) -> Any:
        """The output of a layer with these states. All else (attention weights, caches) is None: a
        model does not use it unless a caller requests it."""
        if self.sequence is None:
            return states
        return self.sequence([states, *[None] * (self.length - 1)])


def _place_of_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
    """Which argument of a layer's call is its input: the first tensor."""
    for position, value in enumerate(args):
        if isinstance(value, Tensor):
            return position
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return "hidden_states"
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return name
    raise ModelError("a decoder layer is called without a tensor, so its input cannot be given")


def linears_of(
    layer: nn.Module, layer_name: str, shared: Collection[nn.Module] = ()
) -> dict[str, nn.Linear]:
    """The linears of a layer by full name, without those in `shared`, in the order of the module
    tree."""
    return {
        f"{layer_name}.{name}": module
        for name, module in layer.named_modules()
        if is_linear(module) and module not in shared
    }


def layer_names(model: nn.Module) -> list[str]:
    """Full names of the decoder layers: of the list of modules with most parameters in the
    model's text decoder, or in the model where it has no decoder with such a list."""
    inside = decoder_name(model)
    best = _largest_list(model, inside) or _largest_list(model, "")
    if not best:
        raise ModelError(
            f"{type(model).__name__} has no list of layers (torch.nn.ModuleList) with weights, so "
            "its layers cannot be quantized one by one"
        )
    layers: nn.ModuleList = model.get_submodule(best)  # type: ignore[assignment]
    return [f"{best}.{i}" for i in range(len(layers))]


def _largest_list(model: nn.Module, inside: str) -> str:
    """Full name of the list of modules with most parameters below a module, not itself in a list;
    "" where there is none."""
    best, best_size = "", 0
    for name, module in model.get_submodule(inside).named_modules(prefix=inside):
        if isinstance(module, nn.ModuleList) and not any(
            isinstance(parent, nn.ModuleList) for parent in _parents(model, name)
        ):
            size = sum(p.numel() for p in module.parameters())
            if size > best_size:
                best, best_size = name, size
    return best


def check_states(model: nn.Module, names: list[str]) -> None:
    """Raise ModelError if the layers return something else than states, before they are loaded.

    The first layer is run on the meta device, which computes shapes only.

    Args:
        model: on the meta device.
        names: of its layers.
    """

    def look(_: nn.Module, args: Any, output: Any) -> None:
        _Output.of(output, names[0])
        raise LayerDone

    tokens = torch.zeros(2, 4, dtype=torch.long, device="meta")
    # A complete mask: the model would read values to make one, and the meta device has none.
    mask = torch.zeros(2, 1, 4, 4, device="meta")
    handle = model.get_submodule(names[0]).register_forward_hook(look)
    try:
        with torch.no_grad():
            model(input_ids=tokens, attention_mask=mask, use_cache=False)
    except ModelError:
        raise
    except Exception:  # LayerDone, or a model that reads values: it is checked when it runs
        return
    finally:
        handle.remove()


def _parents(model: nn.Module, name: str) -> Iterator[nn.Module]:
    parts = name.split(".")[:-1]
    for i in range(1, len(parts) + 1):
        yield model.get_submodule(".".join(parts[:i]))


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def _compute_dtype(source: torch.dtype, device: torch.device) -> torch.dtype:
    """The source dtype, except float16 on a CPU: there bfloat16 is 3 times as fast."""
    if device.type == "cpu" and source == torch.float16:
        return torch.bfloat16
    return source
