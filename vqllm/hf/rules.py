"""transformers' rules for the tensors of a checkpoint's files, where some of a model's linears have
packed tensors of their own, or are parts of what such a rule makes.

A rule is a renaming or a converter. Loading applies all renamings to a name, then one converter at
most; saving undoes what loading used, in the opposite order.
"""

import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)


class OthersConverter(WeightConverter):
    """A converter that leaves the tensors of some modules alone, in loading and in saving.

    Patterns are parts of names, so that one for a projection would take the packed tensors of every
    projection of that name.

    Attributes:
        rule: transformers' own, for all tensors.
    """

    __slots__ = ("_leaves", "rule")
    _leaves: Callable[[str], bool]
    rule: WeightConverter

    @classmethod
    def of(cls, rule: Any, leaves: Callable[[str], bool]) -> "OthersConverter":
        """The same rule for all tensors but those whose name `leaves` says are left alone."""
        # The patterns as they were given: the rule's own are changed for matching.
        patterns = (list(rule._original_source_patterns), list(rule._original_target_patterns))
        made = cls(*patterns, rule.operations, rule.force_cpu)
        made.scope_prefix, made.base_model_prefix = rule.scope_prefix, rule.base_model_prefix
        made._leaves, made.rule = leaves, rule
        return made

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if self._leaves(source_key):
            return source_key, None
        return super().rename_source_key(source_key)

    def copy(self, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> WeightConverter:
        made: Any = super().copy(source_patterns, target_patterns, **kwargs)
        made._leaves, made.rule = self._leaves, self.rule
        return made


def with_linears(
    rules: Iterable[Any], gone: Collection[str], modules: Collection[str], prefix: str
) -> list[Any]:
    """The rules for a model some of whose linears have names of their own in the files.

    Args:
        gone: tensors that the model has no more, since its linears are parts of them.
        modules: full names of the modules whose tensors only renamings concern.
        prefix: the model's `base_model_prefix`, which names in files may have or lack.
    """
    own = frozenset(modules)

    def leaves(name: str) -> bool:
        module = name.rpartition(".")[0]
        return (
            module in own
            or f"{prefix}.{module}" in own
            or (module.startswith(f"{prefix}.") and module.removeprefix(f"{prefix}.") in own)
        )

    kept = without_merged(rules, gone)
    return [
        OthersConverter.of(rule, leaves) if isinstance(rule, WeightConverter) else rule
        for rule in kept
    ]


def without_merged(rules: Iterable[Any], gone: Collection[str]) -> list[Any]:
    """The rules without converters that make one of these tensors, which a model has no more."""
    return [
        rule for rule in rules if not (isinstance(rule, WeightConverter) and _makes_any(rule, gone))
    ]


def undone_by_saving(rules: Iterable[Any], used: Iterable[Any], kept: Iterable[str]) -> list[Any]:
    """The rules that saving must undo for a model whose packed tensors became dense: those that
    loading used, and those that it did not use because what they are for was packed.

    Args:
        rules: all of the model, in the order of loading.
        used: those of them that loading used.
        kept: full names of the tensors that came from the files as they are. A rule that was not
            used for any of them, but would be undone for one, is for files of another layout.
    """
    used = {id(rule) for rule in used}
    undone = [(rule, rule.reverse_transform()) for rule in rules]
    renamings, converters = by_kind(reverse for _, reverse in reversed(undone))
    for name in kept:
        rename_source_key(name, renamings, converters, reverse=True)
    return [rule for rule, reverse in undone if id(rule) in used or not reverse.was_used()]


def made_together(names: Iterable[str], undone: Iterable[Any]) -> list[list[str]]:
    """Tensors of a model divided into those that saving makes stored tensors of together.

    Args:
        names: full names of all of its tensors.
        undone: the rules that saving undoes, in the order of loading.
    """
    _, converters = by_kind(rule.reverse_transform() for rule in reversed(list(undone)))
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(converted(name, converters), []).append(name)
    return list(groups.values())


# transformers has these two as functions from 5.20 on.


def renamed(name: str, renamings: Iterable[WeightRenaming]) -> str:
    """The name after all renamings."""
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def converted(name: str, converters: Iterable[WeightConverter]) -> str:
    """The name after the first converter that takes it."""
    for converter in converters:
        name, pattern = converter.rename_source_key(name)
        if pattern is not None:
            break
    return name


def by_kind(rules: Iterable[Any]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """Renamings and converters, each in their order."""
    rules = list(rules)
    return (
        [rule for rule in rules if isinstance(rule, WeightRenaming)],
        [rule for rule in rules if isinstance(rule, WeightConverter)],
    )


def _makes_any(rule: WeightConverter, names: Collection[str]) -> bool:
    patterns = [re.compile(_as_regex(target)) for target in rule.target_patterns]
    return any(pattern.search(name) for pattern in patterns for name in names)


def _as_regex(target: str) -> str:
    """A target pattern as a pattern of what it writes: whole words, so that `up_proj` is not found
    in `gate_up_proj`."""
    pieces = target.replace(r"\.", ".").split(r"\1")
    first, last = (r"\b" if end.isalnum() else "" for end in (target[:1], target[-1:]))
    return f"{first}{'.*'.join(map(re.escape, pieces))}{last}"
