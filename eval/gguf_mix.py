"""GGUF files of mixed types in stock llama.cpp, ours beside llama-quantize's own mixes:

    python eval/gguf_mix.py BIN CONVERTER CALIBRATION TEXT [--mixes Q2_K] [--sizes 85506080] ...

The first four arguments are those of gguf_check.py, whose figures these are. --mixes are files of
llama-quantize with the imatrix and its own choice of types, --sizes files of ours. Ours mix types
that do not hold the demo model's weights exactly: these come from Q4_1, which is therefore left
out, as are Q4_K, Q5_K and Q5_1. Keeps results/gguf_mix.json and writes the table of docs/gguf.md.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import gguf_check
from markers import rewrite

from vqllm import api

RESULTS = gguf_check.ROOT / "eval/results/gguf_mix.json"
TYPES = "Q2_K,Q3_K,IQ4_XS,IQ4_NL,Q4_0,Q5_0,Q6_K,Q8_0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("bin", "converter", "calibration", "text"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--mixes", nargs="*", default=["Q2_K", "IQ2_M", "Q3_K_M"])
    parser.add_argument("--sizes", nargs="*", type=int, default=[85506080])
    parser.add_argument("--work", type=Path, help="an existing folder that stays")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=128, help="of 128 tokens")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.work) as made:
        base, file = given.work or Path(made), Path(made) / "new.gguf"
        gguf_check.prepare(given, base)
        dense, imatrix, logits = (base / own for own in gguf_check.BASE)
        for name in given.mixes:
            whole = dense, file, name, str(given.threads)
            gguf_check.run(given.bin / "llama-quantize", "--imatrix", imatrix, *whole)
            keep({"file": f"llama-quantize {name}", **gguf_check.measured(given, file, logits)})
            file.unlink()
        for size in given.sizes:
            options: dict[str, Any] = {"calibration": given.calibration}
            options["sequences"] = given.sequences
            api.export_gguf("demo", file, mix=TYPES, size=size, **options)
            keep({"file": f"vqllm --size {size}", **gguf_check.measured(given, file, logits)})
            file.unlink()
    write_table()


def keep(row: dict[str, Any]) -> None:
    """Store a row in place of that of the same file."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = [own for own in rows if own["file"] != row["file"]] + [row]
    rows.sort(key=lambda own: own["bytes"])
    RESULTS.write_text(json.dumps(rows, indent=2) + "\n")


def write_table() -> None:
    """The table of the page: mixed files, and those of one type that gguf_check.py keeps."""
    rows = json.loads(RESULTS.read_text())
    for plain in json.loads(gguf_check.RESULTS.read_text())["rows"]:
        if plain["type"] in ("Q2_K", "Q4_0"):
            rows.append({"file": f"vqllm --type {plain['type']}", **plain["vqllm"]})
    lines = ["| MB | file | perplexity | KL |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda own: own["bytes"]):
        size, figures = f"{row['bytes'] / 1e6:.1f}", f"{row['perplexity']:.2f} | {row['kl']:.3f}"
        lines.append(f"| {size} | {row['file']} | {figures} |")
    rewrite(gguf_check.PAGE, "gguf-mix", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
