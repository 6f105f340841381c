"""GGUF files in stock llama.cpp, ours beside llama-quantize's of the same types and size:

    python eval/gguf_check.py BIN CONVERTER CALIBRATION TEXT [--types Q4_0 Q3_K Q2_K] [--work DIR]

BIN is the folder of llama-quantize, llama-imatrix and llama-perplexity, CONVERTER llama.cpp's
convert_hf_to_gguf.py, CALIBRATION a text for our Hessians and for the imatrix, TEXT another one to
measure on. The model is the demo. Both kinds of file have the same type in every tensor: --pure,
and an embedding in Q8_0. Keeps perplexity and KL divergence in results/gguf.json, after each type
and beside the rows of other types, and writes the table of docs/gguf.md. A folder of --work keeps
the dense file, its logits and the imatrix for the next run.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from markers import rewrite

from vqllm import api
from vqllm.models import demo

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "eval/results/gguf.json"
PAGE = ROOT / "docs/gguf.md"
NAMES = {"Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S"}
"""What llama-quantize calls a file of these types."""
WINDOW = 512
BASE = ("f16.gguf", "imatrix.gguf", "logits")
"""What all types are made from and compared with."""
FIGURE = {
    "perplexity": r"Mean PPL\(Q\) +: +([\d.]+)",
    "kl": r"Mean +KLD: +([\d.]+)",
    "kl_error": r"Mean +KLD: +[\d.]+ ± +([\d.]+)",
    "same_top": r"Same top p: +([\d.]+)",
}


def run(*command: str | Path) -> str:
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    text = result.stdout + result.stderr
    if result.returncode != 0:
        raise SystemExit(f"{command[0]}: {text[-2000:]}")
    return text


def measured(given: argparse.Namespace, file: Path, base: Path) -> dict[str, Any]:
    """Perplexity and divergence of a file from what `base` holds."""
    options = ["--kl-divergence-base", base, "--kl-divergence", *options_of(given)]
    text = run(given.bin / "llama-perplexity", "-m", file, *options)
    found = {key: re.search(pattern, text) for key, pattern in FIGURE.items()}
    figures = {key: float(match[1]) for key, match in found.items() if match}
    return {"bytes": file.stat().st_size, **figures}


def options_of(given: argparse.Namespace) -> list[str | Path]:
    """Of llama-perplexity. --no-repack: without it a build for AMX stopped with an illegal
    instruction where the kernel does not allow AMX."""
    text = ["-f", given.text, "-c", str(WINDOW), "--chunks", str(given.windows)]
    return [*text, "-t", str(given.threads), "--no-repack"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("bin", "converter", "calibration", "text"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--types", nargs="+", default=["Q4_0", "Q3_K", "Q2_K"])
    parser.add_argument("--work", type=Path, help="an existing folder that stays")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=160, help="of 128 tokens, for both")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.work) as made:
        base = given.work or Path(made)
        prepare(given, base)
        for name in given.types:
            keep(given, compared(given, name, base, Path(made)))
            write_table()


def prepare(given: argparse.Namespace, base: Path) -> None:
    """Put the dense file, the imatrix and the logits into `base`, as far as they are missing."""
    dense, imatrix, logits = (base / name for name in BASE)
    if not dense.exists():
        options = ["--outfile", dense, "--outtype", "f16"]
        run(sys.executable, given.converter, demo.demo_folder(), *options)
    if not imatrix.exists():
        chunks = ["-c", str(WINDOW), "--chunks", str(given.sequences * 128 // WINDOW)]
        calibration = ["-f", given.calibration, "-o", imatrix, "-t", str(given.threads)]
        run(given.bin / "llama-imatrix", "-m", dense, *calibration, *chunks, "--no-repack")
    if not logits.exists():
        saved = ["--save-all-logits", logits, *options_of(given)]
        run(given.bin / "llama-perplexity", "-m", dense, *saved)


def compared(given: argparse.Namespace, name: str, base: Path, made: Path) -> dict[str, Any]:
    """A row of the table: both files of a type, made in `made` and measured."""
    dense, imatrix, logits = (base / own for own in BASE)
    theirs, ours = made / f"theirs-{name}.gguf", made / f"ours-{name}.gguf"
    as_ours = ["--imatrix", imatrix, "--pure", "--token-embedding-type", "q8_0"]
    # The last word is the number of threads.
    whole = NAMES.get(name, name), str(given.threads)
    run(given.bin / "llama-quantize", *as_ours, dense, theirs, *whole)
    row = {"type": name, "llama-quantize": measured(given, theirs, logits)}
    theirs.unlink()
    options: dict[str, Any] = {"calibration": given.calibration, "sequences": given.sequences}
    api.export_gguf("demo", ours, type=name, **options)
    row["vqllm"] = {**measured(given, ours, logits), "sequences": given.sequences}
    ours.unlink()
    return row


def keep(given: argparse.Namespace, row: dict[str, Any]) -> None:
    """Store a row in place of that of the same type."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    rows = [own for own in kept["rows"] if own["type"] != row["type"]] + [row]
    rows.sort(key=lambda own: -own["vqllm"]["bytes"])
    RESULTS.write_text(json.dumps({"windows": given.windows, "rows": rows}, indent=2) + "\n")


def write_table() -> None:
    """The table of the page, from what is kept."""
    lines = ["| type | MB | llama-quantize, imatrix | vqllm | KL |", "|---|---|---|---|---|"]
    for row in json.loads(RESULTS.read_text())["rows"]:
        ours, theirs = row["vqllm"], row["llama-quantize"]
        cells = [f"{own['perplexity']:.2f} / {own['kl']:.3f}" for own in (theirs, ours)]
        change = f"{100 * (ours['kl'] / theirs['kl'] - 1):+.0f} %".replace("-", "−")
        size = f"{ours['bytes'] / 1e6:.1f}"
        lines.append(f"| {' | '.join([row['type'], size, *cells, change])} |")
    rewrite(PAGE, "gguf", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
