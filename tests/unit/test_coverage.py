"""How much of a model is quantized, as tables say it."""

from vqllm.core.coverage import ParameterCounts, kinds_of
from vqllm.report.summary import coverage_rows

COUNTS = {"layers": 1000, "model": 2000}


def test_kinds_are_counted_without_their_details() -> None:
    reasons = {"a": "a router (8 x 64)", "b": "an embedding", "c": "a router (4 x 64)"}
    assert kinds_of(reasons) == "2 x a router; 1 x an embedding"
    many = {str(i): f"kind {min(i, 6)}" for i in range(8)}
    assert kinds_of(many) == (
        "2 x kind 6; 1 x kind 0; 1 x kind 1; 1 x kind 2; 1 x kind 3; 2 x other reasons"
    )
    assert kinds_of({}) == ""


def test_rows_have_both_shares_and_the_reasons() -> None:
    counts = ParameterCounts(**COUNTS, layers_quantized=500, model_quantized=501)
    assert coverage_rows(counts, {"head": "a linear outside the decoder layers"}) == [
        ("quantized", "50.00 % of the parameters in the decoder layers, 25.05 % of all"),
        ("modules not quantized", "1 x a linear outside the decoder layers"),
    ]
    assert coverage_rows(None, {}) == []


def test_less_than_half_is_a_warning() -> None:
    counts = ParameterCounts(**COUNTS, layers_quantized=499, model_quantized=499)
    rows = coverage_rows(counts, {})
    assert [label for label, _ in rows] == ["quantized", "warning"]
    assert rows[-1][1].startswith("less than half of the decoder layers is quantized")
