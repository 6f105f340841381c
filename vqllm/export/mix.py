"""Types mixed per tensor: within the size of the file, each tensor gets the type that pays most.

losses of each tensor in each type (`type_losses.py`)       ─┐
bytes that each type takes                                   ─┴► the choice (`allocation/budget.py`)
"""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from vqllm.allocation import Item, allocate
from vqllm.core.file_size import parse_bytes
from vqllm.errors import RecipeError
from vqllm.export.native_types import NativeType, type_for, type_of
from vqllm.export.writing import ENDS, head_bytes, outside_types

logger = logging.getLogger(__name__)

DEFAULT = "default"
DEFAULT_TYPES = (
    "Q2_K",
    "Q3_K",
    "IQ4_XS",
    "IQ4_NL",
    "Q4_K",
    "Q4_1",
    "Q5_K",
    "Q5_0",
    "Q5_1",
    "Q6_K",
    "Q8_0",
)
"""What `DEFAULT` means. Q4_0 is not among them: IQ4_NL is as large, and its errors are less."""
WITHIN = 0.99
"""Share of the size that is asked for, below which it counts as not met."""
ALIGNMENT = 32
"""Tensors of a GGUF file begin at multiples of this many bytes."""
HOW = (
    "Allowed are --type T (all linears in one type), --size 80MB (types mixed within the size of "
    "the whole file), and --type T --mix default (types mixed, the size of plain T); --mix "
    "Q3_K,Q4_K,... says which types are mixed."
)

PLACEHOLDER = "Q8_0"
"""For the name of a file whose size is computed: it is a number, and takes as much for all."""


@dataclass(frozen=True)
class Mix:
    """What the user asked for."""

    types: tuple[NativeType, ...]
    """that may be mixed"""
    num_bytes: int | None
    """of the whole file; None: as much as with `plain` alone"""
    plain: NativeType | None = None

    def main(
        self, types: Mapping[str, NativeType], shapes: Mapping[str, tuple[int, int]]
    ) -> NativeType:
        """The type that the file is named after: that whose size is asked for, or the one of the
        most weights of linears, by their types and shapes."""
        if self.plain is not None:
            return self.plain
        numels: dict[NativeType, int] = {}
        for name, native in types.items():
            numels[native] = numels.get(native, 0) + shapes[name][0] * shapes[name][1]
        return max(numels, key=lambda native: numels[native])


def mix_of(
    plain: str | None, mix: str | Iterable[str] | None, size: str | int | None
) -> Mix | NativeType:
    """What `--type`, `--mix` and `--size` ask for: one type for all linears, or a mix.

    Raises:
        RecipeError: an unknown type, no type, no size, or options that do not go together.
    """
    main = None if plain is None else type_of(plain)
    if size is not None and main is not None:
        raise RecipeError(f"--type {main.name} and --size {size} both say how large. {HOW}")
    if mix is None and main is not None:
        return main
    if size is None and main is None:
        came = "nothing of it" if mix is None else "--mix alone"
        raise RecipeError(f"{came} says how large the file is to be. {HOW}")
    types = _types(DEFAULT if mix is None else mix)
    if main is not None:
        return Mix(tuple(dict.fromkeys((*types, main))), None, main)
    num_bytes = size if isinstance(size, int) else parse_bytes(str(size))
    if num_bytes is None or num_bytes <= 0:
        raise RecipeError(
            f"--size {size} is no size of a file: allowed is a number above 0, alone or with a "
            "unit of B, KB, MB, GB, KiB, MiB or GiB, such as 80MB."
        )
    return Mix(types, num_bytes)


def _types(mix: str | Iterable[str]) -> tuple[NativeType, ...]:
    names = mix.split(",") if isinstance(mix, str) else [*mix]
    names = [name.strip() for name in names if name.strip()]
    if [name.lower() for name in names] == [DEFAULT]:
        names = [*DEFAULT_TYPES]
    if not names:
        raise RecipeError(f"--mix {mix!r} names no type. {HOW}")
    return tuple(dict.fromkeys(type_of(name) for name in names))


def options(types: Iterable[NativeType], cols: int) -> tuple[NativeType, ...]:
    """The types for rows of `cols` weights, each once: those of the mix, or what is taken in their
    place where 256 does not divide `cols`."""
    found = (type_for(native, cols) for native in types)
    return tuple(dict.fromkeys(native for native in found if native is not None))


def num_bytes(tensor: Any, native: NativeType | None) -> int:
    """What a tensor of a file takes in a type (None: in its own), with what is filled up behind."""
    if native is None:
        return padded(int(tensor.n_bytes))
    return padded(int(tensor.n_elements) // native.block * native.num_bytes)


def padded(size: int) -> int:
    """`size` and the bytes up to where the next tensor begins."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Offer:
    """The types that tensors may get, and what they take; all by the names of the tensors."""

    types: dict[str, tuple[NativeType, ...]]
    costs: dict[str, tuple[int, ...]]
    """bytes in each of the types"""
    fixed: int
    """bytes of everything else in the file"""
    size: int
    """bytes that the file may take"""

    @classmethod
    def of(cls, mix: Mix, reader: Any, chosen: Collection[str], scratch: Path) -> "Offer":
        """Args:
            mix: what is asked for.
            reader: a `gguf.GGUFReader` of the source.
            chosen: tensors whose types are chosen.
            scratch: a folder.

        Raises:
            RecipeError: no choice gives the size that is asked for; says the least and the most.
        """
        head = padded(head_bytes(reader, PLACEHOLDER, scratch / "head.gguf"))
        ends = outside_types(reader)
        types, costs, rest = {}, {}, []
        for tensor in reader.tensors:
            offered = options(mix.types, int(tensor.shape[0])) if tensor.name in chosen else ()
            if offered:
                types[tensor.name] = offered
                costs[tensor.name] = tuple(num_bytes(tensor, native) for native in offered)
            else:
                rest.append(tensor)
        size = mix.num_bytes
        if mix.plain is not None:
            all_of_it = {
                own.name: type_for(mix.plain, int(own.shape[0]))
                for own in reader.tensors
                if own.name in chosen and own.name not in ENDS
            }
            size = head + sum(num_bytes(t, (all_of_it | ends).get(t.name)) for t in reader.tensors)
        assert size is not None, "one of them is asked for"
        fixed = head + sum(num_bytes(tensor, ends.get(tensor.name)) for tensor in rest)
        offer = cls(types, costs, fixed, size)
        offer.check(mix)
        return offer

    def check(self, mix: Mix) -> None:
        """RecipeError where no choice gives the size; says the least and the most."""
        least, most = (
            self.fixed + sum(end(costs) for costs in self.costs.values()) for end in (min, max)
        )
        if not least <= self.size <= most / WITHIN:
            names = ", ".join(native.name for native in mix.types)
            raise RecipeError(
                f"{self.size} bytes cannot be met: with {names} the file takes from {least} to "
                f"{most} bytes. Ask for a size between, or name other types with --mix."
            )

    def choose(self, losses: Mapping[str, Sequence[float]]) -> dict[str, NativeType]:
        """The type of each tensor: least expected loss within the size.

        Args:
            losses: nats a token that each tensor costs in each of its types.
        """
        items = [Item(self.costs[name], tuple(losses[name])) for name in self.types]
        picks = min(self._tried(items), key=lambda picks: _expected(items, picks))
        spent = self.fixed + sum(item.costs[pick] for item, pick in zip(items, picks))
        expected = _expected(items, picks)
        logger.info("types for a file of %d bytes; expected KL divergence %.3g", spent, expected)
        if spent < WITHIN * self.size:
            logger.warning("no type that lowers the loss fits the rest of %d bytes", self.size)
        return {name: types[pick] for (name, types), pick in zip(self.types.items(), picks)}

    def _tried(self, items: Sequence[Item]) -> Iterator[list[int]]:
        """Choices for every item that fit. The embedding and the head are tried in each of their
        types: a step of theirs is so large that it may fit only in place of many others."""
        ends = [place for place, name in enumerate(self.types) if name in ENDS]
        for own in product(*(range(len(items[place].costs)) for place in ends)):
            tried = [*items]
            for place, pick in zip(ends, own):
                tried[place] = Item((items[place].costs[pick],), (items[place].losses[pick],))
            if self.fixed + sum(min(item.costs) for item in tried) <= self.size:
                picks = allocate(tried, self.size - self.fixed)
                for place, pick in zip(ends, own):
                    picks[place] = pick
                yield picks


def _expected(items: Sequence[Item], picks: Sequence[int]) -> float:
    return sum(item.losses[pick] for item, pick in zip(items, picks))
