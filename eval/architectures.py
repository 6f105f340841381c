"""Every model type that transformers has: how much of it is quantized, and whether that works.

    python eval/architectures.py [TYPE ...] [--again] [--recipe e8p-2bit] [--limit SECONDS]
    python eval/architectures.py --table

A tiny random model of the type (tests/support/architectures.py) is quantized and loaded. Measured
are the share of the weights of its decoder layers that is quantized, counted from the files; how
far its logits are from those of the dense folder that `vqllm dequantize` writes, loaded without
vqllm; whether saving it gives the same tensors; whether it generates, and decodes token by token as
the dense folder does. Every step runs in a process of its own. Results go to
eval/results/architectures.json; types that stand there are not measured again. Linux only.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import architecture_steps as steps
import transformers
from architecture_files import share
from architecture_table import line, table

from tests.support.architectures import NOT_MADE, model_types

RESULTS = Path(__file__).resolve().parent / "results" / "architectures.json"
NEEDED = 3
"""As many steps at the beginning are needed by those that follow."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types; all when none")
    parser.add_argument("--again", action="store_true", help="measure what has been measured too")
    parser.add_argument("--recipe", default="e8p-2bit")
    parser.add_argument("--limit", type=float, default=180, help="seconds for one type")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print a table of what was measured")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    if arguments.table:
        print(table(results, NOT_MADE))
        return
    for model_type in arguments.types or model_types():
        if model_type not in results or arguments.again:
            results[model_type] = measure(model_type, arguments.recipe, arguments.limit)
            write(arguments.results, results)
            print(line(model_type, results[model_type]), flush=True)


def measure(model_type: str, recipe: str, limit: float) -> dict[str, Any]:
    """What the steps find of one type; "errors" has the first line of what each of them raised."""
    start, seconds = time.monotonic(), 0.0
    found: dict[str, Any] = {"recipe": recipe, "transformers": transformers.__version__}
    errors: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number, step in enumerate(steps.STEPS):
            left = limit - (time.monotonic() - start)
            outcome, used = in_process(step, left, model_type, folder, recipe)
            seconds += used
            if isinstance(outcome, str):
                errors[step.__name__] = outcome
                if number < NEEDED:
                    break
            else:
                found |= outcome
        if (folder / "quantized" / "config.json").exists():
            found |= share(folder / "quantized", found) | steps.differences(folder)
    return found | {"errors": errors, "cpu_seconds": round(seconds, 1)}


def in_process(step: Any, limit: float, *given: Any) -> tuple[dict[str, Any] | str, float]:
    """What a step returns, run in a process, or a line that says why it returned nothing; and the
    seconds of a CPU that it took."""
    # The one kind of process starts with vqllm imported, the other is a copy of this one.
    context: Any = multiprocessing.get_context("forkserver" if step in steps.WITH_VQLLM else "fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(step, theirs, given))
    child.start()
    theirs.close()
    try:
        if not ours.poll(max(limit, 0.1)):
            return "TimeoutError: the time for this type was over", limit
        return ours.recv()
    except EOFError:
        child.join()
        return f"the process ended with code {child.exitcode}", 0.0
    finally:
        if child.is_alive():
            child.join(5)
            child.kill()
        child.join()


def _run(step: Any, pipe: Any, given: tuple[Any, ...]) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    try:
        outcome = step(*given)
    except BaseException as error:
        outcome = steps.first_line(error)
    pipe.send((outcome, time.process_time()))


def write(path: Path, results: dict[str, Any]) -> None:
    path.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for the server to find the module
    multiprocessing.get_context("forkserver").set_forkserver_preload(["architecture_preload"])
    main()
