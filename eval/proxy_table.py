"""The tables of docs/rounding.md: proxy loss of codec x rounding x transform on real Hessians.

    python eval/proxy_table.py --model demo --data FOLDER [--layers 0 5 15 29] [--rows 128]
        [--bits 2 3 4] [--codecs NAME ...] [--roundings NAME ...] [--transforms NAME ...]
        [--product] [--tables-only]

FOLDER holds calibration/c4.txt and calibration/wiki.txt. Of every linear of the layers the first
rows are quantized by themselves, with the Hessian of the unquantized model; the loss is also
reported with the Hessian of sequences that took no part. The default is the set below (`planned`);
options leave parts of it out, and with --product it is everything that they name. Rows go to
eval/results/proxy.json as they are measured, those that stand there for the same settings are not
repeated (take them out to measure them again), and the tables between the markers of the page and
of docs/appendix_rounding.md are rewritten.
"""

import argparse
import json
import os
import platform
import time
from itertools import product
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from proxy_hessians import Problem, problems
from proxy_report import write_tables

from vqllm import recipes
from vqllm.core import metrics
from vqllm.core.protocols import JSON
from vqllm.errors import RecipeError
from vqllm.quantization import linear as group

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "eval" / "results" / "proxy.json"
PAGE, APPENDIX = ROOT / "docs" / "rounding.md", ROOT / "docs" / "appendix_rounding.md"
TEXTS = ("c4.txt", "wiki.txt")
SEQUENCES, LENGTH = 512, 128
BITS = (2, 3, 4)

CODECS: dict[str, dict[int, JSON]] = {
    "uniform": {b: {"type": "uniform", "bits": b, "group": None} for b in BITS},
    "kmeans": {
        2: {"type": "kmeans", "tile_cols": 4, "index_bits": 8},
        3: {"type": "kmeans", "tile_cols": 2, "index_bits": 6},
        4: {"type": "kmeans", "tile_cols": 2, "index_bits": 8},
    },
    "additive": {b: {"type": "additive", "codebooks": b, "tile_cols": 8} for b in BITS},
    "e8p": {
        2: {"type": "e8p"},
        3: {"type": "residual", "stages": [{"type": "e81b"}, {"type": "e8p"}]},
        4: {"type": "residual", "stages": [{"type": "e8p"}, {"type": "e8p"}]},
    },
    "leech": {b: {"type": "leech", "bits": b} for b in (2, 3)},
    "trellis fast": {
        b: {"type": "trellis", "bits": b, "code": "table", "state_bits": 8, "tile_rows": 64}
        for b in BITS
    },
    "trellis": {b: {"type": "trellis", "bits": b, "tile_rows": 64} for b in BITS},
}
"""At each number of bits, without scales and tables; `trellis` has 2^12 states."""
CODECS["uniform + 0.5 %"] = {
    b: {"type": "sparse", "share": 0.005, "base": base} for b, base in CODECS["uniform"].items()
}

ROUNDINGS: dict[str, JSON] = {
    "nearest": {"type": "nearest"},
    "coordinate": {"type": "coordinate", "passes": 4, "tolerance": 0},
    "ldlq": {"type": "ldlq"},
    "ldlq, 1 pass": {"type": "ldlq", "passes": 1},
    "ldlq, 2 passes": {"type": "ldlq", "passes": 2},
    "ldlq, 3 passes": {"type": "ldlq", "passes": 3},
    "coordinate, solved": {
        **{"type": "coordinate", "start": "ldlq", "state": "solved"},
        **{"passes": 3, "tolerance": 0},
    },
    "beam": {"type": "beam"},
}

TRANSFORMS: dict[str, list[JSON]] = {
    "none": [],
    "scale": [{"type": "scale", "side": "both", "by": "rms"}],
    "hadamard 128": [{"type": "hadamard", "side": "both", "block": 128}],
    "hadamard": [{"type": "hadamard", "side": "both"}],
}

Setting = tuple[int, str, str, str]
"""Bits, codec, transform, rounding."""


def planned() -> list[Setting]:
    """What is measured by default.

    - After Hadamard transforms, where recipes with these codecs work: every codec with every rule
      at 2 bits, with the rules that differ most at 3 and 4. Passes and beams cost the same there,
      and gain about the same.
    - Other transforms: with the cheap codecs, of which some are for Gaussian weights and some adapt
      to what they get, and with the two ends of the rules. A transform acts on weights and H alike
      for all of them.
    - Outliers beside uniform codes: without a transform, where there are outliers.
    """
    few = ("nearest", "coordinate", "ldlq", "ldlq, 2 passes", "beam")
    others = ("none", "scale", "hadamard 128")
    dense = [name for name in CODECS if name != "uniform + 0.5 %"]
    settings = list(product((2,), dense, ("hadamard",), ROUNDINGS))
    settings += product((3, 4), dense, ("hadamard",), few)
    settings += product((2, 3), ("uniform", "kmeans", "e8p"), others, ("nearest", "ldlq"))
    sparse = ("nearest", "ldlq", "coordinate, solved")
    settings += product((2, 3, 4), ("uniform", "uniform + 0.5 %"), ("none",), sparse)
    return list(dict.fromkeys(settings))


def main() -> None:
    arguments = _arguments()
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    if not arguments.tables_only:
        texts = tuple(arguments.data / "calibration" / name for name in TEXTS)
        groups = problems(arguments.model, texts, arguments.layers, SEQUENCES, LENGTH)
        for setting in _settings(arguments):
            recipe = _recipe(setting)
            if recipe is None:
                continue
            about = _about(arguments, recipe)
            if any(_stands_for(row, about) for row in rows):
                continue
            rows.append(dict(zip(("bits", "codec", "transform", "rounding"), setting)) | about)
            rows[-1] |= measure(groups, recipe, arguments.rows)
            print(*setting, rows[-1]["fit"], rows[-1]["check"], rows[-1]["seconds"], flush=True)
            RESULTS.write_text(_written(rows))
    own = [row for row in rows if row["model"] == Path(arguments.model).name]
    write_tables(PAGE, APPENDIX, own)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, default=os.environ.get("VQLLM_DATA"))
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 5, 15, 29])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--bits", type=int, nargs="+", default=list(BITS), choices=BITS)
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), choices=list(CODECS))
    parser.add_argument("--roundings", nargs="+", default=list(ROUNDINGS), choices=list(ROUNDINGS))
    parser.add_argument(
        "--transforms", nargs="+", default=list(TRANSFORMS), choices=list(TRANSFORMS)
    )
    parser.add_argument("--product", action="store_true")
    parser.add_argument("--tables-only", action="store_true")
    arguments = parser.parse_args()
    if arguments.data is None and not arguments.tables_only:
        parser.error("pass --data or set VQLLM_DATA")
    return arguments


def _settings(arguments: argparse.Namespace) -> list[Setting]:
    named = (arguments.bits, arguments.codecs, arguments.transforms, arguments.roundings)
    if arguments.product:
        return list(product(*named))
    return [s for s in planned() if all(part in of for part, of in zip(s, named))]


def _recipe(setting: Setting) -> recipes.Recipe | None:
    """None for a codec that has no such rate or that the rule cannot serve."""
    bits, codec, transform, rounding = setting
    if bits not in CODECS[codec]:
        return None
    values = {
        "name": "proxy",
        "transforms": TRANSFORMS[transform],
        "codec": CODECS[codec][bits],
        "rounding": ROUNDINGS[rounding],
    }
    try:
        return recipes.from_dict(values, " ".join(map(str, setting)))
    except RecipeError:
        return None


def _about(arguments: argparse.Namespace, recipe: recipes.Recipe) -> JSON:
    """All that the result depends on."""
    values = recipe.to_dict()
    return {
        "model": Path(arguments.model).name,
        "layers": arguments.layers,
        "rows": arguments.rows,
        "texts": list(TEXTS),
        "sequences": [SEQUENCES, LENGTH],
        "recipe": {key: values[key] for key in ("seed", "transforms", "codec", "rounding")},
    }


def _stands_for(row: JSON, about: JSON) -> bool:
    """Whether a row has these settings, with the defaults of keys that are newer than it."""
    values = recipes.from_dict({"name": "proxy", **row["recipe"]}, "row").to_dict()
    recipe = {key: values[key] for key in about["recipe"]}
    return about.items() <= {**row, "recipe": recipe}.items()


def measure(groups: list[Problem], recipe: recipes.Recipe, rows: int) -> JSON:
    """Geometric means of the proxy losses with the Hessians of both halves, also linear by linear;
    bits a weight, all included; seconds of one core for 10^6 weights, from weights to packed
    tensors and back."""
    losses: dict[str, list[float]] = {"fit": [], "check": []}
    seconds, numel, bits = 0.0, 0, 0.0
    for problem in groups:
        weights = {name: W_RC[:rows] for name, W_RC in problem.weights.items()}
        start = time.process_time()
        statistics = group.Statistics(problem.fit_CC, SEQUENCES * LENGTH // 2)
        quantized = group.quantize_group(weights, statistics, recipe)
        seconds += time.process_time() - start
        for done in quantized:
            W_RC = weights[done.name]
            numel += W_RC.numel()
            bits += done.record.bits_per_weight * W_RC.numel()
            for half, H_CC in (("fit", problem.fit_CC), ("check", problem.check_CC)):
                losses[half].append(metrics.proxy_loss(W_RC, done.W_hat_RC, H_CC))
    return {
        **{half: _rounded(_geometric_mean(of)) for half, of in losses.items()},
        "losses": {half: [_rounded(loss) for loss in of] for half, of in losses.items()},
        "bits_per_weight": round(bits / numel, 4),
        "seconds": _rounded(1e6 * seconds / numel),
        "machine": platform.machine(),
    }


def _geometric_mean(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).log().mean().exp())


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _written(rows: list[JSON]) -> str:
    """A row to a line."""
    return "[\n" + ",\n".join(json.dumps(row, sort_keys=True) for row in rows) + "\n]\n"


if __name__ == "__main__":
    main()
