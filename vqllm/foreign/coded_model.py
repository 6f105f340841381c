"""What the tensors of a foreign checkpoint's files mean: the dense weights of its coded modules,
and all others as they are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqllm.errors import ModelError
from vqllm.foreign.base import ForeignFormat, Header, Packed, Part, Shape, Stored
from vqllm.foreign.registry import format_of

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class CodedModule:
    """A linear whose weight is stored as codes.

    Attributes:
        stored: the tensors; those of linears that are stored as one are the same.
        whole: the weight that they make.
        part: the rows of it that are this linear's.
    """

    format: ForeignFormat
    stored: Stored
    whole: Shape
    part: Part

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def shape(self) -> Shape:
        """Of its weight."""
        return replace(self.whole, rows=self.part.stop - self.part.start)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """Its dense weight [rows, cols]."""
        return self.format.decode(self.stored, self.whole, self.part, dtype)

    def describe(self) -> str:
        """Its codes in a few words."""
        return self.format.describe(self.stored, self.whole)

    def pack(self) -> Packed:
        """The same weight in our own format; raises CannotHoldError where it has none."""
        return self.format.pack(self.stored, self.whole)


@dataclass(frozen=True)
class CodedModel:
    """A folder of another tool.

    Attributes:
        modules: the coded linears by their names, which are those in the files unless several are
            stored as one.
        dtype: in which its weights are decoded: that of the model.
        taken: names of the stored tensors that are codes.
    """

    format: ForeignFormat
    modules: Mapping[str, CodedModule]
    dtype: torch.dtype
    taken: frozenset[str]


def coded_model(
    folder: Path,
    config: Mapping[str, Any],
    headers: Mapping[str, Header],
    read: Callable[[str], Tensor],
) -> CodedModel | None:
    """The coded modules of a folder, with all their tensors checked; None for an ordinary model.

    Args:
        config: of its config.json.
        headers: of all tensors in its files, by name.
        read: gives a stored tensor by its name.

    Raises:
        ModelError: an option is not known; a tensor is missing or misshapen; there are no codes.
    """
    format = format_of(config, f"{folder / 'config.json'}")
    if format is None:
        return None
    found: dict[str, dict[str, Header]] = {}
    for key, header in headers.items():
        module, _, name = key.rpartition(".")
        for own in format.names:
            # A name may have a dot of its own: `centroids.weight`.
            if key.endswith(f".{own}"):
                module, name = key.removesuffix(f".{own}"), own
        if name in format.names:
            found.setdefault(module, {})[name] = header
    modules: dict[str, CodedModule] = {}
    taken: set[str] = set()
    for name, own in found.items():
        if format.marker in own:
            stored = Stored(folder, name, own, partial(_read, read, name))
            whole = format.shape(stored)
            for part in format.parts(stored, whole):
                modules[part.name] = CodedModule(format, stored, whole, part)
            taken |= {f"{name}.{key}" for key in own}
        elif format.incomplete(own):
            Stored(folder, name, own, read).need(format.marker)
    if not modules:
        raise ModelError(
            f"{folder}: config.json says {format.method!r}, but no module has a tensor "
            f"{format.marker!r}. Put back the config.json that was written with these weights."
        )
    return CodedModel(format, modules, _dtype(config), frozenset(taken))


def _read(read: Callable[[str], Tensor], module: str, name: str) -> Tensor:
    return read(f"{module}.{name}")


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    text = config.get("text_config")
    for values in (config, text if isinstance(text, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            if values.get(key) in DTYPES:
                return DTYPES[values[key]]
    return torch.float16
