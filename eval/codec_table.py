"""Every codec on Gaussian weights: a plot, ten rows for docs/codecs.md, all in its appendix.

    python eval/codec_table.py [--only NAME ...] [--rows-only]

Measures what `vqllm codecs --bench` measures, on one thread, keeps the rows in
eval/results/codecs.json (those of codecs that are not named stay as they are) and rewrites the
tables between the markers of docs/codecs.md and docs/appendix_codecs.md and the plot beside them.
`--rows-only` writes them anew from the kept rows.
"""

import argparse
import json
import os
import platform
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from markers import rewrite

from vqllm.codecs import CODECS
from vqllm.core.protocols import JSON
from vqllm.evaluation.codec_bench import bench
from vqllm.report.plot import plot_codecs

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "eval" / "results" / "codecs.json"
DOCS = ROOT / "docs"
PAGE, APPENDIX, PLOT = DOCS / "codecs.md", DOCS / "appendix_codecs.md", DOCS / "codecs.png"
NUM_SHORT = 10
"""Rows of the table on the page."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], choices=list(CODECS))
    parser.add_argument("--rows-only", action="store_true")
    arguments = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    if not arguments.rows_only:
        names = arguments.only or list(CODECS)
        kept = [row for row in kept if row["codec"] not in names and row["codec"] in CODECS]
        for row in bench(names):
            print(f"{row['codec']}: {row['label']}: {row['mse']:.5f} at {row['bits']:.3f} bits")
            kept.append(row | {"machine": platform.machine()})
        kept.sort(key=lambda row: (row["codec"], row["bits"], row["label"]))
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    rewrite(PAGE, "gaussian", table(best_at_two_bits(kept)))
    rewrite(APPENDIX, "gaussian", table(kept))
    PLOT.write_bytes(plot_codecs(kept))


def best_at_two_bits(rows: list[JSON]) -> list[JSON]:
    """The configuration nearest to Shannon's limit of each codec, of the codecs nearest to it."""
    best: dict[str, JSON] = {}
    for row in sorted(rows, key=lambda row: row["gap_db"]):
        if round(row["bits"], 1) == 2:
            best.setdefault(row["codec"], row)
    return list(best.values())[:NUM_SHORT]


def table(rows: list[JSON]) -> str:
    """Markdown, by rate to the nearest half bit and then by distance to Shannon's limit."""
    lines = [
        "| codec | bits | MSE | held to | source | above Shannon | encode | decode |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (round(2 * row["bits"]), row["gap_db"])):
        published = "" if row["source"] == "measured" else f"{row['expected_mse']:.4g}"
        source = "" if row["source"] == "measured" else row["source"]
        lines.append(
            f"| {row['codec']}: {row['label']} | {row['bits']:.3f} | {row['mse']:.5f} "
            f"| {published} | {source} | {row['gap_db']:.2f} dB "
            f"| {row['encode_mweights_per_s']:.3g} | {row['decode_mweights_per_s']:.3g} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
