"""Quantized folders in a real vLLM: `python eval/vllm_check.py ENVIRONMENT [CHECKPOINT ...]`.

Makes the environment (`vllm_environment.py`) if it is not there, and checks:

    logits    of the tiny models of `vllm_cases.py` against transformers
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
from vllm_cases import CASES, DECODED, EVERY, PACKED, ROOT, SMALLEST, TWO, Case, changed
from vllm_environment import make
from vllm_worker import SETTINGS, TOKENS

RESULTS = ROOT / "eval/results/serving.json"
PAGE = ROOT / "docs/serving.md"


class Worker:
    """A process of `vllm_worker.py`."""

    def __init__(self, python: Path) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            [python, ROOT / "eval/vllm_worker.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **SETTINGS},
        )

    def ask(self, **values: object) -> dict[str, Any]:
        """The answer to one request; what the process said if it has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(values), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(self.said())
        return json.loads(line)

    def open(self, model: Path, options: dict[str, Any]) -> dict[str, Any]:
        """Put a model in place of the one before it. Returns start_s and resident_mb."""
        answer = self.ask(open=str(model), options=options)
        if "refused" in answer:
            raise RuntimeError(self.said())
        return answer

    def said(self, limit: int = 8000) -> str:
        """The end of what the process has printed."""
        self.log.seek(0)
        return self.log.read()[-limit:]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(120)


def reference(model: Path) -> Any:
    """Logits of transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    import vqllm  # noqa: F401 - transformers loads quantized folders

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        return loaded(torch.tensor([TOKENS])).logits[0]


def difference(worker: Worker, case: Case, work: Path) -> float:
    """The largest difference of logits between vLLM and transformers."""
    import torch

    model, file = case.made(work), work / "logits.pt"
    worker.open(model, case.all_options)
    cached = worker.ask(logits=str(file))["cached"] or 0
    assert cached >= case.cached, f"{cached} of {case.cached} tokens were cached"
    want = reference(model)
    return float((torch.load(file)[:, : want.shape[-1]] - want).abs().max())


def check_logits(python: Path, work: Path, cases: Sequence[Case] = CASES) -> list[dict[str, Any]]:
    """The table of differences; fails where one is beyond its limit."""
    rows, worker = [], Worker(python)
    for case in cases:
        if case.alone:
            worker.close()
            worker = Worker(python)
        worst = difference(worker, case, work)
        print(f"{case.title}; {case.weights}: {worst:.1e}", flush=True)
        assert worst < case.limit, f"{case.title}, {case.weights}: logits differ by {worst}"
        rows.append({"checkpoint": case.title, "weights": case.weights, "worst": worst})
    worker.close()
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
    workers = {name: Worker(python) for name in models}
    started = {
        name: workers[name].open(model, {"dtype": dtype, "enable_prefix_caching": False, **options})
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
        row = {"checkpoint": checkpoint.name, "weights": name, **tokens, **started[name]}
        print(json.dumps(row), flush=True)
        rows.append(row)
        worker.close()
    return rows


def check_refusals(python: Path, work: Path) -> list[str]:
    """Messages about what cannot be served."""
    model = CASES[0].made(work)
    config = json.loads((model / "config.json").read_text())
    newer = {**config, "quantization_config": {**config["quantization_config"]}}
    newer["quantization_config"]["format_version"] = 99
    unheard = {**config, "architectures": ["UnheardOf"], "model_type": "llama"}
    wrong: tuple[tuple[dict[str, Any], dict[str, Any], str], ...] = (
        (config, {"enable_lora": True}, "started with LoRA"),
        (config, {"additional_config": {"vqllm_weights": "dense"}}, "allowed are auto"),
        (newer, {}, "format version 99"),
        (unheard, {}, "Model architectures ['UnheardOf'] are not supported"),
    )
    messages, worker = [], Worker(python)
    for values, options, expected in wrong:
        folder = changed(model, work / "changed", values)
        answer = worker.ask(open=str(folder), options={"max_model_len": 128, **options})
        message = answer.get("refused", "it was served")
        assert expected in message, f"{expected!r} is not in:\n{message}"
        messages.append(message[:400])
        print(message[:400], flush=True)
    # Tiles of 3 rows. vLLM prints what a process says and then that it could not be started.
    undivided = next(case for case in CASES if case.checkpoint == EVERY)
    options = {**undivided.all_options, **TWO}
    assert "refused" in worker.ask(open=str(undivided.made(work)), options=options)
    lines = worker.said(1 << 20).splitlines()
    messages.append(next(line for line in lines if "which do not divide by 2" in line))
    assert not any("Loading safetensors" in line for line in lines), "weights were read"
    worker.close()
    return messages


def tables(results: dict[str, Any]) -> None:
    """Write the tables of the page."""
    lines = ["| checkpoint | weights | max abs difference of logits |", "|---|---|---|"]
    for row in results.get("logits", []):
        lines.append(f"| {row['checkpoint']} | {row['weights']} | {row['worst']:.0e} |")
    rewrite(PAGE, "logits", "\n".join(lines) + "\n")
    text = speed_table(results["speed"]) if results.get("speed") else "Not measured yet.\n"
    rewrite(PAGE, "speed", text)


def speed_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a checkpoint; a cell has the dense original, packed and decoded weights."""
    kinds = ("batch 1", "batch 8", "prefill")
    head = " | ".join(f"{kind}, tokens/s" for kind in kinds)
    lines = [f"| checkpoint: dense / packed / decoded | {head} | start, s | resident, MB |"]
    lines.append("|---" * 6 + "|")
    for checkpoint in dict.fromkeys(row["checkpoint"] for row in rows):
        own = {row["weights"]: row for row in rows if row["checkpoint"] == checkpoint}
        every = [own[weights] for weights in ("dense original", "packed", "decoded")]
        cells = [" / ".join(f"{row[kind]:.0f}" for row in every) for kind in kinds]
        cells += [
            " / ".join(f"{row[key]:.0f}" for row in every) for key in ("start_s", "resident_mb")
        ]
        lines.append(f"| {checkpoint} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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
        check_logits(python, work, SMALLEST)
        check_refusals(python, work)
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
