"""Which implementation serves a call, chosen once for each kind of call.

An implementation is tried in the order of preference of its operation and device (`_ORDER`). It is
taken if the call is within its limits (`_LIMITS`: devices, dtypes, rows of x) and the kernels of
the format do not decline. The choice is logged once with the reasons of those before it. `force`
overrides the order, for tests and benchmarks.

    matmul, decode, transform   the kernels that serve a call
    beats_kept_weights          whether they are faster than weights that were decoded before
    choices, forget, force      what was chosen, and how to choose otherwise
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Generic, TypeVar

import torch
from torch import Tensor

from vqllm_kernels import gpu
from vqllm_kernels.formats import FormatSpec
from vqllm_kernels.kernels import (
    BATCH_BUCKETS,
    Call,
    Kernels,
    Operation,
    Tensors,
    TransformKernels,
    bucket,
)
from vqllm_kernels.linear import LinearSpec
from vqllm_kernels.lut import cpu as lookup
from vqllm_kernels.reference import DenseKernels, ReferenceKernels, ReferenceTransforms
from vqllm_kernels.transforms import HadamardSpec

logger = logging.getLogger(__name__)

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

LOOKUP_ROWS = 1
"""Rows of x up to which look-ups are not slower than torch's product with decoded weights: 4096 x
4096 takes 0.14 (1 bit) to 0.39 ms (2 bits, d = 2) a row, torch 1.7 ms for 1 to 4 rows in bfloat16;
one by one it takes 0.8 to 1.6."""

_forced: ContextVar[str | None] = ContextVar("forced implementation", default=None)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The implementation that serves a kind of call, and why those before it do not."""

    call: Call
    implementation: str
    reason: str


_choices: dict[Call, Choice] = {}

S = TypeVar("S", FormatSpec, HadamardSpec)
K = TypeVar("K", Kernels, TransformKernels)


class Selection(Generic[S, K]):
    """The implementations of one operation, and the kernels that were taken for calls so far."""

    def __init__(
        self, operation: Operation, implementations: Mapping[str, Callable[[S], K]]
    ) -> None:
        self.operation: Operation = operation
        self.implementations = implementations
        """By name: what gives the kernels of a spec."""
        self._taken: dict[Call, K] = {}

    def take(self, call: Call, spec: S) -> K:
        """The kernels for `call`, which is one of `spec`: of the forced implementation, or of the
        first in order that accepts.

        Raises:
            ValueError: the forced implementation declines, or none accepts.
        """
        forced = _forced.get()
        if forced is not None and forced in self.implementations:
            reason = self._declines(forced, call, spec)
            if reason is not None:
                raise ValueError(f"{call.operation}: {forced!r} is forced, but declines: {reason}")
            return self.implementations[forced](spec)
        taken = self._taken.get(call)
        if taken is None:
            choice = self._first_willing(call, spec)
            logger.info("%s", _describe(choice))
            taken = self.implementations[choice.implementation](spec)
            _choices[call] = choice
            self._taken[call] = taken
        return taken

    def forget(self) -> None:
        """Drop what was taken."""
        self._taken.clear()

    def _first_willing(self, call: Call, spec: S) -> Choice:
        reasons = []
        for name in _order(call.device, self.operation):
            reason = self._declines(name, call, spec)
            if reason is None:
                why = "; ".join(reasons) or "first choice"
                # Only kernels of which there are several kinds have a note.
                if note := getattr(self.implementations[name](spec), "note", None):
                    why = f"{why}; {note}"
                return Choice(call=call, implementation=name, reason=why)
            reasons.append(f"{name} declines: {reason}")
        raise ValueError(f"{call.operation}: no implementation accepts ({'; '.join(reasons)})")

    def _declines(self, name: str, call: Call, spec: S) -> str | None:
        # Limits come first: they tell whether the kernels can be imported at all.
        limit = _LIMITS.get(name)
        reason = limit(call) if limit is not None else None
        return reason or self.implementations[name](spec).declines(call)


def _order(device: torch.device, operation: Operation) -> tuple[str, ...]:
    """Names of implementations, the preferred one first."""
    if device.type == "cpu" and operation == "matmul":
        return ("packed", "lookup", "reference")
    if device.type != "cuda":
        return ("reference",)
    return ("triton", "dense") if operation == "matmul" else ("triton", "reference")


def _triton_limits(call: Call) -> str | None:
    if call.dtype not in FLOATS:
        return f"{call.dtype} is none of float16, bfloat16, float32"
    if call.batch > BATCH_BUCKETS[-1]:
        return f"more than {BATCH_BUCKETS[-1]} rows"
    return gpu.declines(call.device)


def _lookup_limits(call: Call) -> str | None:
    if call.device.type != "cpu":
        return f"the tensors are on {call.device.type}, not on a CPU"
    if call.batch > BATCH_BUCKETS[0]:
        return f"more than {BATCH_BUCKETS[0]} rows"
    if call.dtype not in FLOATS:
        return f"{call.dtype} is none of float16, bfloat16, float32"
    return None


def _packed_limits(call: Call) -> str | None:
    if call.device.type != "cpu":
        return f"the tensors are on {call.device.type}, not on a CPU"
    return None


_LIMITS: dict[str, Callable[[Call], str | None]] = {
    "triton": _triton_limits,
    "packed": _packed_limits,
    "lookup": _lookup_limits,
}
"""Why an implementation takes a call of no format whatever, or None."""


def _triton(spec: FormatSpec) -> Kernels:
    return spec.kernels("triton")


def _packed(spec: FormatSpec) -> Kernels:
    return spec.kernels("packed")


def _lookup(spec: FormatSpec) -> Kernels:
    return spec.kernels("lookup")


def _reference(spec: FormatSpec) -> Kernels:
    return ReferenceKernels(spec=spec)


def _dense(spec: FormatSpec) -> Kernels:
    return DenseKernels(spec=spec, decoder=lambda tensors, dtype: decode(tensors, spec, dtype))


def _triton_transforms(spec: HadamardSpec) -> TransformKernels:
    return spec.kernels()


def _reference_transforms(spec: HadamardSpec) -> TransformKernels:
    return ReferenceTransforms()


MATMUL = Selection[FormatSpec, Kernels](
    "matmul",
    {
        "triton": _triton,
        "dense": _dense,
        "packed": _packed,
        "lookup": _lookup,
        "reference": _reference,
    },
)
DECODE = Selection[FormatSpec, Kernels]("decode", {"triton": _triton, "reference": _reference})
TRANSFORM = Selection[HadamardSpec, TransformKernels](
    "transform", {"triton": _triton_transforms, "reference": _reference_transforms}
)


def matmul(x_NC: Tensor, spec: FormatSpec) -> Kernels:
    """What multiplies x [N, cols] with weights of a format."""
    batch = bucket(x_NC.shape[0])
    call = Call(operation="matmul", spec=spec, device=x_NC.device, dtype=x_NC.dtype, batch=batch)
    return MATMUL.take(call, spec)


def choose(x_NC: Tensor, spec: FormatSpec) -> None:
    """Choose for a product, and note the choice, without making it."""
    matmul(x_NC, spec)


def decode(tensors: Tensors, spec: FormatSpec, dtype: torch.dtype) -> Kernels:
    """What decodes the stored tensors of a format to `dtype`."""
    device = next(iter(tensors.values())).device
    return DECODE.take(Call(operation="decode", spec=spec, device=device, dtype=dtype), spec)


def transform(v: Tensor, spec: HadamardSpec) -> TransformKernels:
    """What transforms activations."""
    call = Call(operation="transform", spec=spec, device=v.device, dtype=v.dtype)
    return TRANSFORM.take(call, spec)


def beats_kept_weights(
    spec: LinearSpec, device: torch.device, num_rows: int, dtype: torch.dtype
) -> bool:
    """Whether the packed product of so many rows of x is faster than torch's with weights that were
    decoded before: where codes are multiplied as they are stored on a CPU, whatever the rows, and
    where those of a large matrix are looked up."""
    if device.type != "cpu":
        return False
    return multiplied_packed(spec.format, dtype) or (
        num_rows <= LOOKUP_ROWS
        and spec.rows * spec.cols >= lookup.fewest_weights(spec.cols)
        and _looked_up(spec.format)
    )


@torch.compiler.assume_constant_result
def multiplied_packed(spec: FormatSpec, dtype: torch.dtype) -> bool:
    """Whether codes of a format are multiplied as they are stored, on a CPU."""
    if (forced := _forced.get()) is not None:
        return forced == "packed"
    return _multiplied_packed(spec, dtype)


@cache
def _multiplied_packed(spec: FormatSpec, dtype: torch.dtype) -> bool:
    call = Call(operation="matmul", spec=spec, device=torch.device("cpu"), dtype=dtype, batch=1)
    return spec.kernels("packed").declines(call) is None


@torch.compiler.assume_constant_result
def _looked_up(spec: FormatSpec) -> bool:
    return looked_up(spec)


@cache
def looked_up(spec: FormatSpec) -> bool:
    """Whether a format has look-ups for a row of x."""
    device = torch.device("cpu")
    call = Call(operation="matmul", spec=spec, device=device, dtype=torch.float32, batch=bucket(1))
    return spec.kernels("lookup").declines(call) is None


@contextmanager
def force(implementation: str) -> Iterator[None]:
    """Inside the context, take this implementation in every operation that has it."""
    token = _forced.set(implementation)
    try:
        yield
    finally:
        _forced.reset(token)


def is_forced() -> bool:
    """Whether `force` names an implementation here."""
    return _forced.get() is not None


def choices() -> list[Choice]:
    """Every choice made so far in this process, in the order in which they were made."""
    return list(_choices.values())


def forget() -> None:
    """Drop all choices, so that they are made and logged again."""
    _choices.clear()
    _multiplied_packed.cache_clear()
    for selection in (MATMUL, DECODE, TRANSFORM):
        selection.forget()


def _describe(choice: Choice) -> str:
    call = choice.call
    what = call.spec.format_id if isinstance(call.spec, FormatSpec) else call.spec.kind
    rows = f", up to {call.batch} rows" if 0 < call.batch <= BATCH_BUCKETS[-1] else ""
    return (
        f"{call.operation} of {what} on {call.device} in {call.dtype}{rows}: "
        f"{choice.implementation} ({choice.reason})"
    )
