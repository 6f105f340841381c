"""What a format of another tool is, and its modules as the headers of the files describe them.

Decoding goes by blocks of rows, so that no more than one block is in memory in wider numbers than
the stored codes and the result have.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Protocol, Self

import torch
from torch import Tensor

from vqllm.core.listing import listed
from vqllm.errors import ModelError
from vqllm_kernels.linear import LinearSpec

BLOCK_WEIGHTS = 1 << 22
"""Weights that are decoded at a time: 32 MB where they are int64 at work."""
DAMAGED = "Get an undamaged copy."
FLOATS = ("F16", "BF16", "F32")
"""What scales are stored as, by safetensors' names."""

Rows = Callable[[int, int], Tensor]
"""Gives rows `start` to `stop` of a weight, float32 [stop - start, cols]."""
Packed = tuple[LinearSpec, Callable[[], dict[str, Tensor]]]
"""A linear of ours, and what makes its stored tensors."""


class Header(Protocol):
    """A stored tensor as the header of its file describes it."""

    @property
    def dtype(self) -> str: ...  # safetensors' name of it
    @property
    def shape(self) -> tuple[int, ...]: ...


class CannotHoldError(Exception):
    """Why our format cannot hold a module without loss."""


@dataclass(frozen=True)
class Stored:
    """The stored tensors of one module.

    `headers` has them by the end of their name: `qweight` of `model.layers.0.mlp.up_proj.qweight`.
    """

    folder: Path
    name: str
    headers: Mapping[str, Header]
    read: Callable[[str], Tensor]
    """gives one by the end of its name"""

    def need(self, *names: str) -> None:
        """Raise ModelError unless the module has all these tensors."""
        missing = [name for name in names if name not in self.headers]
        if missing:
            raise ModelError(
                f"{self.folder}: {self.name} has {listed(self.headers)}, but no {listed(missing)}. "
                f"{DAMAGED}"
            )

    def shape(self, name: str, num_axes: int) -> tuple[int, ...]:
        """The shape of a tensor that must have so many axes, none of them empty."""
        self.need(name)
        shape = self.headers[name].shape
        if len(shape) != num_axes or not all(shape):
            wanted = f"one of {num_axes} axes" if num_axes != 1 else "a vector"
            self.refuse(name, f"{wanted}, none of them empty")
        return shape

    def expect(self, name: str, dtypes: Sequence[str], shape: tuple[int, ...], why: str) -> None:
        """Raise ModelError unless a tensor has one of these dtypes and this shape.

        Args:
            why: what asks for the shape, such as "256 columns of 4 bits".
        """
        self.need(name)
        header = self.headers[name]
        if header.dtype not in dtypes or tuple(header.shape) != shape:
            self.refuse(name, f"{' or '.join(dtypes)} {shape} for {why}")

    def refuse(self, name: str, wanted: str) -> NoReturn:
        """Raise ModelError for a tensor that is not as it should be."""
        header = self.headers[name]
        raise ModelError(
            f"{self.folder}: {self.name}.{name} is {header.dtype} {tuple(header.shape)}, expected "
            f"{wanted}. {DAMAGED}"
        )

    def wrong(self, problem: str) -> ModelError:
        """An error about the values of the module."""
        return ModelError(f"{self.folder}: {self.name}: {problem}. {DAMAGED}")


@dataclass(frozen=True)
class Shape:
    """The weight of a module: `rows` x `cols`, decoded in blocks of a multiple of `unit` rows."""

    rows: int
    cols: int
    unit: int = 1


@dataclass(frozen=True)
class Part:
    """The linear whose weight is rows `start` to `stop` of what a module stores."""

    name: str
    start: int
    stop: int


class ForeignFormat(ABC):
    """The format of one checkpoint, with the options that its configuration gives."""

    method: ClassVar[str]
    """`quant_method` in config.json, or what stands for it"""
    marker: ClassVar[str]
    """the tensor that every coded module has, and nothing else"""
    names: ClassVar[frozenset[str]]
    """all tensors that a coded module may have in the place of its weight"""
    codes: ClassVar[frozenset[str]]
    """those of them that are codes"""
    tables: ClassVar[frozenset[str]] = frozenset()
    """those that are codebooks; the others are scales and the like"""

    @classmethod
    @abstractmethod
    def from_config(cls, values: Mapping[str, Any], where: str) -> Self:
        """Read `quantization_config`. ModelError for an option or value that is not known."""

    def of_model(self, config: Mapping[str, Any]) -> Self:
        """The same format, for a model with this config.json."""
        return self

    @abstractmethod
    def shape(self, module: Stored) -> Shape:
        """The size of a module's weight. ModelError where a tensor is missing or misshapen."""

    @abstractmethod
    def rows(self, module: Stored, shape: Shape) -> Rows:
        """A decoder of its weight. ModelError where a stored value is none of the format."""

    def parts(self, module: Stored, shape: Shape) -> tuple[Part, ...]:
        """The linears that a module is: itself, unless several are stored as one."""
        return (Part(module.name, 0, shape.rows),)

    def incomplete(self, names: Collection[str]) -> bool:
        """Whether a module with these of the format's tensors, but not its marker, is damaged.
        Other modules may have some of such names too."""
        return len(names) > 1

    @abstractmethod
    def describe(self, module: Stored, shape: Shape) -> str:
        """The codes in a few words: "4 bits, groups of 128"."""

    def pack(self, module: Stored, shape: Shape) -> Packed:
        """The same weight in our own format, without loss. Reads no codes.

        Raises:
            CannotHoldError: it has no place for something; says for what.
        """
        raise CannotHoldError(f"no format of ours holds what {self.method} stores")

    def decode(self, module: Stored, shape: Shape, part: Part, dtype: torch.dtype) -> Tensor:
        """The dense weight of a part of a module, decoded in float32 and rounded once."""
        rows = self.rows(module, shape)
        weight = torch.empty(part.stop - part.start, shape.cols, dtype=dtype)
        step = max(BLOCK_WEIGHTS // shape.cols // shape.unit, 1) * shape.unit
        for start in range(part.start, part.stop, step):
            stop = min(start + step, part.stop)
            weight[start - part.start : stop - part.start] = rows(start, stop)
        return weight


class Options:
    """The keys of a `quantization_config`, which are taken one by one.

    What is left at the end is an option that nobody knows: weights decoded without it would be
    wrong without a word.
    """

    def __init__(self, method: str, values: Mapping[str, Any], where: str) -> None:
        self._method, self._where = method, where
        self._rest = {key: value for key, value in values.items() if key != "quant_method"}

    def number(self, key: str, allowed: Sequence[int], default: int | None = None) -> int:
        """One of these numbers. ModelError for another, or none without a default."""
        value = self._rest.pop(key, default)
        if type(value) is not int or value not in allowed:
            self.refuse(key, value, _numbers(allowed))
        return value

    def group(self, key: str, default: int) -> int | None:
        """Columns of a group. ModelError unless it is a number of them, or -1: None, for all."""
        value = self._rest.pop(key, default)
        if type(value) is not int or (value < 1 and value != -1):
            self.refuse(key, value, "-1 (all inputs of an output) or a number of inputs")
        return None if value == -1 else value

    def choice(self, key: str, allowed: Sequence[Any], default: Any) -> Any:
        """One of these values; names in any case."""
        value = self._rest.pop(key, default)
        value = value.lower() if isinstance(value, str) else value
        if not any(type(value) is type(one) and value == one for one in allowed):
            self.refuse(key, value, ", ".join(map(repr, allowed)))
        return value

    def take(self, key: str, default: Any = None) -> Any:
        """Any value, which the caller looks at."""
        return self._rest.pop(key, default)

    def ignore(self, *keys: str) -> None:
        """Keys that say nothing about the stored weights."""
        for key in keys:
            self._rest.pop(key, None)

    def end(self) -> None:
        """Raise ModelError if an option is left that is set to something."""
        left = {key: value for key, value in self._rest.items() if value}
        if left:
            key, value = next(iter(left.items()))
            raise ModelError(
                f"{self._where} has {key}: {str(value)[:100]!r}, an option of {self._method} that "
                "is not known here, so its weights might be decoded wrongly. Pass the original "
                "model, or one that was written without this option."
            )

    def refuse(self, key: str, value: object, allowed: str) -> NoReturn:
        """Raise ModelError for a value of an option."""
        raise ModelError(
            f"{self._where}: {key} is {str(value)[:100]!r}; of {self._method} can be read: "
            f"{allowed}. Pass the original model, or one that was written so."
        )


def _numbers(allowed: Sequence[int]) -> str:
    if isinstance(allowed, range):
        return f"{allowed[0]}..{allowed[-1]}"
    return ", ".join(map(str, allowed))


def exact_half(name: str, values: Tensor) -> Tensor:
    """The same numbers in float16. CannotHoldError where one has no equal there."""
    half = values.half()
    if not torch.equal(half.double(), values.double()):
        raise CannotHoldError(
            f"a value of {name} is {values.dtype} and has no equal in float16, in which our "
            "tables are stored"
        )
    return half
