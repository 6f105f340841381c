"""Quantize with each recipe, measure, and write the end-to-end tables of the pages.

    python eval/results_table.py --data FOLDER --work FOLDER [--model demo] [--recipes NAME ...]

FOLDER of the data holds calibration/c4.txt and calibration/wiki.txt (what Hessians are measured
on) and wikitext-2-raw/wiki.test.raw (the first 24 windows of 2048 tokens are evaluated). Results
go to eval/results/<model>.json; runs that stand there for the same recipe are not repeated. The
tables between the markers of README.md, docs/codecs.md, docs/appendix_codecs.md and
docs/choosing.md are rewritten. `--rows-only` writes them anew from the kept results.
"""

import argparse
import json
import logging
import os
import platform
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from choices import TUNED, choices
from markers import rewrite

from vqllm import api, recipes
from vqllm.core.protocols import JSON

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ("c4.txt", "wiki.txt")
WINDOWS = 24

README_ROWS = (
    *("spread-1.5bit", "trellis-2bit-fast", "spread-2bit", "spread-2.5bit"),
    *("trellis-3bit-fast", "spread-3bit", "small", "spread-4bit"),
)
"""What README.md shows."""

PAGE_ROWS = (
    *("spread-2bit", "trellis-2bit", "leech-2bit", "e8p-2bit", "jlcm-2bit"),
    *("aqlm-2bit", "pyramid-2bit", "kmeans-2bit", "d4-2bit", "gptvq-2bit"),
)
"""What docs/codecs.md shows: one recipe for each codec. Its appendix has every recipe."""

CLAIMS = {
    "trellis-2bit-best": "QTIP: Llama-2-7B 6.82 (3INST), 7.05 (1MAD), fp16 5.12; QuIP# 8.22",
    "trellis-3bit-best": "QTIP: Llama-2-7B 5.38 (1MAD); QuIP# 5.60",
    "e8p-2bit": "QuIP#: Llama-2-7B 8.22, fp16 5.12",
    "e8p-3bit": "QuIP#: Llama-2-7B 5.60",
    "gptvq-2bit": "GPTVQ at 2.25 bits: Llama-2-7B 6.71, fp16 5.12",
    "gptvq-3bit": "GPTVQ at 3.125 bits: Llama-2-7B 5.44",
    "vptq-2bit": "VPTQ at 2.02 bits: Llama-2-13B 6.29, fp16 4.57; QuIP# 6.06",
    "aqlm-2bit": "AQLM at 2.02 bits, tuned by block: Llama-2-7B 6.64",
    "llvq-2bit": "LLVQ: Qwen3-4B 17.05, fp16 12.41; QTIP 17.04, QuIP# 21.15",
    "leech-2bit": "LLVQ with gains: Qwen3-4B 15.54, fp16 12.41",
    "glvq-2bit": "GLVQ, lattice trained: Llama-2-7B 5.69 (d 8), 5.41 (d 32); no code published",
    "pyramid-3bit": "PVQ at 3.25 bits: Llama-3-70B keeps 98 % of its accuracy",
    "convolutional-2bit": "CCQ: ERNIE-4.5-300B IFEval 85.95, 4 bits 88.17",
}
"""Published figures of the nearest recipe, without end-to-end tuning, beside what we measure."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("VQLLM_DATA"))
    parser.add_argument("--work", type=Path, default="work", help="folder for the checkpoints")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--recipes", nargs="*", default=list(recipes.available()))
    parser.add_argument("--rows-only", action="store_true")
    arguments = parser.parse_args()
    if arguments.data is None and not arguments.rows_only:
        parser.error("pass --data or set VQLLM_DATA")

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("vqllm").setLevel(logging.INFO)
    results_file = ROOT / "eval" / "results" / f"{Path(arguments.model).name}.json"
    results = json.loads(results_file.read_text()) if results_file.is_file() else {}
    for name in () if arguments.rows_only else arguments.recipes:
        wanted = recipes.load(name).to_dict()
        wanted["calibration"]["source"] = list(TEXTS)
        if name in results and settings_of(results[name]["recipe"]) == settings_of(wanted):
            continue
        results[name] = measure(arguments.model, name, arguments.data, arguments.work) | {
            "recipe": wanted
        }
        results_file.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    write_tables(results)


def write_tables(results: JSON) -> None:
    """Rewrite the tables of all pages."""
    docs = ROOT / "docs"
    rewrite(ROOT / "README.md", "results", table(_some(results, README_ROWS)))
    rewrite(docs / "codecs.md", "results", long_table(_some(results, PAGE_ROWS)))
    rewrite(docs / "appendix_codecs.md", "results", long_table(results))
    rewrite(docs / "choosing.md", "results", choices(results, json.loads(TUNED.read_text())))


def _some(results: JSON, names: tuple[str, ...]) -> JSON:
    return {name: results[name] for name in names if name in results}


def settings_of(recipe: JSON) -> JSON:
    """All of a recipe but its words, with the defaults of keys that came after it was measured."""
    values = recipes.from_dict(recipe, recipe["name"]).to_dict()
    return {key: value for key, value in values.items() if key not in ("name", "description")}


def measure(model: str, recipe: str, data: Path, work: Path) -> JSON:
    """Quantize and evaluate once."""
    calibration = [str(data / "calibration" / name) for name in TEXTS]
    summary = api.quantize(
        model,
        work / recipe,
        recipe=recipe,
        calibration=calibration,
        eval_text=data / "wikitext-2-raw" / "wiki.test.raw",
        eval_windows=WINDOWS,
        device="cpu",
    )
    assert summary.evaluation is not None
    lines = (work / recipe / "report.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {
        "bits_per_weight": summary.bits_per_weight,
        "bytes": summary.bytes_after,
        "evaluation": {k: v for k, v in summary.evaluation.items() if k != "text"},
        "seconds": {k: round(v) for k, v in summary.seconds.items()},
        "mweights": sum(r["rows"] * r["cols"] for r in records) / 1e6,
        "code_entropy": entropy(records),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    }


def table(results: JSON) -> str:
    """Markdown with some recipes, as `order` says."""
    lines = [
        "| recipe | bits per weight: codes / linears / file | file | perplexity | ratio | KL | "
        "top-1 | minutes of one core |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in sorted(results.items(), key=order):
        measured = row["evaluation"]
        perplexity, base = measured["perplexity"], measured["baseline_perplexity"]
        lines.append(
            f"| {name} | {' / '.join(f'{value:.2f}' for value in bits(row))} "
            f"| {row['bytes'] / 1e6:.1f} MB | {perplexity:.2f} | {perplexity / base:.3f} "
            f"| {measured['kl']:.3f} | {100 * measured['top1']:.1f} % "
            f"| {row['seconds']['quantization'] / 60:.0f} |"
        )
    return "\n".join(lines) + "\n"


def order(named: tuple[str, JSON]) -> tuple[float, float]:
    """By rate to the nearest half bit, then by KL."""
    _, row = named
    return round(2 * bits(row)[1]), row["evaluation"]["kl"]


def bits(row: JSON) -> tuple[float, float, float]:
    """Bits a weight: codes only, all of the linears, the whole file."""
    by_name = row["bits_per_weight"]  # in the file its keys are sorted
    codes, linears, file = (
        next(value for key, value in by_name.items() if word in key)
        for word in ("codes", "linear", "whole")
    )
    return codes, linears, file


def entropy(records: list[JSON]) -> float:
    """Bits a weight that lossless coding of the codes would leave."""
    sizes = [record["rows"] * record["cols"] for record in records]
    return sum(r["code_entropy"] * n for r, n in zip(records, sizes)) / sum(sizes)


def long_table(results: JSON) -> str:
    """Markdown with a row for every recipe, as `order` says."""
    lines = [
        "| recipe | codes | linears | entropy of codes | ratio | KL | top-1 | s per 10⁶ weights | "
        "published |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in sorted(results.items(), key=order):
        measured, (codes, linears, _) = row["evaluation"], bits(row)
        ratio = measured["perplexity"] / measured["baseline_perplexity"]
        seconds = row["seconds"]["quantization"] / row["mweights"]
        lines.append(
            f"| {name} | {codes:.3f} | {linears:.3f} | {row['code_entropy']:.3f} | {ratio:.3f} "
            f"| {measured['kl']:.3f} | {100 * measured['top1']:.1f} % | {seconds:.2f} "
            f"| {CLAIMS.get(name, '')} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
