"""From the tensors of a checkpoint's files to those of a model, by transformers' own rules.

transformers renames tensors when it loads (`layers.0.block_sparse_moe` is `layers.0.mlp` in
memory), and converts some: the matrices of all experts become one tensor, a fused one is taken
apart, values of 8 bits are multiplied by their scales. Its rules are applied here to one tensor at
a time, so that no more of a model is in memory than is needed.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    dot_natural_key,
    rename_source_key,
)

from vqllm.errors import ModelError
from vqllm.hf.rules import by_kind, renamed, without_merged

UNNAMED = "transformers' rules for the model's checkpoints leave no name for its packed tensors"


@dataclass(frozen=True)
class Origin:
    """The stored tensors that a tensor of the model is made of."""

    keys: tuple[str, ...]
    """their names in the files, in the order in which transformers collects them"""
    patterns: tuple[str, ...] = ()
    """for each of them the pattern of the converter's source that it fits; without one it is the
    tensor itself under another name"""


class Conversions:
    """The rules for one model.

    Attributes:
        origins: of each tensor of the model that has stored tensors, by its full name.
        unused: stored tensors that the model has no place for.
    """

    def __init__(
        self,
        model: Any,
        stored: Iterable[str],
        quantizer: Any = None,
        make_whole: Callable[[], Any] | None = None,
    ) -> None:
        """Args:
        model: on the meta device, as transformers makes it.
        stored: names of all tensors in the files.
        make_whole: another such model, for rules that look at the modules that they are for,
            if `model` will be changed; it is made when the first tensor is converted.
        quantizer: transformers' own one for the format of the files, if they are quantized.
        """
        self._model, self._quantizer = model, quantizer
        self._whole: Any = None
        self._make_whole = make_whole or (lambda: model)
        self._rules = list(get_model_conversion_mapping(model, hf_quantizer=quantizer))
        self._renamings, self._converters = by_kind(self._rules)
        self._prefix = model.base_model_prefix
        self._known: dict[str, Any] = model.state_dict()
        stored = sorted(stored, key=dot_natural_key)
        collected: dict[str, list[tuple[str, str | None]]] = {}
        self.unused: list[str] = []
        for key in stored:
            targets, pattern = self._targets(key)
            for target in targets:
                collected.setdefault(target, []).append((key, pattern))
            if not targets:
                self.unused.append(key)
        self.origins = {
            target: Origin(
                tuple(key for key, _ in sources),
                tuple(pattern for _, pattern in sources if pattern is not None),
            )
            for target, sources in collected.items()
        }
        # Of originals in few bits, what is written is dense: then the rules are those without it.
        self._written = self._rules
        if quantizer is not None:
            self._written = list(get_model_conversion_mapping(model))
            renamings, converters = by_kind(self._written)
            for key in stored:
                rename_source_key(key, renamings, converters, self._prefix, self._known)
        # What saving undoes: the rules that some stored name needed, as transformers keeps them.
        self._used = [rule for rule in self._written if rule.was_used()]
        self._naming: dict[frozenset[str], tuple[list[Any], list[Any], list[Any]]] = {}
        """the rules for names in files, by the tensors that are gone: undone ones, then all"""
        self._prefixes: dict[tuple[str, tuple[str, ...]], str] = {}

    def convert(
        self, target: str, read: Callable[[str], Tensor], only: int | None = None
    ) -> Tensor:
        """A tensor of the model from the stored ones.

        Args:
            target: its full name, one of `origins`.
            read: gives a stored tensor by its name in the files.
            only: of all experts this one; `merges_experts` says whether that can be.
        """
        origin = self.origins[target]
        if not origin.patterns:
            return read(origin.keys[0])
        rule = deepcopy(self._rule(origin.patterns[0]))
        if self._whole is None:
            self._whole = self._make_whole()
        first, _ = self._rename(origin.keys[0])
        numbers: Counter[str] = Counter()
        for key, pattern in zip(origin.keys, origin.patterns):
            if only is None or numbers[pattern] == only:
                rule.add_tensor(first, key, pattern, read(key))  # type: ignore[arg-type]
            numbers[pattern] += 1
        made = rule.convert(
            first, model=self._whole, config=self._whole.config, hf_quantizer=self._quantizer
        )
        value = made[target]
        return value[0] if isinstance(value, list) else value

    def is_decoded(self, target: str) -> bool:
        """Whether a tensor's stored form is one of few bits, which is not kept."""
        return self._quantizer is not None and bool(self.origins[target].patterns)

    def merges_experts(self, target: str, num_experts: int) -> bool:
        """Whether stored tensors of single experts, equally many of each, become this tensor of
        the model with the experts along its first axis."""
        patterns = self.origins[target].patterns
        if not patterns or set(Counter(patterns).values()) != {num_experts}:
            return False
        operations = self._rule(patterns[0]).operations
        return any(isinstance(own, MergeModulelist) and own.dim == 0 for own in operations)

    def name_in_files(
        self, name: str, gone: frozenset[str] = frozenset(), *, own: bool = False
    ) -> str:
        """The name under which a tensor that the model gets in the place of others is stored, so
        that transformers' rules bring it to `name` again: as saving would name it, or `name`.

        Args:
            name: its full name in the model.
            gone: tensors that the model then has no more.
            own: it is of a module whose tensors only renamings concern (`rules.with_linears`).

        Raises:
            ModelError: the rules bring neither there.
        """
        if gone not in self._naming:  # the same for all of a model's names
            undone, _ = by_kind(rule.reverse_transform() for rule in reversed(self._used))
            self._naming[gone] = undone, *by_kind(without_merged(self._written, gone))
        undone, renamings, converters = self._naming[gone]
        candidates = (renamed(name, undone), name)
        for candidate in candidates:
            known = {name: True}
            found = rename_source_key(
                candidate, renamings, [] if own else converters, self._prefix, known
            )
            if found == (name, None):
                return candidate
        raise ModelError(
            f"transformers' names for the checkpoints of {type(self._model).__name__} leave no "
            f"name for {name}: leave it as it is with a pattern in `skip`."
        )

    def prefix_in_files(self, module: str, tensors: tuple[str, ...]) -> str:
        """What stands in the files before the names of tensors that a module has in the place of
        others.

        Args:
            module: its full name in the model.
            tensors: their names in it.

        Raises:
            ModelError: the rules bring no name there, or different ones.
        """
        if (module, tensors) in self._prefixes:
            return self._prefixes[module, tensors]
        found = {
            self.name_in_files(f"{module}.{key}", own=True).removesuffix(f".{key}")
            for key in tensors
        }
        if len(found) > 1:
            raise ModelError(
                f"transformers names the tensors of {module} differently in the files: leave it as "
                "it is with a pattern in `skip`."
            )
        self._prefixes[module, tensors] = found.pop()
        return self._prefixes[module, tensors]

    def why_unnamed(self, module: str, tensors: tuple[str, ...]) -> str | None:
        """Why a module cannot have these tensors in the files; None if it can."""
        try:
            self.prefix_in_files(module, tensors)
        except ModelError:
            return UNNAMED
        return None

    def lost_without(self, gone: Collection[str]) -> list[str]:
        """Other tensors of the model that the rules would not make from their stored ones any more
        if these were gone."""
        kept = {id(rule) for rule in without_merged(self._rules, gone)}
        return [
            target
            for target, origin in self.origins.items()
            if origin.patterns
            and target not in gone
            and not self.is_decoded(target)  # written as they are in the model
            and id(self._rule(origin.patterns[0])) not in kept
        ]

    def _rule(self, pattern: str) -> WeightConverter:
        return next(own for own in self._converters if pattern in own.source_patterns)

    def _targets(self, key: str) -> tuple[list[str], str | None]:
        """The tensors of the model that a stored one goes into, and its converter's pattern."""
        name, pattern = self._rename(key)
        if name not in self._known:
            if key not in self._known:
                return [], None
            name, pattern = key, None  # it has the name of the model already
        if pattern is None:
            return [name], None
        rule = self._rule(pattern)
        first, others = rule.target_patterns[0], rule.target_patterns[1:]
        names = [name, *(name.replace(first, other, 1) for other in others)]
        return [name for name in names if name in self._known], pattern

    def _rename(self, key: str) -> tuple[str, str | None]:
        return rename_source_key(key, self._renamings, self._converters, self._prefix, self._known)


class Renaming:
    """What the tensors of a checkpoint are called in a model, by these rules."""

    def __init__(self, model: Any, rules: Iterable[Any]) -> None:
        self._renamings, _ = by_kind(rules)
        self._prefix = model.base_model_prefix

    def name(self, name: str, tensor: str) -> str:
        """What transformers renames a module of a checkpoint to, by one of its tensors."""
        return renamed(f"{name}.{tensor}", self._renamings).removesuffix(f".{tensor}")

    def module(self, name: str, tensor: str, modules: Collection[str]) -> str | None:
        """The module of a model, one of `modules`, that a module of a checkpoint is; None if there
        is none.

        Args:
            name: what stands before the names of its tensors in the files.
            tensor: the name of one of them.
        """
        renamed = self.name(name, tensor)
        without = renamed.removeprefix(f"{self._prefix}.")
        # In the order in which transformers tries them.
        for candidate in (without, f"{self._prefix}.{renamed}", renamed, name):
            if candidate in modules:
                return candidate
        return None
