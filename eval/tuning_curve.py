"""Quality against tuning time, a curve for each stage: docs/tuning.png and a JSON file.

    python eval/tuning_curve.py CHECKPOINT --data FOLDER --work FOLDER [--teacher demo]
        [--recipes end-to-end layer-end-to-end pv straight-through] [--steps NUMBER]
    python eval/tuning_curve.py --plot-only

Tunes the checkpoint with each recipe on calibration/c4.txt of the data, each from the beginning,
and notes when each look at the held-out sequences came and what it showed. The result of each is
measured on the first windows of wikitext-2-raw/wiki.test.raw. Times are CPU seconds of the stages,
of all threads: the predictions of the original, which every recipe needs once, are not among them.
"""

import argparse
import json
import logging
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from vqllm import api, recipes
from vqllm.core.progress import LogProgress
from vqllm.core.protocols import JSON
from vqllm.report.plot import plot_tuning

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ["end-to-end", "layer-end-to-end", "pv", "straight-through"]
RESULTS = ROOT / "eval" / "results" / "tuning-curve.json"


class Stages(LogProgress):
    """Notes when the first stage begins."""

    def __init__(self) -> None:
        super().__init__()
        self.start: float | None = None

    def phase(self, text: str) -> None:
        super().phase(text)
        if text.startswith("tuning: ") and self.start is None:
            self.start = time.process_time()


class Looks(logging.Handler):
    """Notes the looks of the stages, which are log records `step i of n: KL x ..`."""

    def __init__(self, stages: Stages) -> None:
        super().__init__()
        self.stages = stages
        self.seen: list[JSON] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("step %d of %d: KL") and isinstance(record.args, tuple):
            assert self.stages.start is not None, "looks belong to stages"
            step, _, kl, *_ = record.args
            seconds = round(time.process_time() - self.stages.start, 1)
            self.seen.append({"step": step, "seconds": seconds, "kl": kl})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--data", type=Path, default=os.environ.get("VQLLM_DATA"))
    parser.add_argument("--work", type=Path, help="folder for the checkpoints")
    parser.add_argument("--teacher", default="demo")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--steps", type=int, help="of stages that follow the predictions")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--plot-only", action="store_true", help="draw what was measured again")
    arguments = parser.parse_args()
    if arguments.plot_only:
        draw(json.loads(RESULTS.read_text())["curves"])
        return
    if arguments.checkpoint is None or arguments.work is None:
        parser.error("name a checkpoint and --work")
    if arguments.data is None:
        parser.error("--data or VQLLM_DATA must name the folder of the texts")
    for name in arguments.recipes:
        if all(stage.by_layers for stage in recipes.load_tuning(name).stages):
            parser.error(f"{name} does not look at predictions on the way; name other --recipes")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    curves = {name: curve(name, arguments) for name in arguments.recipes}
    begin = max((told["looks"][0] for told in curves.values()), key=lambda look: look["kl"])
    for told in curves.values():  # a stage of layers does not look: the next one does
        if told["looks"][0]["kl"] < begin["kl"]:
            told["looks"].insert(0, {**begin, "seconds": 0.0})
    told = {
        "checkpoint": arguments.checkpoint.name,
        "steps": arguments.steps,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "curves": curves,
    }
    RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    draw(curves)


def draw(curves: dict[str, JSON]) -> None:
    """Write docs/tuning.png."""
    (ROOT / "docs" / "tuning.png").write_bytes(plot_tuning(curves))


def curve(name: str, arguments: argparse.Namespace) -> JSON:
    """Tune with a recipe; the looks on the way, and the measured result."""
    stages = Stages()
    looks = Looks(stages)
    changes = ()
    if arguments.steps is not None:
        chosen = recipes.load_tuning(name).stages
        numbers = [i for i, stage in enumerate(chosen) if not stage.by_layers]
        changes = tuple(f"stages.{i}.steps={arguments.steps}" for i in numbers)
    logger = logging.getLogger("vqllm.tuning")
    logger.addHandler(looks)
    try:
        summary = api.tune(
            arguments.checkpoint,
            arguments.work / f"{arguments.checkpoint.name}-{name}",
            recipe=name,
            changes=changes,
            teacher=arguments.teacher,
            calibration=arguments.data / "calibration" / "c4.txt",
            eval_text=arguments.data / "wikitext-2-raw" / "wiki.test.raw",
            eval_windows=arguments.windows,
            progress=stages,
        )
    finally:
        logger.removeHandler(looks)
    assert summary is not None, "one process tunes"
    evaluation = summary.evaluation
    assert evaluation is not None
    keys = ("perplexity", "baseline_perplexity", "kl", "top1")
    return {
        "looks": looks.seen,
        "bits_per_weight": summary.bits_per_weight,
        "measured": {key: evaluation[key] for key in keys},
    }


if __name__ == "__main__":
    main()
