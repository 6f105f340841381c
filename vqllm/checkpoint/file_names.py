"""The names that tensors of a quantized checkpoint have in its files.

They are such that transformers' own rules for the model's checkpoints bring each packed tensor to
its module, in whatever class the folder is loaded: where the source stores
`backbone.layers.0.q.weight` for `model.layers.0.q.weight`, the codes of that linear are
`backbone.layers.0.q.codes`.
"""

from collections.abc import Iterable

from vqllm.core.listing import listed
from vqllm.errors import ModelError
from vqllm.hf.blueprint import Blueprint
from vqllm_kernels.linear import LinearSpec


class FileNames:
    """Names in the files by names in the model.

    Attributes:
        differ: whether a reader must know more than the names in the files: a quantized linear is
            a part of a tensor of transformers' own model, or has another name in the files.
    """

    def __init__(self, blueprint: Blueprint, quantized: Iterable[str]) -> None:
        """Args:
        quantized: full names of all modules that will be quantized.

        Raises:
            ModelError: with experts apart, another tensor would not be read any more.
        """
        self._blueprint = blueprint
        parts = blueprint.parts
        self._quantized = frozenset(quantized)
        # Experts are in linear form all together, or none: it is one rule of transformers that
        # merges those of all layers.
        self._experts_apart = any(self._is_expert(f"{name}.weight") for name in self._quantized)
        self._gone: frozenset[str] = frozenset()
        if self._experts_apart:
            self._gone = frozenset(p.tensor for name, p in parts.items() if self._is_expert(name))
        if lost := blueprint.conversions.lost_without(self._gone):
            raise ModelError(
                f"transformers makes {listed(lost)} and the experts of this model by one rule, so "
                "that experts cannot be quantized: leave them as they are with a pattern in `skip`."
            )
        self.differ = any(
            f"{name}.weight" in parts or self.of(f"{name}.weight") != f"{name}.weight"
            for name in self._quantized
        )

    def of(self, name: str) -> str:
        """The name in the files of a tensor by its full name in the model."""
        origin = self._blueprint.conversions.origins.get(name)
        if origin is not None and not origin.patterns:
            return origin.keys[0]
        return self._in_files(name)

    def prefix(self, module: str, spec: LinearSpec) -> str:
        """What stands before the names of a quantized module's own tensors."""
        return self._blueprint.conversions.prefix_in_files(module, tuple(spec.layout()))

    def module(self, name: str) -> str:
        """A module's name in the files, for one that has no tensors there but its bias."""
        return self._blueprint.conversions.prefix_in_files(name, ("weight",))

    def check(self) -> None:
        """Raise ModelError if a tensor that is taken apart has no name in the files."""
        for name in self._blueprint.parts:
            module = name.rpartition(".")[0]
            if self.is_apart(name) and module not in self._quantized:
                self.of(name)

    def is_apart(self, name: str) -> bool:
        """Whether a tensor of the source is taken apart although it is not quantized."""
        return self._experts_apart and self._is_expert(name)

    def is_whole(self, name: str) -> bool:
        """Whether a part stays in the tensor of transformers' own model that holds it."""
        return name in self._blueprint.parts and not self.is_apart(name)

    def is_alone(self, name: str) -> bool:
        """Whether a tensor can be changed without changing what others are made of."""
        origin = self._blueprint.conversions.origins[self._blueprint.origin(name)]
        if name in self._blueprint.parts:
            return self.is_apart(name)
        return not origin.patterns

    def _is_expert(self, name: str) -> bool:
        part = self._blueprint.parts.get(name)
        return part is not None and (part.expert is not None or part.rows is not None)

    def _in_files(self, name: str) -> str:
        own = name.rpartition(".")[0] in self._quantized or self.is_apart(name)
        return self._blueprint.conversions.name_in_files(name, self._gone, own=own)
