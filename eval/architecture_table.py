"""What was measured of model types, as lines and as a Markdown table."""

import re
from collections import defaultdict
from typing import Any

MOST = 0.95
"""Share of the layers' weights from which on all that matters is quantized: the rest of a tiny
model are norms, biases and routers."""

NEAR = 1e-4
"""Relative difference of float32 logits up to which two models count as equal."""


def table(results: dict[str, Any], not_made: dict[str, str]) -> str:
    """A row for every type, and the types of which there is no tiny model."""
    rows = ["| type | layers quantized | of all | logits | saved again | generates | note |"]
    rows.append("|---|---|---|---|---|---|---|")
    for name, found in sorted(results.items()):
        rows.append("| " + " | ".join([name, *cells(found), note(found)]) + " |")
    reasons = [f"- {name}: {reason}" for name, reason in sorted(not_made.items())]
    return "\n".join([*rows, "", *counts(results), "", "Not measured:", "", *reasons])


def counts(results: dict[str, Any]) -> list[str]:
    """How many types work, and how many have each kind of problem, with their names."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, found in sorted(results.items()):
        for problem in problems(found):
            kinds[kind(problem)].append(name)
    fine = sum(not problems(found) for found in results.values())
    whole = sum(found.get("layers_share", 0) >= MOST for found in results.values())
    lines = [
        f"{len(results)} types were measured. {fine} have no problem. Of {whole}, at least "
        f"{MOST:.0%} of the layers' weights are quantized.",
        "",
    ]
    for problem, names in sorted(kinds.items(), key=lambda item: -len(item[1])):
        lines.append(f"- {len(names)} x {problem} ({', '.join(names)})")
    return lines


def kind(problem: str) -> str:
    """A problem without what is of one model only: paths, names, numbers."""
    problem = re.sub(r"/\S+|'[^']*'|\[.*?\]|\(.*?\)", "…", problem)
    problem = re.sub(r"\S+\.\S+\.\S+", "…", problem)
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "N", problem)[:110]


def line(name: str, found: dict[str, Any]) -> str:
    share, whole, near, saved, generates = cells(found)
    head = f"{name:28} {share:>7} {whole:>7} {near:>8} {saved:>4} {generates:>4}"
    return f"{head} {found['cpu_seconds']:5.1f} s  {note(found)}"


def cells(found: dict[str, Any]) -> list[str]:
    """Share of the layers, of all; difference of logits; saved alike; generates."""
    return [
        f"{found['layers_share']:.1%}" if "layers_share" in found else "-",
        f"{found['share']:.1%}" if "share" in found else "-",
        f"{found['difference']:.0e}" if "difference" in found else "-",
        _answer(found, "tensors_changed", saved_alike(found)),
        _answer(found, "generated", len(found.get("generated", ())) == 8),
    ]


def saved_alike(found: dict[str, Any]) -> bool:
    return found.get("tensors_changed") == "" and found.get("logits_kept", False)


def source_saved_alike(found: dict[str, Any]) -> bool:
    """Whether transformers saves the source with the tensors and the logits that it has."""
    return not found.get("source_changed") and found.get("source_logits_kept", True)


def problems(found: dict[str, Any]) -> list[str]:
    """What failed, in a few words each; not what the dense folder fails at too."""
    lines = [f"{step}: {error}" for step, error in found["errors"].items()]
    if found.get("difference", 0) > NEAR:
        lines.append("logits differ")
    if source_saved_alike(found):
        if found.get("tensors_changed"):
            lines.append(f"saved again: {found['tensors_changed']}")
        elif not found.get("logits_kept", True):
            lines.append("logits of the saved model differ")
    for step in ("generate", "decode"):
        error, of_dense = found.get(f"{step}_error"), found.get(f"dense_{step}_error")
        if error and not of_dense:
            lines.append(f"{step}: {error}")
    if found.get("decode_difference", 0) > NEAR:
        lines.append(f"decoding differs by {found['decode_difference']:.0e}")
    return lines


def note(found: dict[str, Any]) -> str:
    """What failed, then what transformers itself cannot, then what stayed of the layers."""
    lines = problems(found)
    if not source_saved_alike(found) and "logits_kept" in found and not saved_alike(found):
        lines.append("the source is not saved as it was either")
    for step in ("generate", "decode"):
        if found.get(f"{step}_error") and found.get(f"dense_{step}_error"):
            lines.append(f"does not {step} unquantized either")
    stayed = [pattern.rpartition(".*.")[2] for pattern in found.get("stayed", {})]
    if stayed:
        lines.append("stayed: " + ", ".join(dict.fromkeys(stayed)))
    return "; ".join(lines).replace("|", "/")


def _answer(found: dict[str, Any], key: str, value: bool) -> str:
    return "-" if key not in found else "yes" if value else "no"
