"""The records of arguments: those of the functions, and the calls that pages show."""

import inspect
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from vqllm import api, recipes
from vqllm.runs.arguments import (
    CompareArguments,
    QuantizeArguments,
    TuneArguments,
    source_names,
)


@pytest.mark.parametrize("record", [QuantizeArguments, TuneArguments, CompareArguments])
def test_a_record_has_the_arguments_of_its_function(record: type) -> None:
    parameters = inspect.signature(getattr(api, record.FUNCTION)).parameters.values()
    empty = inspect.Parameter.empty
    expected = [
        (own.name, MISSING if own.default is empty else own.default)
        for own in parameters
        if own.name not in ("progress", "command")
    ]
    assert [(field.name, field.default) for field in fields(record)] == expected


def test_the_call_leaves_out_what_has_its_default() -> None:
    given = QuantizeArguments(Path("m"), "out", bits=3, calibration=["a.txt"], evaluate=False)
    assert (
        given.call() == "vqllm.quantize('m', 'out', bits=3, calibration=['a.txt'], evaluate=False)"
    )
    assert TuneArguments("q", "out").call() == "vqllm.tune('q', 'out')"


def test_the_calls_of_a_comparison_and_of_a_member() -> None:
    own = recipes.load("rtn-4bit")
    given = CompareArguments("m", "out", ["e8p-2bit", own], seed=3, changes=("skip=[]",))
    text = f"vqllm.recipe.from_dict({own.to_dict()!r}, 'rtn-4bit')"
    assert given.call() == (
        f"vqllm.compare('m', 'out', ['e8p-2bit', {text}], changes=('skip=[]',), seed=3)"
    )
    member = given.of_member("e8p-2bit", ("skip=[]", "seed=1"), Path("out/x"))
    assert member.call() == (
        "vqllm.quantize('m', 'out/x', recipe='e8p-2bit', seed=3, changes=('skip=[]', 'seed=1'))"
    )


def test_sources_are_a_list_of_texts() -> None:
    assert source_names(None) is None
    assert source_names("self") == ["self"]
    assert source_names([Path("a"), "b"]) == ["a", "b"]
