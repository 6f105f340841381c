"""Time of quantizing the first layers of the demo model with one process and with several.

    python eval/bench_processes.py --text FILE [--layers 8] [--processes 2] [--presets fast]

Every process has one thread, and each needs a core of its own. Prints and adds to
results/processes.json, for every preset of `--bits 2` and both numbers of processes:

- clock: seconds from the moment when everything is imported to the last byte. Worth something on an
  idle machine only.
- path: the longest way through all processes in seconds of the processor. Between two points where
  processes wait for each other, that is the time of the one that computes most; what a process
  spends on sending and receiving counts, and waiting does not. A machine with other work gives
  about the same.
- same: whether the weights are those of one process, byte for byte.

The result is not measured against the original (`--no-eval`), which one process does alone. About
six minutes on two idle cores.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "processes.json"
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
WAITS = ("gather", "_swap", "broadcast", "wait", "leave")
"""Methods of `Processes` in which processes wait for each other."""


def cut_demo(folder: Path, num_layers: int) -> None:
    """The demo model with its first layers only."""
    from safetensors.torch import load_file, save_file

    from vqllm.models.resolve import resolve

    source = resolve("demo", trust_remote_code=False, allow_bin=False).path
    folder.mkdir()
    tensors = {}
    for path in source.glob("*.safetensors"):
        tensors |= load_file(path)
    inside = tuple(f"model.layers.{number}." for number in range(num_layers))
    kept = {k: t for k, t in tensors.items() if not k.startswith("model.layers.")}
    kept |= {k: t for k, t in tensors.items() if k.startswith(inside)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    for path in source.iterdir():
        if path.is_file() and path.suffix in (".json", ".txt") and "index" not in path.name:
            shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = num_layers
    (folder / "config.json").write_text(json.dumps(config))


def worker(model: str, output: str, text: str, preset: str, told: str) -> None:
    """One process: quantizes, and writes what it took to a file."""
    import vqllm
    from vqllm.core.distributed import Processes

    parts: list[float] = []
    last = [0.0]

    def noted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found = method(*args, **kwargs)
            now = time.process_time()
            parts.append(now - last[0])
            last[0] = now
            return found

        return call

    for name in WAITS:
        setattr(Processes, name, noted(getattr(Processes, name)))
    _import_all()
    begin = time.perf_counter()
    last[0] = first = time.process_time()
    vqllm.quantize(
        model, output, bits=2, preset=preset, calibration=text, device="cpu", evaluate=False
    )
    now = time.process_time()
    parts.append(now - last[0])
    clock = time.perf_counter() - begin
    Path(told).write_text(json.dumps({"clock": clock, "cpu": now - first, "parts": parts}))


def _import_all() -> None:
    """What a run imports on its way, so that it is not timed."""
    import accelerate
    import matplotlib.pyplot
    import transformers

    import vqllm.runs.commands

    assert all((accelerate, matplotlib, transformers, vqllm.runs.commands))


def run(num: int, model: Path, output: Path, text: Path, preset: str) -> dict[str, float]:
    """Quantize with so many processes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    files = [output.with_name(f"{output.name}-{rank}.json") for rank in range(num)]
    processes = []
    for rank, file in enumerate(files):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num, "LOCAL_WORLD_SIZE": num}
        started = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **THREADS, **started, **{k: str(v) for k, v in place.items()}}
        command = [sys.executable, __file__, "--worker", model, output, text, preset, file]
        processes.append(subprocess.Popen(list(map(str, command)), env=environment))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit("a process failed")
    told = [json.loads(file.read_text()) for file in files]
    parts = [own["parts"] for own in told]
    assert len({len(own) for own in parts}) == 1, "processes wait at the same places"
    return {
        "clock": round(max(own["clock"] for own in told), 2),
        "path": round(sum(map(max, zip(*parts))), 2),
        "waits": len(parts[0]),
    }


def same(one: Path, other: Path) -> bool:
    """Whether two folders have the same weights and records."""
    names = [path.name for path in one.glob("*.safetensors")] + ["config.json", "report.jsonl"]
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="to calibrate on")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--presets", nargs="+", default=["fast", "balanced"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    results = json.loads(given.output.read_text()) if given.output.exists() else {}
    with tempfile.TemporaryDirectory() as work:
        folder, model = Path(work), Path(work) / "model"
        cut_demo(model, given.layers)
        for preset in given.presets:
            found: dict[str, Any] = {"layers": given.layers}
            for num in (1, given.processes):
                output = folder / f"{preset}-{num}"
                found[str(num)] = run(num, model, output, given.text.resolve(), preset)
            one, several = found["1"], found[str(given.processes)]
            for what in ("clock", "path"):
                found[f"times {what}"] = round(one[what] / several[what], 2)
            found["same"] = same(folder / f"{preset}-1", output)
            results[f"{preset}, {given.processes} processes"] = found
            print(preset, json.dumps(found), flush=True)
    given.output.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main()
