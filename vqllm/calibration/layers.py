"""The layers of a causal language model, run one at a time.

A layer is run by calling the whole model: the layers before it return their input, the layer itself
gets the stored states in place of its input, and the call ends there. So a layer gets exactly the
masks, positions and other arguments that its own model computes, and no architecture is named.

    model(tokens):  embeddings → 0 ─pass→ 1 ─pass→ … → i: stored states in, new states out, stop
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vqllm.calibration.layer_calls import (
    Output,
    Place,
    States,
    changed,
    entries,
    handed_on,
    of_sequences,
    place_of_states,
    put_entries,
)
from vqllm.core.protocols import JSON
from vqllm.errors import ModelError
from vqllm.hf.running import explained_run

DTYPES_DIFFER = ("same dtype", "scalar type", "should be the same")
"""In torch's messages about operands of different dtypes."""


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
        self._returns: dict[int, Output] = {}
        self._handed_on: dict[int, frozenset[Place]] = {}
        """parts of an output, beside the states, that the model gives to the next layer"""
        self._places: dict[str, Place] = {}
        """of what layers need beside the states, by its name"""
        self._own_forward = {
            i: layer.__dict__.get("forward") for i, layer in enumerate(self.layers)
        }

    def __len__(self) -> int:
        return len(self.layers)

    def run(
        self,
        index: int,
        tokens: Tensor,
        states: States | None,
        *,
        beyond: bool = False,
        grad: bool = False,
    ) -> States | None:
        """The output of loaded layer `index` for a batch; None if a hook ended the layer early; its
        input where the model does not call it for text alone.

        Args:
            index: the layer; it must be loaded and of `compute_dtype`.
            tokens: int64 [S, L], what the model is called with.
            states: the layer's input, or None for the first layer (the embeddings).
            beyond: go on with what follows the layer, for a hook there that ends the call.
            grad: record what is needed for gradients in `states`.
        """
        # Two hooks on the layer: one puts the stored states in place of its input, one takes its
        # output and ends the call. Layers before it cost nothing: their forward returns its input.
        layer, beside = self.layers[index], self._placed(states)
        visit = _Visit(beside)

        def replace_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            visit.begin(args, kwargs)
            if states is None:
                return None
            place = place_of_states(args, kwargs)
            hidden = self._returns.get(index - 1, Output()).in_model(states.hidden)
            if isinstance(place, int):
                return (*args[:place], hidden, *args[place + 1 :]), kwargs
            return args, {**kwargs, place: hidden}

        def keep_output(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            self._returns[index] = returns = Output.of(output, tokens, self.names[index])
            visit.end(returns, output, args, kwargs)
            # What the next layer is called with shows which parts of the output it gets.
            is_known = index in self._handed_on or not visit.parts or index + 1 == len(self)
            if is_known and not beyond:
                raise LayerDone
            if not is_known:
                visit.protect()

        def end(*args: Any, **kwargs: Any) -> None:
            # Called for the next layer, or for one that is for other inputs and is passed over.
            if visit.parts:
                self._handed_on[index] = handed_on(visit.parts, args, kwargs)
            raise LayerDone

        for earlier in range(index):
            self.layers[earlier].forward = self._passing_on(earlier, beside)
        for later in range(index + 1, len(self)):
            self.layers[later].forward = end
        handles = [
            layer.register_forward_pre_hook(replace_input, with_kwargs=True),
            layer.register_forward_hook(keep_output, with_kwargs=True),
        ]
        try:
            with (
                torch.set_grad_enabled(grad),
                explained_run(self.model),
                self._explained(),
                contextlib.suppress(LayerDone),
            ):
                self.model(input_ids=tokens.to(self.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
            for other in range(len(self)):
                if other != index:
                    self._restore_forward(other)
        if not visit.reached and states is not None and index + 1 < len(self):
            return states  # such as the layers that read images, where there are none
        if not visit.reached:
            raise ModelError(f"{self.names[index]} was never called by {type(self.model).__name__}")
        if visit.hidden is None:
            return None
        if visit.parts:  # where no later layer was called
            self._handed_on.setdefault(index, frozenset())
        kept = visit.beside(self._handed_on.get(index, frozenset()), len(tokens))
        self._places |= {place.name: place for place in kept}
        return States(visit.hidden, {place.name: value for place, value in kept.items()})

    def run_all(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The model's logits [S, L, V] for tokens [S, L], and the hidden states that its last layer
        gives, [S, ..]. All layers must be loaded."""
        states: list[Tensor] = []

        def watch(index: int) -> Callable[..., None]:
            def read_output(_: nn.Module, args: Any, output: Any) -> None:
                self._returns[index] = returns = Output.of(output, tokens, self.names[index])
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
            states: its hidden states, [S, ..].
        """
        # Layer 0 returns the states, all others their input, which are then the same states.
        form = self._returns[0]
        first = form.like(form.in_model(states.to(self.device)), {})
        self.layers[0].forward = lambda *args, **kwargs: first
        for index in range(1, len(self)):
            self.layers[index].forward = self._passing_on(index, {})
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
            {
                "sequence": own.sequence and own.sequence.__name__,
                "length": own.length,
                "axis": own.axis,
            }
            for _, own in sorted(self._returns.items())
        ]

    @returned.setter
    def returned(self, values: list[JSON]) -> None:
        types = {None: None, "tuple": tuple, "list": list}
        outputs = [Output(types[own["sequence"]], own["length"], own["axis"]) for own in values]
        self._returns = dict(enumerate(outputs))

    def ready(self, index: int) -> contextlib.AbstractContextManager[nn.Module]:
        """Within, layer `index` can run."""
        return contextlib.nullcontext(self.layers[index])

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Within, ModelError where transformers' code mixes dtypes."""
        try:
            yield
        except RuntimeError as error:
            dtype, reason = self.model.dtype, str(error).partition("\n")[0]
            if dtype == torch.float32 or not any(word in reason for word in DTYPES_DIFFER):
                raise
            raise ModelError(
                f"{type(self.model).__name__} does not run in {dtype}: transformers' code for it "
                f"stops with {reason!r}. Run with --compute-dtype float32."
            ) from error

    def _placed(self, states: States | None) -> dict[Place, Tensor]:
        """What is beside the states, by where it comes from."""
        beside = {} if states is None else states.beside
        return {self._places[name]: value for name, value in beside.items()}

    def _passing_on(self, index: int, beside: Mapping[Place, Tensor]) -> Callable[..., Any]:
        returns = self._returns.get(index, Output())

        def forward(*args: Any, **kwargs: Any) -> Any:
            place = place_of_states(args, kwargs)
            return returns.like(args[place] if isinstance(place, int) else kwargs[place], beside)

        return forward

    def _restore_forward(self, index: int) -> None:
        layer, own = self.layers[index], self._own_forward[index]
        layer.__dict__.pop("forward", None)
        if own is not None and hasattr(layer, "_hf_hook"):
            layer.forward = own


class _Visit:
    """One call of a layer: what it is given beside its states, and what it gives.

    Attributes:
        reached: whether the model called the layer.
        hidden: its hidden states afterwards, sequences first; None if it was ended early.
        parts: tensors of its output behind the states.
    """

    def __init__(self, given: Mapping[Place, Tensor]) -> None:
        self.reached = False
        self.hidden: Tensor | None = None
        self.parts: dict[Place, Tensor] = {}
        self._given = given
        self._before: dict[Place, Tensor] = {}
        self._after: dict[Place, Tensor] = {}

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The layer is called."""
        self.reached = True
        put_entries(args, kwargs, self._given)
        self._before = entries(args, kwargs)

    def end(
        self, form: Output, output: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """The layer has returned an output of this form."""
        self.hidden, self.parts = form.states(output), form.parts(output)
        self._after = entries(args, kwargs)

    def protect(self) -> None:
        """The model goes on to the next layer, and may write into the states on its way."""
        assert self.hidden is not None, "the layer has returned"
        self.hidden = self.hidden.clone()

    def beside(self, handed_on: Collection[Place], num_sequences: int) -> dict[Place, Tensor]:
        """What later layers need: the entries given before and those that this layer has set, and
        these parts of its output."""
        given = {place: value for place, value in self._given.items() if place.argument is not None}
        new = changed(self._before, self._after)
        new |= {place: part for place, part in self.parts.items() if place in handed_on}
        return given | of_sequences(new, num_sequences)


def check_states(model: nn.Module, names: list[str]) -> None:
    """Raise ModelError if the layers return something else than states, before they are loaded.

    The first layer is run on the meta device, which computes shapes only.

    Args:
        model: on the meta device.
        names: of its layers.
    """

    tokens = torch.zeros(2, 4, dtype=torch.long, device="meta")

    def look(_: nn.Module, args: Any, output: Any) -> None:
        Output.of(output, tokens, names[0])
        raise LayerDone

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
