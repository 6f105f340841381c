"""Quantized folders in a real vLLM: `python eval/vllm_check.py ENVIRONMENT [CHECKPOINT ...]`.

Makes the environment (`vllm_environment.py`) if it is not there, quantizes a tiny Llama, checks:

    logits    of the tiny model, packed, decoded, compiled, in two processes, against transformers
    page      the commands of docs/serving.md, word for word
    speed     of each checkpoint beside the original, in turns: tokens/s, prefill; start, memory
    refusals  messages, before weights are read

`--steps` chooses some of them. Keeps results in results/serving.json and writes the tables of
docs/serving.md.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from markers import rewrite
from vllm_environment import make
from vllm_worker import SETTINGS, TOKENS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "eval/results/serving.json"
PAGE = ROOT / "docs/serving.md"
LIMIT = 1e-4
"""Of a difference of logits in float32."""

RECIPES = ("e8p-2bit", "small", "trellis-2bit-fast")
PACKED, DECODED = {"vqllm_weights": "packed"}, {"vqllm_weights": "decoded"}
TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("e8p-2bit", "decoded", {"additional_config": DECODED}),
    ("small", "packed", {"additional_config": PACKED}),
    (
        "trellis-2bit-fast",
        "packed, compiled",
        {"additional_config": PACKED, "enforce_eager": False},
    ),
    ("small", "decoded, 2 processes", {"additional_config": DECODED, **TWO}),
    ("e8p-2bit", "packed, 2 processes", {"additional_config": PACKED, **TWO}),
    (
        "trellis-2bit-fast tensor_parallel=2",
        "packed, 2 processes",
        {"additional_config": PACKED, **TWO},
    ),
)
"""Recipe and changes of it, what is done with its weights, options of vLLM. The first is the
smallest part."""
NEAREST = ("rounding.type=nearest", "calibration.sequences=4", "calibration.length=32")


class Worker:
    """A process of `vllm_worker.py`."""

    def __init__(self, python: Path, model: Path, options: dict[str, Any]) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            [python, ROOT / "eval/vllm_worker.py", model, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **SETTINGS},
        )
        self.started = self.answer()

    def ask(self, **values: object) -> Any:
        """The answer to one request."""
        assert self.process.stdin is not None
        print(json.dumps(values), file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> Any:
        """The next answer; what the process said if it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(self.log.read()[-4000:])
        return json.loads(line)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(120)


def tiny_llama(folder: Path) -> Path:
    """A random Llama with a tied head, and a tokenizer."""
    sys.path.insert(0, str(ROOT))
    from tests.support.tiny import save_tiny

    if folder.exists():
        return folder
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    return save_tiny(folder, num_key_value_heads=4, tie_word_embeddings=True, **sizes)


def quantized(source: Path, output: Path, recipe: str) -> Path:
    """A folder by nearest rounding and few calibration tokens."""
    recipe, *keys = recipe.split()
    if not (output / "config.json").exists():
        command = [sys.executable, "-m", "vqllm", "quantize", source, "--output", output]
        changes = [part for key in (*NEAREST, *keys) for part in ("--set", key)]
        subprocess.run([*command, "--recipe", recipe, "--no-eval", *changes], check=True)
    return output


def reference(model: Path) -> Any:
    """Logits of transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    import vqllm  # noqa: F401 - transformers loads quantized folders

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        return loaded(torch.tensor([TOKENS])).logits[0, :-1]


def difference(python: Path, model: Path, options: dict[str, Any], file: Path) -> float:
    """The largest difference of logits between vLLM and transformers."""
    import torch

    with Worker(python, model, {"dtype": "float32", "max_model_len": 128, **options}) as worker:
        worker.ask(logits=str(file))
    want = reference(model)
    return float((torch.load(file)[:, : want.shape[-1]] - want).abs().max())


def check_logits(python: Path, work: Path, cases: Sequence[Any] = CASES) -> list[dict[str, Any]]:
    """The table of differences; fails where one is beyond the limit."""
    source, rows = tiny_llama(work / "tiny"), []
    for recipe, weights, options in cases:
        model = quantized(source, work / f"tiny-{recipe.replace(' ', '-')}", recipe)
        worst = difference(python, model, options, work / "logits.pt")
        print(f"tiny, {recipe}, {weights}: {worst:.1e}", flush=True)
        assert worst < LIMIT, f"{recipe}, {weights}: logits differ by {worst}"
        rows.append({"checkpoint": f"tiny Llama, {recipe}", "weights": weights, "worst": worst})
    return rows


def check_page(work: Path) -> str:
    """Run the commands of the page as they stand there; returns the endpoint's answer."""
    [block] = re.findall(r"<!-- commands -->\n```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    script = block + "\nkill %1\n"
    env = {**os.environ, "REPOSITORY": str(ROOT)}
    done = subprocess.run(
        ["bash", "-emc", script], cwd=work, env=env, stdout=subprocess.PIPE, text=True
    )
    # vLLM says more behind it.
    answer, _ = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index('{"id"') :])
    return answer["choices"][0]["text"]


def measure(
    python: Path, original: Path, checkpoint: Path, rounds: int, dtype: str
) -> list[dict[str, Any]]:
    """Speed of a checkpoint, packed and decoded, and of the original, in turns."""
    models = {
        "dense original": (original, {}),
        "packed": (checkpoint, {"additional_config": PACKED}),
        "decoded": (checkpoint, {"additional_config": DECODED}),
    }
    kinds = {
        "batch 1": {"batch": 1, "prompt": 8, "new": 24},
        "batch 8": {"batch": 8, "prompt": 8, "new": 24},
        "prefill": {"batch": 1, "prompt": 512, "new": 1},
    }
    workers = {
        name: Worker(python, model, {"dtype": dtype, "enable_prefix_caching": False, **options})
        for name, (model, options) in models.items()
    }
    best: dict[tuple[str, str], float] = {}
    for turn in range(rounds + 1):  # the first one warms up
        for kind, asked in kinds.items():
            for name, worker in workers.items():
                took = worker.ask(**asked)["seconds"]
                if turn:
                    best[name, kind] = min(took, best.get((name, kind), took))
    rows = []
    for name, worker in workers.items():
        speeds = {
            kind: asked["batch"] * (asked["new"] if asked["new"] > 1 else asked["prompt"])
            for kind, asked in kinds.items()
        }
        tokens = {kind: round(count / best[name, kind], 1) for kind, count in speeds.items()}
        row = {"checkpoint": checkpoint.name, "weights": name, **tokens, **worker.started}
        print(json.dumps(row), flush=True)
        rows.append(row)
        worker.__exit__()
    return rows


def check_refusals(python: Path, work: Path) -> list[str]:
    """Messages about what cannot be served."""
    model = quantized(tiny_llama(work / "tiny"), work / "tiny-e8p-2bit", "e8p-2bit")
    changed = work / "changed"
    changed.mkdir(exist_ok=True)
    for file in model.iterdir():
        if not (changed / file.name).exists():
            (changed / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    newer = {**config, "quantization_config": {**config["quantization_config"]}}
    newer["quantization_config"]["format_version"] = 99
    wrong = (
        ({}, {"enable_lora": True}, "LoRA"),
        ({}, {"additional_config": {"vqllm_weights": "dense"}}, "allowed are auto"),
        (newer, {}, "format version 99"),
        ({**config, "architectures": ["UnheardOf"], "model_type": "llama"}, {}, "UnheardOf"),
    )
    messages = []
    for values, options, expected in wrong:
        (changed / "config.json").unlink()
        (changed / "config.json").write_text(json.dumps(values or config))
        said = what_is_said(python, changed, options)
        lines = [line for line in said.splitlines() if expected in line]
        assert lines, f"no line with {expected!r} in:\n{said}"
        messages.append(lines[-1])
        print(lines[-1], flush=True)
    return messages


def what_is_said(python: Path, model: Path, options: dict[str, Any]) -> str:
    """What a process says that does not serve."""
    try:
        with Worker(python, model, {"max_model_len": 128, **options}):
            return "it was served"
    except RuntimeError as error:
        return str(error)


def tables(results: dict[str, Any]) -> None:
    """Write the tables of the page."""
    lines = ["| checkpoint | weights | max abs difference of logits |", "|---|---|---|"]
    for row in results.get("logits", []):
        lines.append(f"| {row['checkpoint']} | {row['weights']} | {row['worst']:.0e} |")
    rewrite(PAGE, "logits", "\n".join(lines) + "\n")
    kinds = ("batch 1", "batch 8", "prefill")
    head = " | ".join(f"{kind}, tokens/s" for kind in kinds)
    lines = [f"| checkpoint | weights | {head} | start, s | resident, MB |"]
    lines.append("|---" * 7 + "|")
    for row in results.get("speed", []):
        speeds = " | ".join(str(row[kind]) for kind in kinds)
        first = f"| {row['checkpoint']} | {row['weights']} | {speeds}"
        lines.append(f"{first} | {row['start_s']} | {row['resident_mb']} |")
    text = "\n".join(lines) + "\n" if results.get("speed") else "Not measured yet.\n"
    rewrite(PAGE, "speed", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("environment", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="*")
    parser.add_argument("--original", type=Path, help="the dense model of the checkpoints")
    parser.add_argument("--work", type=Path, default=Path("serving-work"))
    parser.add_argument("--steps", default="logits,refusals,page,speed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    make(options.environment)
    options.work.mkdir(parents=True, exist_ok=True)
    python, work = options.environment.absolute() / "bin/python", options.work.absolute()
    steps = options.steps.split(",")
    if "smallest" in steps:
        check_logits(python, work, CASES[:1])
    if "logits" in steps:
        keep(logits=check_logits(python, work))
    if "refusals" in steps:
        keep(refusals=check_refusals(python, work))
    if "page" in steps:
        keep(answer=check_page(work))
    if "speed" in steps:
        for checkpoint in options.checkpoints:
            given = (options.original, checkpoint, options.rounds, options.dtype)
            rows = measure(python, *given)
            others = [r for r in kept().get("speed", []) if r["checkpoint"] != checkpoint.name]
            keep(speed=others + rows)


def kept() -> dict[str, Any]:
    """What was measured so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def keep(**found: object) -> None:
    """Add to it, and write the tables."""
    RESULTS.write_text(json.dumps({**kept(), **found}, indent=1) + "\n")
    tables(kept())


if __name__ == "__main__":
    main()
