"""What training of layers and tuning bring: a table in docs/tuning.md and eval/results/tuning.json.

    python eval/tuning_table.py --data FOLDER --work FOLDER [--model demo] [--rows NAME ...]

Each row is a recipe with the keys `layer` and `tune`, in its two parts: the linears are rounded,
with each layer trained on the way, and the result is tuned. Both are calibrated on
calibration/c4.txt of the data alone, and measured on the first 24 windows of 2048 tokens of
wikitext-2-raw/wiki.test.raw. Interrupted runs go on; finished ones in the work folder are not
repeated. The table between the markers of the page is rewritten with all rows that were measured.
"""

import argparse
import json
import logging
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from markers import rewrite

from vqllm import api, recipes
from vqllm.core.protocols import JSON
from vqllm.recipes import Recipe
from vqllm.report.summary import LINEARS, Summary

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "eval" / "results" / "tuning.json"
WINDOWS = 24

ROWS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "tuned-2bit": ("tuned-2bit", ()),
    "tuned-2bit at 2.09 bits": ("tuned-2bit", ("allocation.bits=2.09",)),
    "tuned-3bit": ("tuned-3bit", ()),
}
"""A recipe and what is changed in it, by the name of the row."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("VQLLM_DATA"))
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("pass --data or set VQLLM_DATA")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("vqllm").setLevel(logging.INFO)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in arguments.rows:
        recipe, changes = ROWS[name]
        wanted = recipes.load(recipe, changes)
        results[name] = measure(arguments.model, name, wanted, arguments)
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    rewrite(ROOT / "docs" / "tuning.md", "results", table(results))


def measure(model: str, name: str, recipe: Recipe, arguments: argparse.Namespace) -> JSON:
    """Both parts of a recipe, measured."""
    folder = arguments.work / name.replace(" ", "-")
    tuned = folder.with_name(f"{folder.name}-tuned")
    common: dict[str, Any] = {
        "calibration": arguments.data / "calibration" / "c4.txt",
        "eval_text": arguments.data / "wikitext-2-raw" / "wiki.test.raw",
        "eval_windows": WINDOWS,
        "device": "cpu",
    }
    return {
        "rounded": once(
            folder,
            recipe,
            lambda: api.quantize(model, folder, recipe=recipe.rounding_only(), **common),
        ),
        "tuned": once(
            tuned,
            recipe,
            lambda: api.tune(folder, tuned, recipe=recipe.tuning_only(), teacher=model, **common),
        ),
        "recipe": recipe.to_dict(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    }


def once(folder: Path, recipe: Recipe, run: Callable[[], Summary | None]) -> JSON:
    """What is told of a run, kept beside its folder together with the recipe."""
    file = folder.with_name(f"{folder.name}.json")
    kept = json.loads(file.read_text()) if file.is_file() else {}
    if kept.get("recipe") != recipe.to_dict():
        summary = run()
        assert summary is not None
        assert summary.evaluation is not None
        told = {
            "bits_per_weight": summary.bits_per_weight,
            "bytes": summary.bytes_after,
            "evaluation": {k: v for k, v in summary.evaluation.items() if k != "text"},
            "stages": summary.tuning,
            "seconds": {k: round(v) for k, v in summary.seconds.items()},
        }
        kept = {"recipe": recipe.to_dict(), "told": told}
        file.write_text(json.dumps(kept, sort_keys=True))
    return kept["told"]


def table(results: JSON) -> str:
    """Markdown with two lines for each row; minutes are those of a clock."""
    lines = [
        "| | bits of linears | file | ratio | KL | top-1 | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in sorted(results.items()):
        for part, called in (("rounded", f"{name}: layers trained"), ("tuned", "and end to end")):
            told = row[part]
            measured = told["evaluation"]
            ratio = measured["perplexity"] / measured["baseline_perplexity"]
            seconds = told["seconds"]["quantization" if part == "rounded" else "tuning"]
            lines.append(
                f"| {called} | {told['bits_per_weight'][LINEARS]:.2f} "
                f"| {told['bytes'] / 1e6:.1f} MB | {ratio:.3f} | {measured['kl']:.3f} "
                f"| {100 * measured['top1']:.1f} % | {seconds / 60:.0f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
