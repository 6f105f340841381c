"""Choosing one of several implementations of an operation, once for each kind of call.

An implementation says why it cannot serve a call (`declines`), the first in the order of preference
that does not decline is taken, and the choice is logged once with its reasons. `force` overrides
the order, for tests and benchmarks.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vqllm_kernels.formats import FormatSpec
from vqllm_kernels.transforms import TransformSpec

logger = logging.getLogger(__name__)

Operation = Literal["matmul", "decode", "transform"]

BATCH_BUCKETS = (8, 16, 32, 64)
"""Rows of x for which small-batch kernels are compiled; a call takes the first that holds it."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """All that an implementation may look at when it accepts or declines.

    `batch` is a bucket of BATCH_BUCKETS, one more than the last for anything larger, and 0 for an
    operation without a batch.
    """

    operation: Operation
    spec: FormatSpec | TransformSpec
    device: torch.device
    dtype: torch.dtype
    batch: int = 0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The implementation that serves a kind of call, and why those before it do not."""

    call: Call
    implementation: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to run an operation."""

    run: Callable[..., Any]
    declines: Callable[[Call], str | None]
    """The reason why it cannot serve a call, or None."""


_choices: dict[Call, Choice] = {}
_forced: ContextVar[str | None] = ContextVar("forced implementation", default=None)


def bucket(num_rows: int) -> int:
    """The smallest batch bucket that holds `num_rows` rows of x."""
    return next((b for b in BATCH_BUCKETS if num_rows <= b), BATCH_BUCKETS[-1] + 1)


def choose(
    call: Call, implementations: Mapping[str, Implementation], order: Sequence[str]
) -> Implementation:
    """The implementation of `call`: the forced one, or the first of `order` that accepts.

    Raises:
        ValueError: the forced implementation declines, or none accepts.
    """
    forced = _forced.get()
    if forced is not None and forced in implementations:
        reason = implementations[forced].declines(call)
        if reason is not None:
            raise ValueError(f"{call.operation}: {forced!r} is forced, but declines: {reason}")
        return implementations[forced]
    if call not in _choices:
        _choices[call] = _first_willing(call, implementations, order)
        logger.info("%s", _describe(_choices[call]))
    return implementations[_choices[call].implementation]


@contextmanager
def force(implementation: str) -> Iterator[None]:
    """Inside the context, take this implementation in every operation that has it."""
    token = _forced.set(implementation)
    try:
        yield
    finally:
        _forced.reset(token)


def choices() -> list[Choice]:
    """Every choice made so far in this process, in the order in which they were made."""
    return list(_choices.values())


def forget() -> None:
    """Drop all choices, so that they are made and logged again."""
    _choices.clear()


def _first_willing(
    call: Call, implementations: Mapping[str, Implementation], order: Sequence[str]
) -> Choice:
    reasons = []
    for name in order:
        reason = implementations[name].declines(call)
        if reason is None:
            why = "; ".join(reasons) or "first choice"
            return Choice(call=call, implementation=name, reason=why)
        reasons.append(f"{name} declines: {reason}")
    raise ValueError(f"{call.operation}: no implementation accepts ({'; '.join(reasons)})")


def _describe(choice: Choice) -> str:
    call = choice.call
    what = call.spec.format_id if isinstance(call.spec, FormatSpec) else call.spec.kind
    rows = f", up to {call.batch} rows" if 0 < call.batch <= BATCH_BUCKETS[-1] else ""
    return (
        f"{call.operation} of {what} on {call.device} in {call.dtype}{rows}: "
        f"{choice.implementation} ({choice.reason})"
    )
