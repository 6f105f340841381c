"""What a decoder layer is called with and what it returns: the states that go from layer to layer.

    hidden    the hidden states: an argument of every layer, and its output or the first part of it
    beside    what some layers get from earlier ones besides: further parts of an output that the
              model gives to the next layer (tokens that an indexer chose), and entries of a dict
              that it gives to all layers (keys and values that later layers use again)

Models have the axes of hidden states in different orders. Here the sequences always come first.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from vqllm.errors import ModelError


@dataclass(frozen=True, eq=False)
class States:
    """What goes from a layer to the next, for some sequences; their axis is the first of every
    tensor.

    Attributes:
        hidden: [S, L, D] for sequences, tokens, features. Layers with several streams have one more
            axis: [S, L, streams, D] or [S, streams, L, D], as their model has it.
        beside: what else later layers need, by a name.
    """

    hidden: Tensor
    beside: Mapping[str, Tensor] = field(default_factory=dict)

    def each(self, of: Callable[[Tensor], Tensor]) -> "States":
        """What a function makes of every tensor."""
        return States(of(self.hidden), {name: of(values) for name, values in self.beside.items()})


class Place(NamedTuple):
    """Where a tensor beside the hidden states comes from: a part of an entry of a dict that is an
    argument, or, without an argument, a part of the output."""

    argument: str | None
    key: Hashable
    part: int | None

    @property
    def name(self) -> str:
        return ".".join(str(own) for own in self if own is not None)


@dataclass(frozen=True)
class Output:
    """The form of what a layer returns: its hidden states alone, or a tuple or list that begins
    with them. `axis` is that of the sequences in them."""

    sequence: type | None = None
    length: int = 1
    axis: int = 0

    @staticmethod
    def of(output: Any, tokens_SL: Tensor, name: str) -> "Output":
        """Args:
            tokens_SL: what the model was called with.
            name: of the layer, for a message.

        Raises:
            ModelError: it does not begin with states in which the axis of the sequences is found.
        """
        kind, length = None, 1
        if type(output) in (tuple, list):
            kind, length = type(output), len(output)
        states = _first(output) if length else None
        axis = _axis_of_sequences(states, tokens_SL) if isinstance(states, Tensor) else None
        if axis is None:
            shape = f" {tuple(states.shape)}" if isinstance(states, Tensor) else ""
            raise ModelError(
                f"{name} returns {type(states).__name__}{shape} for {len(tokens_SL)} sequences of "
                f"{tokens_SL.shape[1]} tokens; only layers that return states of [sequences, "
                "tokens, features], or with one more axis for several streams, can be quantized "
                "one by one"
            )
        return Output(kind, length, axis)

    def states(self, output: Any) -> Tensor:
        """The hidden states of an output of this form, sequences first."""
        return _first(output).movedim(self.axis, 0)

    def parts(self, output: Any) -> dict[Place, Tensor]:
        """Tensors of an output of this form behind its states."""
        behind = enumerate(output[1:], 1) if self.sequence else ()
        return {Place(None, None, i): part for i, part in behind if isinstance(part, Tensor)}

    def in_model(self, hidden: Tensor) -> Tensor:
        """Hidden states with the axes as the layer has them."""
        return hidden.movedim(0, self.axis).contiguous() if self.axis else hidden

    def like(self, states: Tensor, beside: Mapping[Place, Tensor]) -> Any:
        """An output of this form with these states, whose axes are as the layer has them. All parts
        that are not given (attention weights, caches) are None: a model does not use them unless a
        caller requests it."""
        if self.sequence is None:
            return states
        rest = [beside.get(Place(None, None, part)) for part in range(1, self.length)]
        return self.sequence([states, *rest])


def _first(output: Any) -> Any:
    return output[0] if type(output) in (tuple, list) else output


def _axis_of_sequences(states: Tensor, tokens_SL: Tensor) -> int | None:
    """The axis before that of the tokens; where no two axes are of the sizes of the tokens, the
    first one: some models put tokens of their own before the given ones."""
    shape, batch = states.shape, tokens_SL.shape
    if len(shape) not in (3, 4):
        return None
    for axis in range(len(shape) - 2):
        if shape[axis : axis + 2] == batch:
            return axis
    return 0 if len(shape) == 3 and shape[0] == batch[0] else None


def place_of_states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str:
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


def entries(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Place, Tensor]:
    """All tensors in the dicts that a module is called with: entries, and parts of entries."""
    found = {}
    for argument, given in _dicts(args, kwargs):
        for key, entry in given.items():
            if isinstance(entry, Tensor):
                found[Place(argument, key, None)] = entry
            elif isinstance(entry, tuple) and all(isinstance(part, Tensor) for part in entry):
                for number, part in enumerate(entry):
                    found[Place(argument, key, number)] = part
    return found


def put_entries(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], values: Mapping[Place, Tensor]
) -> None:
    """Set what `entries` finds. Parts of an entry are given all together, in their order."""
    dicts = dict(_dicts(args, kwargs))
    parts: dict[tuple[str, Hashable], list[Tensor]] = {}
    for (argument, key, part), value in values.items():
        if argument in dicts and part is None:
            dicts[argument][key] = value
        elif argument in dicts:
            parts.setdefault((argument, key), []).append(value)
    for (argument, key), several in parts.items():
        dicts[argument][key] = tuple(several)


def _dicts(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, MutableMapping[Hashable, Any]]]:
    named = {**{str(position): value for position, value in enumerate(args)}, **kwargs}
    for argument, value in named.items():
        if isinstance(value, MutableMapping):
            yield argument, value


def handed_on(
    parts: Mapping[Place, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> frozenset[Place]:
    """Which parts of a layer's output are arguments of the next layer."""
    given = {id(value) for value in (*args, *kwargs.values())}
    return frozenset(place for place, part in parts.items() if id(part) in given)


def of_sequences(values: Mapping[Place, Tensor], num_sequences: int) -> dict[Place, Tensor]:
    """Those whose first axis is that of the sequences; the others are the same for all."""
    return {
        place: value
        for place, value in values.items()
        if value.dim() and value.shape[0] == num_sequences
    }


def changed(before: Mapping[Place, Tensor], after: Mapping[Place, Tensor]) -> dict[Place, Tensor]:
    """Entries that were not there before, or were other tensors."""
    return {place: value for place, value in after.items() if before.get(place) is not value}
