"""Quality against tuning time, a curve for each stage: docs/tuning.png and a JSON file.

    python eval/tuning_curve.py CHECKPOINT --data FOLDER --work FOLDER [--teacher demo]
        [--recipes end-to-end pv straight-through] [--set KEY=VALUE ...]

Tunes the checkpoint with each recipe on calibration/c4.txt of the data, each from the beginning,
and notes when each look at the held-out sequences came and what it showed. The result of each is
measured on the first windows of wikitext-2-raw/wiki.test.raw. Seconds are those of this machine
with whatever else it does; curves of one run can be compared, those of two cannot.
"""

import argparse
import json
import logging
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from vqllm import api
from vqllm.report.plot import plot_tuning
from vqllm.types import JSON

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "eval" / "results" / "tuning-curve.json"


class Looks(logging.Handler):
    """Notes the looks of the stage that runs, which are log records `step i of n: KL x ..`."""

    def __init__(self) -> None:
        super().__init__()
        self.start = time.monotonic()
        self.seen: list[JSON] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("step %d of %d: KL") and isinstance(record.args, tuple):
            step, _, kl, *_ = record.args
            seconds = round(time.monotonic() - self.start, 1)
            self.seen.append({"step": step, "seconds": seconds, "kl": kl})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, default=os.environ.get("VQLLM_DATA"))
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--teacher", default="demo")
    parser.add_argument("--recipes", nargs="+", default=["end-to-end", "pv", "straight-through"])
    parser.add_argument("--set", nargs="*", default=[], dest="changes", metavar="KEY=VALUE")
    parser.add_argument("--windows", type=int, default=8)
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("--data or VQLLM_DATA must name the folder of the texts")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    curves = {name: curve(name, arguments) for name in arguments.recipes}
    told = {
        "checkpoint": arguments.checkpoint.name,
        "changes": arguments.changes,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "curves": curves,
    }
    RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    (ROOT / "docs" / "tuning.png").write_bytes(plot_tuning(curves))


def curve(name: str, arguments: argparse.Namespace) -> JSON:
    """Tune with a recipe; the looks on the way, and the measured result."""
    looks = Looks()
    logger = logging.getLogger("vqllm.tuning")
    logger.addHandler(looks)
    try:
        summary = api.tune(
            arguments.checkpoint,
            arguments.work / f"{arguments.checkpoint.name}-{name}",
            recipe=name,
            teacher=arguments.teacher,
            calibration=arguments.data / "calibration" / "c4.txt",
            changes=tuple(arguments.changes),
            eval_text=arguments.data / "wikitext-2-raw" / "wiki.test.raw",
            eval_windows=arguments.windows,
        )
    finally:
        logger.removeHandler(looks)
    assert summary is not None, "one process tunes"
    first = looks.seen[0]["seconds"] if looks.seen else 0.0
    for look in looks.seen:
        look["seconds"] = round(look["seconds"] - first, 1)
    evaluation = summary.evaluation
    assert evaluation is not None
    keys = ("ratio", "kl", "top1")
    return {
        "looks": looks.seen,
        "bits_per_weight": summary.bits_per_weight,
        "measured": {key: evaluation[key] for key in keys if key in evaluation},
    }


if __name__ == "__main__":
    main()
