"""The pages beside a checkpoint: report.jsonl, report.md, the model card, the plot."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vqllm.core import local_paths
from vqllm.core.protocols import JSON
from vqllm.report.plot import plot_proxy_loss
from vqllm.report.summary import Summary, worst

JSONL, PAGE, CARD, PLOT = "report.jsonl", "report.md", "README.md", "proxy_loss.png"


def report_pages(records: Sequence[JSON], summary: Summary, recipe_yaml: str) -> dict[str, bytes]:
    """The pages about a run by file name. They hold nothing that a repeated run would change, and
    names in place of local paths.

    Args:
        recipe_yaml: with names only.
    """
    summary = replace(
        summary,
        model=local_paths.name_of(summary.model),
        command=local_paths.in_command(summary.command),
    )
    return {
        PLOT: plot_proxy_loss(records),
        PAGE: _page(records, summary, recipe_yaml).encode(errors="replace"),
        CARD: _card(summary, recipe_yaml).encode(errors="replace"),
    }


def _page(records: Sequence[JSON], summary: Summary, recipe_yaml: str) -> str:
    """report.md."""
    dense_rows = [(name, reason) for name, reason in summary.not_quantized.items()]
    return "\n".join(
        [
            f"# {_in_line(summary.model)}, {summary.recipe}",
            "",
            "    " + _in_line(summary.command),
            "",
            markdown_table(("", ""), summary.lasting_rows()),
            f"![proxy loss by layer and kind of linear]({PLOT})",
            "",
            "## By kind of linear",
            "",
            markdown_table(
                ("kind", "linears", "bits", "entropy of codes", "mean proxy loss", "worst"),
                _rows_by_kind(records),
            ),
            "## Worst linears",
            "",
            markdown_table(("linear", "proxy loss", "SQNR dB", "tokens"), _worst_rows(records)),
            *_section(
                "Experts that no calibration token reached, rounded for the inputs of the others",
                ("expert", "linears"),
                _unreached_rows(records),
            ),
            *_section(
                "Bits that linears got",
                ("bits of codes", "linears", "weights", "which", "expected KL"),
                _allocated_rows(records),
            ),
            *_section(
                "Linears that the predictions do not depend on",
                ("linear", "bits of codes"),
                _idle_rows(records),
            ),
            *_section(
                "Fragile linears, coded with more bits",
                ("linear", "proxy loss before", "after", "bits"),
                _fragile_rows(records),
            ),
            *_section(
                "Training after each input group was rounded: held-out error of the layer's output",
                ("layer", "group", *TRAINING),
                _trained_rows(records),
            ),
            *_tuned(summary.tuning),
            "## Not quantized",
            "",
            markdown_table(("module", "reason"), dense_rows),
            "## Recipe",
            "",
            f"```yaml\n{recipe_yaml}```",
            "",
        ]
    )


Rows = list[tuple[str, ...]]


def _rows_by_kind(records: Sequence[JSON]) -> Rows:
    """The kind of a linear is the last part of its name, such as q_proj."""
    kinds: dict[str, list[JSON]] = {}
    for record in records:
        kinds.setdefault(record["name"].rsplit(".", 1)[-1], []).append(record)
    return [
        (
            kind,
            str(len(group)),
            f"{_bits_per_weight(group):.3f}",
            f"{_mean_entropy(group):.3f}",
            f"{sum(r['proxy_loss'] for r in group) / len(group):.4g}",
            f"{max(r['proxy_loss'] for r in group):.4g}",
        )
        for kind, group in kinds.items()
    ]


def _worst_rows(records: Sequence[JSON]) -> Rows:
    return [
        (r["name"], f"{r['proxy_loss']:.4g}", f"{r['sqnr_db']:.2f}", str(r["num_tokens"]))
        for r in worst(records)
    ]


def _unreached_rows(records: Sequence[JSON]) -> Rows:
    linears: dict[str, list[str]] = {}
    for record in records:
        if record["num_tokens"] == 0:
            expert, _, linear = record["name"].rpartition(".")
            linears.setdefault(expert, []).append(linear)
    return [(expert, ", ".join(own)) for expert, own in linears.items()]


def _fragile_rows(records: Sequence[JSON]) -> Rows:
    """Linears that were coded again with more bits, because their loss was too large."""
    return [
        (
            r["name"],
            f"{r['fragile']['proxy_loss']:.4g}",
            f"{r['proxy_loss']:.4g}",
            f"{r['bits_per_weight']:.3f}",
        )
        for r in records
        if "fragile" in r
    ]


def _allocated_rows(records: Sequence[JSON]) -> Rows:
    """What a budget of bits chose: the linears that got as many bits of codes a weight."""
    by_bits: dict[str, list[JSON]] = {}
    for record in records:
        if "expected_kl" in record:
            bits = record["bits_codes"] / (record["rows"] * record["cols"])
            by_bits.setdefault(f"{bits:.3f}", []).append(record)
    return [
        (
            bits,
            str(len(group)),
            f"{100 * _numel(group) / _numel(records):.1f} %",
            ", ".join(_kinds(group)),
            f"{sum(r['expected_kl'] for r in group):.3g}",
        )
        for bits, group in sorted(by_bits.items(), key=lambda item: float(item[0]))
    ]


def _idle_rows(records: Sequence[JSON]) -> Rows:
    """Linears without an expected loss, which get the cheapest codec of a budget."""
    return [
        (record["name"], f"{record['bits_codes'] / (record['rows'] * record['cols']):.3f}")
        for record in records
        if record.get("expected_kl") == 0
    ]


def _trained_rows(records: Sequence[JSON]) -> Rows:
    """There is one training after the rounding of an input group: one row for all its linears."""
    trained: dict[tuple[int, str], JSON] = {}
    for record in records:
        if "training" in record:
            group = ", ".join(name.rsplit(".", 1)[-1] for name in record["group"])
            trained[record["layer"], group] = record["training"]
    return [
        (str(layer), group, *_training_cells(training))
        for (layer, group), training in trained.items()
    ]


TRAINING = ("before", "after", "best step", "times not finite")


def _training_cells(training: JSON) -> tuple[str, ...]:
    """The cells of the columns `TRAINING`, from the record of the training of a layer or group."""
    errors = f"{training['before']:.4g}", f"{training['after']:.4g}"
    return (*errors, str(training["best_step"]), str(training["faults"] or ""))


def _tuned(stages: Sequence[JSON]) -> list[str]:
    """The course of every stage of a tuning."""
    lines = []
    for stage in stages:
        # A stage tunes each linear by itself, or layers, or the whole model.
        if "linears" in stage:
            rows = [
                (own["name"], f"{own['before']:.4g}", f"{own['after']:.4g}")
                for own in stage["linears"]
            ]
            title = f"Tuning: {stage['stage']}, proxy loss"
            lines += _section(title, ("linear", "before", "after"), rows)
            continue
        if "layers" in stage:
            rows = [(str(own["layer"]), *_training_cells(own)) for own in stage["layers"]]
            title = f"Tuning: {stage['stage']}, held-out error of each layer's output"
            lines += _section(title, ("layer", *TRAINING), rows)
            continue
        rows = [
            (
                str(look["step"]),
                "" if look["train_kl"] is None else f"{look['train_kl']:.4f}",
                f"{look['held_out_kl']:.4f}",
            )
            for look in stage["history"]
        ]
        title = f"Tuning: {stage['stage']}, best after {stage['best_step']} steps"
        lines += _section(title, ("step", "KL of the last batches", "held-out KL"), rows)
        # Rounds in which the stage also changed codes, with the KL divergence before and after.
        if moved := [own for own in stage.get("rounds", []) if own["moved"]]:
            rows = [
                (str(own["step"]), str(own["moved"]), *(f"{kl:.4f}" for kl in own["kl"]))
                for own in moved
            ]
            title = f"Codes that moved, in {len(moved)} of {len(stage['rounds'])} rounds"
            lines += _section(title, ("step", "tiles", "KL before", "KL after"), rows)
        if stage["faults"]:
            lines += [f"Not finite, and back with half the rates: {stage['faults']} times.", ""]
    return lines


def _numel(records: Sequence[JSON]) -> int:
    return sum(record["rows"] * record["cols"] for record in records)


def _kinds(records: Sequence[JSON]) -> list[str]:
    """How many linears of each kind: "12 v_proj"."""
    counts = Counter(record["name"].rsplit(".", 1)[-1] for record in records)
    return [f"{number} {kind}" for kind, number in counts.most_common()]


def _section(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table under its title; nothing if it has no rows."""
    return [f"## {title}", "", markdown_table(head, rows)] if rows else []


def _card(summary: Summary, recipe_yaml: str) -> str:
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            # The hub accepts nothing but ids of its own here.
            *([f"base_model: {summary.hub_id}"] if summary.hub_id else []),
            "tags: [vqllm, quantized]",
            "---",
            "",
            f"# {_in_line(Path(summary.model).name)}, quantized with vqllm ({summary.recipe})",
            "",
            "```python",
            "import vqllm  # registers the format with transformers",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({_python(summary.output.name)})",
            f"tokenizer = AutoTokenizer.from_pretrained({_python(summary.output.name)})",
            "```",
            "",
            markdown_table(("", ""), summary.lasting_rows()),
            "Made with",
            "",
            "    " + _in_line(summary.command),
            "",
            f"```yaml\n{recipe_yaml}```",
            "",
            f"Every linear's line is in `{JSONL}`, the page about the run in `{PAGE}`.",
            "",
        ]
    )


def _python(name: str) -> str:
    """A name as Python text on one line."""
    return json.dumps(name, ensure_ascii=not name.isprintable())


def _in_line(name: str) -> str:
    """A name that a heading can have: on one line."""
    return " ".join(name.split())


def _bits_per_weight(records: Sequence[JSON]) -> float:
    bits = sum(r["bits_codes"] + r["bits_codebook"] + r["bits_side"] for r in records)
    return bits / sum(record["rows"] * record["cols"] for record in records)


def _mean_entropy(records: Sequence[JSON]) -> float:
    """Bits a weight that lossless coding of the codes, symbol by symbol, would leave."""
    numel = [record["rows"] * record["cols"] for record in records]
    return sum(r["code_entropy"] * n for r, n in zip(records, numel)) / sum(numel)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
