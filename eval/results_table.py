"""The results table of README.md: quantize with each recipe, measure, write the table.

    python eval/results_table.py --data FOLDER --work FOLDER [--model demo] [--recipes NAME ...]

FOLDER of the data holds calibration/c4.txt and calibration/wiki.txt (what Hessians are measured
on) and wikitext-2-raw/wiki.test.raw (the first 24 windows of 2048 tokens are evaluated). Results
go to eval/results/<model>.json; runs that stand there for the same recipe are not repeated. The
table between the markers of README.md is rewritten.
"""

import argparse
import json
import logging
import os
import platform
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from vqllm import api
from vqllm import recipe as recipes
from vqllm.types import JSON

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->\n"
TEXTS = ("c4.txt", "wiki.txt")
WINDOWS = 24
CHANGES = ("calibration.sequences=128", "calibration.length=512")
"""The lengths that published tables use; the recipes' own, shorter, are better."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("VQLLM_DATA"))
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--recipes", nargs="*", default=list(recipes.available()))
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("pass --data or set VQLLM_DATA")

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("vqllm").setLevel(logging.INFO)
    results_file = ROOT / "eval" / "results" / f"{Path(arguments.model).name}.json"
    results = json.loads(results_file.read_text()) if results_file.is_file() else {}
    for name in arguments.recipes:
        wanted = recipes.load(name, CHANGES).to_dict()
        wanted["calibration"]["source"] = list(TEXTS)
        if results.get(name, {}).get("recipe") == wanted:
            continue
        results[name] = measure(arguments.model, name, arguments.data, arguments.work) | {
            "recipe": wanted
        }
        results_file.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(before + BEGIN + table(results) + END + after)


def measure(model: str, recipe: str, data: Path, work: Path) -> JSON:
    """Quantize and evaluate once."""
    calibration = [str(data / "calibration" / name) for name in TEXTS]
    summary = api.quantize(
        model,
        work / recipe,
        recipe=recipe,
        changes=CHANGES,
        calibration=calibration,
        eval_text=data / "wikitext-2-raw" / "wiki.test.raw",
        eval_windows=WINDOWS,
        device="cpu",
    )
    assert summary.evaluation is not None
    return {
        "bits_per_weight": summary.bits_per_weight,
        "bytes": summary.bytes_after,
        "evaluation": {k: v for k, v in summary.evaluation.items() if k != "text"},
        "seconds": {k: round(v) for k, v in summary.seconds.items()},
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    }


def table(results: JSON) -> str:
    """Markdown, sorted by bits."""
    lines = [
        "| recipe | bits per weight: codes / linears / file | file | perplexity | ratio | KL | "
        "top-1 |",
        "|---|---|---|---|---|---|---|",
    ]

    def bits(name: str) -> list[float]:
        return list(results[name]["bits_per_weight"].values())

    for name in sorted(results, key=lambda name: (bits(name)[1], name)):
        row = results[name]
        measured = row["evaluation"]
        perplexity, base = measured["perplexity"], measured["baseline_perplexity"]
        lines.append(
            f"| {name} | {' / '.join(f'{value:.2f}' for value in bits(name))} "
            f"| {row['bytes'] / 1e6:.1f} MB | {perplexity:.2f} | {perplexity / base:.3f} "
            f"| {measured['kl']:.3f} | {100 * measured['top1']:.1f} % |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
