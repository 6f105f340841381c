"""Which quantized modules a module of vLLM is made of."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vqllm.checkpoint.format import CONFIG, QuantizationConfig
from vqllm_kernels.linear import LinearSpec

Rename = Callable[[str], str | None]


@dataclass
class Modules:
    """The quantized modules of a checkpoint, under the names that vLLM has for them."""

    specs: dict[str, LinearSpec]
    tied: dict[str, str] = field(default_factory=dict)
    """head -> embedding"""
    outside: tuple[str, ...] = ()
    """those of `specs` that are not in the decoder layers"""
    asked: set[str] = field(default_factory=set)
    """those of `specs` that a module of vLLM is made of"""

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "Modules":
        """From `quantization_config`. CheckpointError for a newer format or damaged contents."""
        config = QuantizationConfig.parse(dict(values), CONFIG)
        return cls(config.linears(), dict(config.tied), tuple(config.outside_layers))

    def rename(self, rename: Rename) -> None:
        """Take the names that vLLM gives to modules of the files.

        vLLM's rules are for names of tensors, and some of them want the dot behind the module.
        """

        def new(name: str) -> str:
            return (rename(f"{name}.") or f"{name}.").removesuffix(".")

        self.specs = {new(name): spec for name, spec in self.specs.items()}
        self.tied = {new(head): new(source) for head, source in self.tied.items()}
        self.outside = tuple(map(new, self.outside))

    def parts(self, prefix: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
        """The names of the linears that vLLM's linear is made of, in the order of its rows.

        Args:
            packed: vLLM's table: last part of a fused name -> those of its parts.
        """
        if prefix in self.specs:  # stored as one, though vLLM knows parts of that name
            return [prefix]
        before, _, last = prefix.rpartition(".")
        own = packed.get(last) or [last]
        return [f"{before}.{part}" if before else part for part in own]

    def quantized(self, names: Collection[str]) -> list[LinearSpec | None]:
        """The specifications of linears that one module is made of, None for dense ones."""
        self.asked.update(name for name in names if name in self.specs)
        return [self.specs.get(name) for name in names]

    def head(self, prefix: str) -> str | None:
        """The quantized matrix of the output head, which may be the embedding's."""
        name = self.tied.get(prefix, prefix)
        return self._asked(name)

    def embedding(self, prefix: str, rows: int, cols: int) -> str | None:
        """The quantized matrix of an embedding of that size, if it has one.

        Some models of vLLM give no name to their embedding: then it is the only one outside of the
        decoder layers that is none of a head.
        """
        if prefix:
            return self._asked(prefix)
        found = [
            name
            for name in self.outside
            if is_embedding(name) and (self.specs[name].rows, self.specs[name].cols) == (rows, cols)
        ]
        return self._asked(found[0]) if len(found) == 1 else None

    def experts(self, prefix: str) -> dict[str, LinearSpec]:
        """The quantized linears of a group of experts by the rest of their names ("0.up_proj")."""
        start = f"{prefix}."
        own = {name: spec for name, spec in self.specs.items() if name.startswith(start)}
        self.asked.update(own)
        return {name.removeprefix(start): spec for name, spec in own.items()}

    def not_asked(self) -> set[str]:
        """Quantized modules that no module of vLLM is made of so far."""
        return set(self.specs) - self.asked

    def _asked(self, name: str) -> str | None:
        if name not in self.specs:
            return None
        self.asked.add(name)
        return name


def is_embedding(name: str) -> bool:
    """Whether a module outside of the layers is the input embedding, by its name."""
    last = name.rpartition(".")[2]
    return ("emb" in last or last in ("wte", "word_embeddings")) and last != "embed_out"
