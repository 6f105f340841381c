"""Compare plans with the runs that they are of, and write the tables of docs/plan.md.

    python eval/plan_check.py --data FOLDER --work FOLDER --model demo --model moe=FOLDER ...

FOLDER of the data holds calibration/c4.txt and calibration/wiki.txt (calibration) and
wikitext-2-raw/wiki.test.raw (the first windows are evaluated). A model is `demo` or NAME=FOLDER;
`eval/train_tiny_moe.py` makes small ones that have learned something. Every plan and every run is
a process of its own, so that its peak of memory is its own. Rows are kept in
eval/results/plan.json as they come; what stands there is not repeated. `--only TEXT` takes the
cases whose options have it, `--rows-only` writes the tables from the kept rows.

Times hold where nothing else runs on the machine.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from markers import rewrite

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "eval/results/plan.json"
PAGE = ROOT / "docs/plan.md"
RECIPES = ("trellis-3bit-fast", "spread-2bit", "spread-3.5bit", "small", "e8p-2bit", "gptq-4bit")
CASES = [("--recipe", recipe) for recipe in RECIPES]
TARGETS = {
    "demo": [
        *(("--bits", bits) for bits in ("1.25", "2.3", "4.6")),
        *(("--size", size) for size in ("40MB", "60MB", "100MB")),
        *(("--kl", kl) for kl in ("0.05", "0.1", "0.5")),
    ]
}
"""Beside the recipes. Other models get `OTHER_TARGETS`."""
OTHER_TARGETS = [("--bits", "2.3"), ("--kl", "0.05"), ("--kl", "0.2")]
WINDOWS = {"demo": 24}
OTHER_WINDOWS = 8

CHILD = """
import dataclasses, json, sys
from vqllm import api
target, options = sys.argv[1], json.loads(sys.argv[2])
model = options.pop("model")
if target == "plan":
    made = api.plan(model, **options).to_dict()
    keys = ("bytes_after", "file_bytes", "kl", "seconds", "memory", "peak_memory_bytes")
else:
    made = dataclasses.asdict(api.quantize(model, target, **options))
    keys = ("bytes_after", "evaluation", "seconds", "peak_memory_bytes", "bits_per_weight")
print(json.dumps({key: made[key] for key in keys}, default=str))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--only", default="")
    parser.add_argument("--rows-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.rows_only:
        if not arguments.data or not arguments.work:
            parser.error("--data and --work are needed")
        for model in arguments.model or ["demo"]:
            name, _, folder = model.partition("=")
            for case in [*CASES, *TARGETS.get(name, OTHER_TARGETS)]:
                if arguments.only in " ".join(case):
                    check(name, folder or name, case, arguments.data, arguments.work)
    write(kept())


def kept() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def check(name: str, model: str, case: tuple[str, str], data: Path, work: Path) -> None:
    """A row: the plan, then the run, each unless it stands there."""
    label = f"{name} {' '.join(case)}"
    option, value = case[0].removeprefix("--"), case[1]
    options = {
        "model": model,
        option: float(value) if option in ("bits", "kl") else value,
        "calibration": [str(data / "calibration" / text) for text in ("c4.txt", "wiki.txt")],
        "eval_text": str(data / "wikitext-2-raw/wiki.test.raw"),
        "eval_windows": WINDOWS.get(name, OTHER_WINDOWS),
        "device": "cpu",
    }
    output = work / label.replace(" --", "-").replace(" ", "-")
    for part, target in (("plan", "plan"), ("run", str(output))):
        if part in kept().get(label, {}):
            continue
        print(f"{label}: {part}", flush=True)
        done = subprocess.run(
            [sys.executable, "-c", CHILD, target, json.dumps(options)],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            print(f"{label}: {part} failed", flush=True)
            return
        rows = kept()
        found = json.loads(done.stdout.splitlines()[-1])
        if part == "run":
            files = sum(path.stat().st_size for path in output.glob("*.safetensors"))
            found |= {
                "file_bytes": files,
                "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            }
            shutil.rmtree(output)
        rows.setdefault(label, {})[part] = found
        RESULTS.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")


def write(rows: dict) -> None:
    """The two tables."""
    whole = {label: row for label, row in rows.items() if {"plan", "run"} <= row.keys()}
    lines = [
        "| model, options | size, MB | KL | seconds | peak, MB |",
        "|---|---|---|---|---|",
    ]
    for label, row in whole.items():
        plan, run = row["plan"], row["run"]
        pairs = [
            (plan["bytes_after"] / 1e6, run["bytes_after"] / 1e6, "{:.2f}"),
            (plan["kl"] and plan["kl"]["value"], run["evaluation"]["kl"], "{:.4f}"),
            (sum(plan["seconds"].values()), sum(run["seconds"].values()), "{:.0f}"),
            (plan["peak_memory_bytes"] / 1e6, run["peak_memory_bytes"] / 1e6, "{:.0f}"),
        ]
        lines.append(f"| {label.replace(' --recipe', ',')} | {' | '.join(map(pair, pairs))} |")
    rewrite(PAGE, "plans", "\n".join(lines) + "\n")
    lines = ["| model, target | got | off |", "|---|---|---|"]
    for label, row in whole.items():
        if " --recipe" in label:
            continue
        name, option, value = label.rsplit(" ", 2)
        got = {
            "--bits": row["run"]["bits_per_weight"]["all of a quantized linear"],
            "--size": row["run"]["file_bytes"] / 1e6,
            "--kl": row["run"]["evaluation"]["kl"],
        }[option]
        off = 100 * (got / float(value.removesuffix("MB")) - 1)
        lines.append(f"| {name} {option} {value} | {got:.4g} | {off:+.1f} % |")
    rewrite(PAGE, "targets", "\n".join(lines) + "\n")


def pair(values: tuple) -> str:
    """What was planned, what came, and how far it is off."""
    planned, came, form = values
    if planned is None:
        return f"- / {form.format(came)}"
    off = 100 * (planned / came - 1)
    return f"{form.format(planned)} / {form.format(came)} ({off:+.0f} %)"


if __name__ == "__main__":
    main()
