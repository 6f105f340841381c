"""The tables of docs/rounding.md and its appendix, from the rows that `proxy_table.py` measured."""

import math
from collections.abc import Iterator
from pathlib import Path

from markers import rewrite

from vqllm.core.protocols import JSON

IMPROVES: dict[str, tuple[str, ...]] = {
    "coordinate": ("nearest",),
    "ldlq": ("nearest",),
    "ldlq, 1 pass": ("ldlq",),
    "ldlq, 2 passes": ("ldlq, 1 pass", "ldlq"),
    "ldlq, 3 passes": ("ldlq, 2 passes", "ldlq"),
    "coordinate, solved": ("ldlq, 3 passes", "ldlq"),
    "beam": ("ldlq",),
}
"""Which rule each one goes on from; the first that was measured with the same codec."""
HALVES = {"fit": "same tokens", "check": "other tokens"}
Case = tuple[int, str, str]
"""Bits, codec, transform."""


PAGE_BITS = 2
"""The page shows this rate, the appendix all of them."""


def write_tables(page: Path, appendix: Path, rows: list[JSON]) -> None:
    """Rewrite what stands between the markers of both pages."""
    cases: dict[Case, dict[str, JSON]] = {}
    for row in rows:
        case = row["bits"], row["codec"], row["transform"]
        cases.setdefault(case, {})[row["rounding"]] = row
    few = {case: found for case, found in cases.items() if case[0] == PAGE_BITS}
    rewrite(page, "proxy", losses(few))
    rewrite(page, "rules", comparison(few) + "\n" + judgement(cases))
    rewrite(appendix, "proxy", losses(cases))
    rewrite(appendix, "rules", comparison(cases))
    rewrite(appendix, "seconds", seconds(cases))


def losses(cases: dict[Case, dict[str, JSON]]) -> str:
    """Markdown: a row for each codec and transform, a column for each rule."""
    names = _roundings(cases)
    lines = [
        _line(["bits", "all", "codec", "transform", *names]),
        _line(["---"] * (4 + len(names))),
    ]
    for case in sorted(cases, key=lambda case: (case[0], case[2] != "hadamard", case[2])):
        bits, codec, transform = case
        every = f"{max(row['bits_per_weight'] for row in cases[case].values()):.2f}"
        cells = [f"{cases[case][n]['check']:.4g}" if n in cases[case] else "" for n in names]
        lines.append(_line([str(bits), every, codec, transform, *cells]))
    return "\n".join(lines) + "\n"


def seconds(cases: dict[Case, dict[str, JSON]]) -> str:
    """Markdown: the same of the seconds, after Hadamard transforms."""
    names = _roundings(cases)
    head = ["bits", "codec", *names]
    lines = [_line(head), _line(["---"] * len(head))]
    for case in sorted(cases, key=lambda case: case[0]):
        bits, codec, transform = case
        if transform == "hadamard":
            found = cases[case]
            cells = [f"{found[n]['seconds']:.2g}" if n in found else "" for n in names]
            lines.append(_line([str(bits), codec, *cells]))
    return "\n".join(lines) + "\n"


def comparison(cases: dict[Case, dict[str, JSON]]) -> str:
    """Markdown: every rule against the one it goes on from, over codecs and transforms."""
    columns = [f"{half}: loss, worst case, linears worse" for half in HALVES.values()]
    head = ["rule", "over", "bits", "cases", *columns, "time"]
    lines = [_line(head), _line(["---"] * len(head))]
    groups: dict[tuple[str, str, int], list[tuple[Case, JSON, JSON]]] = {}
    for case, better, worse in _pairs(cases):
        key = better["rounding"], worse["rounding"], case[0]
        groups.setdefault(key, []).append((case, better, worse))
    for (rule, base, bits), pairs in sorted(groups.items(), key=lambda item: _rank(*item[0])):
        cells = [rule, base, str(bits), str(len(pairs))]
        for half in HALVES:
            ratios = [better[half] / worse[half] for _, better, worse in pairs]
            each = [
                a > b
                for _, better, worse in pairs
                for a, b in zip(better["losses"][half], worse["losses"][half])
            ]
            mean, worst = _geometric_mean(ratios), max(ratios)
            cells.append(f"{_percent(mean)}, {_percent(worst)}, {sum(each)} of {len(each)}")
        times = [better["seconds"] / worse["seconds"] for _, better, worse in pairs]
        lines.append(_line([*cells, f"x {_geometric_mean(times):.1f}"]))
    return "\n".join(lines) + "\n"


def judgement(cases: dict[Case, dict[str, JSON]]) -> str:
    """Whether each rule is no worse than the one it goes on from, case by case."""
    pairs = list(_pairs(cases))
    text = ""
    for half, tokens in HALVES.items():
        worse = [
            f"{better['rounding']} over {base['rounding']} with {case[1]} at {case[0]} bits, "
            f"transform {case[2]} ({_percent(better[half] / base[half])})"
            for case, better, base in pairs
            if better[half] > base[half]
        ]
        text += f"- {tokens}: in {len(worse) or 'none'} of {len(pairs)} cases a rule is worse than "
        text += f"the one it goes on from: {'; '.join(worse)}.\n" if worse else "its base.\n"
    return text


def _pairs(cases: dict[Case, dict[str, JSON]]) -> Iterator[tuple[Case, JSON, JSON]]:
    """Every row with that of the rule it goes on from."""
    for case, found in cases.items():
        for name, row in found.items():
            base = next((b for b in IMPROVES.get(name, ()) if b in found), None)
            if base is not None:
                yield case, row, found[base]


def _roundings(cases: dict[Case, dict[str, JSON]]) -> list[str]:
    """The rules that were measured, from the simplest on."""
    measured = {name for found in cases.values() for name in found}
    return [name for name in ("nearest", *IMPROVES) if name in measured]


def _rank(rule: str, base: str, bits: int) -> tuple[int, str, int]:
    return list(IMPROVES).index(rule), base, bits


def _geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _percent(ratio: float) -> str:
    """The change that a ratio is, "−12.3 %"."""
    change = 100 * (ratio - 1)
    return f"{'+' if change > 0 else '−'}{abs(change):.1f} %"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
