"""Compiled kernels with and without a place to keep them."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("numba")
from numba.core import caching

from vqllm_kernels import compiled


@pytest.fixture(autouse=True)
def said_nothing_yet() -> Iterator[None]:
    compiled._say_once.cache_clear()
    yield
    compiled._say_once.cache_clear()


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])


def next_number(x: int) -> int:
    return x + 1


def nothing(pointer: Any) -> None:
    pass


def test_kernels_are_compiled_where_nothing_can_be_kept(
    nowhere: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert compiled.njit()(next_number)(1) == 2
        assert compiled.entry(nothing) != 0
    [said] = caplog.records
    assert "set NUMBA_CACHE_DIR" in said.getMessage()


def test_names_on_disk_change_with_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    def named() -> str:
        def function(x: int) -> int:
            return x

        compiled.njit()(function)
        return function.__qualname__

    before = named()
    assert before == named()
    monkeypatch.setattr(compiled, "_stamp", lambda folder: "other")
    assert before != named()


def test_long_waits_are_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), compiled.said_if_long():
        pass
    assert not caplog.records
    monkeypatch.setattr(compiled, "LONG", -1.0)
    with caplog.at_level(logging.WARNING), compiled.said_if_long():
        pass
    assert "compiled kernels for this processor in" in caplog.text
