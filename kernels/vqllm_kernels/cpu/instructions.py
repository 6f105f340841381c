"""Which instructions the kernels of this process are compiled for.

Nothing is compiled for an instruction that the processor lacks: what numba compiles for is asked,
which is what LLVM finds on this machine, or what NUMBA_CPU_NAME and NUMBA_CPU_FEATURES say.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Literal, get_args

from vqllm_kernels import machine_code

Instructions = Literal["avx512", "avx2", "portable"]

NEEDED: dict[Instructions, frozenset[str]] = {
    "avx512": frozenset(
        ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512vnni", "gfni")
    ),
    "avx2": frozenset(("avx2", "fma")),
    "portable": frozenset(),
}
"""Features of the processor that each set takes, in LLVM's names; the fastest set first."""

VARIABLE = "VQLLM_CPU"
"""The environment variable that names a set, for all of a process."""

_forced: ContextVar[Instructions | None] = ContextVar("forced instructions", default=None)


def instructions() -> Instructions:
    """The set that kernels are compiled for."""
    return _forced.get() or _chosen()


def is_chosen() -> bool:
    """Whether somebody chose the set, and not this module."""
    return _forced.get() is not None or bool(os.environ.get(VARIABLE))


@contextmanager
def force(name: Instructions) -> Iterator[None]:
    """Inside the context, take this set.

    Raises:
        ValueError: the processor lacks it.
    """
    _check(name, "the set")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def available() -> list[Instructions]:
    """The sets that this processor has, the fastest first."""
    return [name for name, needed in NEEDED.items() if needed <= features()]


def why_not_faster() -> str | None:
    """The set and what the fastest one needs besides, or None if it is that."""
    own = instructions()
    if own == "avx512":
        return None
    if is_chosen():
        return f"instructions: {own}, as was chosen"
    missing = sorted(NEEDED["avx512"] - features())
    if "avx512f" in missing:
        return f"instructions: {own}, without AVX-512"
    return f"instructions: {own}, without {', '.join(missing)} of AVX-512"


@cache
def features() -> frozenset[str]:
    """What the processor has, in LLVM's names."""
    known = machine_code.facts().get("features")
    if known is None:
        from numba.core.registry import cpu_target

        context: Any = cpu_target.target_context
        flags = context.codegen().magic_tuple()[2].split(",")
        known = sorted(flag[1:] for flag in flags if flag.startswith("+"))
        machine_code.save_facts(features=known)
    return frozenset(known)


@cache
def _chosen() -> Instructions:
    wanted: Any = os.environ.get(VARIABLE)
    if wanted:
        _check(wanted, VARIABLE)
        return wanted
    return available()[0]


def _check(name: str, what: str) -> None:
    if name not in get_args(Instructions):
        raise ValueError(f"{what} is {name!r}; allowed are {', '.join(get_args(Instructions))}")
    if name not in available():
        raise ValueError(
            f"{what} is {name!r}, which this processor lacks; it has {', '.join(available())}"
        )
