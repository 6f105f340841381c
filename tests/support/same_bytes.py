"""Tiny checkpoints by shipped recipes, and the sha256 of what they consist of.

A change that is to leave checkpoints as they are leaves these digests as they are:

    python -m tests.support.same_bytes --output before.json                   # every recipe
    python -m tests.support.same_bytes --output after.json --against before.json

Bytes follow from the order in which a processor adds. The instruction sets that torch, MKL, oneDNN
and numba use are therefore fixed before they load, to those that every x86-64 processor has, and
so is the number of threads. `machine` is a digest of sums, products and factorizations alone:
where it differs from the recorded one, the libraries compute in another way here, and the digests
of the checkpoints say nothing.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

import vqllm
from tests.support.tiny import TEXT, save_tiny
from vqllm import recipes

FIXED = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "NUMBA_CPU_NAME": "generic",
    "NUMBA_CPU_FEATURES": "",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "HF_HUB_OFFLINE": "1",
}
ANOTHER_MACHINE = 3
"""Exit status where the recorded digests say nothing about this machine."""
SMALL = ("calibration.sequences=4", "calibration.length=32")
LARGE_TABLES = ("additive-", "aqlm-", "jlcm-", "vptq-")
"""Recipes whose tables are larger than the tiny model's matrices, which are coded all the same."""
FEW_STEPS = {
    "end_to_end": ("steps=4",),
    "layer": ("steps=2",),
    "pv": ("steps=6", "every=2"),
    "straight_through": ("steps=6", "every=2"),
    "codebook": (),
}


def machine() -> str:
    """A digest of what the numerical libraries compute here."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(96, 96, generator=generator)
    H = A @ A.T + torch.eye(96)
    parts = [H, torch.linalg.cholesky(H), torch.linalg.inv(H), torch.linalg.eigvalsh(H)]
    parts += [(A.bfloat16() @ A.bfloat16()).float(), A.exp().sum(0), A.softmax(0), A.sigmoid()]
    parts += [torch.nn.functional.scaled_dot_product_attention(A[None], A[None], A[None])]
    digest = hashlib.sha256(torch.__version__.encode())
    for part in parts:
        digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()


def digest_of(folder: Path) -> str:
    """Of the weights and configuration of a checkpoint, but for the place of its source, and the
    recipe, which gets new keys. Its pages tell times, and are left out."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    for key in ("source", "recipe"):
        del config["quantization_config"][key]
    for record in config["quantization_config"].get("tuning", []):
        for key in ("teacher", "seconds", "recipe"):
            record.pop(key, None)
    digest.update(json.dumps(config).encode())
    return digest.hexdigest()


def digests(names: Iterable[str], tuning: Iterable[str]) -> dict[str, str]:
    """By recipe; those of `vqllm tune` start from a checkpoint of `e8p-2bit`."""
    found = {"machine": machine()}
    with tempfile.TemporaryDirectory() as work:
        home = Path.cwd()
        os.chdir(work)
        try:
            save_tiny(Path("tiny"), "qwen2")
            Path("text.txt").write_text(TEXT * 40)
            for name in names:
                _quantize(name, Path(name))
                found[name] = digest_of(Path(name))
                print(name, found[name][:12], file=sys.stderr)
            for name in tuning:
                base = Path("base-kmeans" if name == "codebook" else "base")
                if not base.is_dir():
                    _quantize("kmeans-2bit" if name == "codebook" else "e8p-2bit", base)
                output = f"tuned by {name}"
                stages = recipes.load_tuning(name).stages
                changes = [
                    f"stages.{i}.{change}"
                    for i, stage in enumerate(stages)
                    for change in FEW_STEPS[stage.type]
                ]
                vqllm.tune(
                    base,
                    output,
                    recipe=name,
                    teacher="tiny",
                    calibration="text.txt",
                    changes=(*SMALL, *changes),
                    evaluate=False,
                    device="cpu",
                )
                found[output] = digest_of(Path(output))
                print(output, found[output][:12], file=sys.stderr)
        finally:
            os.chdir(home)
    return found


def _quantize(name: str, output: Path) -> None:
    recipe = recipes.load(name)
    changes = list(SMALL)
    if name.startswith(LARGE_TABLES):
        changes.append("skip_kinds=[routers,few_rows]")
    if recipe.allocation is not None:
        # Scales and tables are large beside tiny matrices: with less, all get the cheapest codec.
        changes.append(f"allocation.bits={recipe.allocation.bits + 0.8}")
    if recipe.layer is not None:
        changes += ["layer.steps=2", "layer.batch=2"]
    if recipe.tune is not None:
        changes += [
            f"tune.stages.{i}.{change}"
            for i, stage in enumerate(recipe.tune.stages)
            for change in FEW_STEPS[stage.type]
        ]
        changes += ["tune.calibration.sequences=4", "tune.calibration.length=32"]
    vqllm.quantize(
        "tiny",
        output,
        recipe=name,
        calibration="text.txt",
        changes=tuple(changes),
        evaluate=False,
        device="cpu",
    )


def main() -> None:
    if any(os.environ.get(key) != value for key, value in FIXED.items()):
        # Too late for this process, which has loaded the libraries.
        again = [sys.executable, "-m", "tests.support.same_bytes", *sys.argv[1:]]
        sys.exit(subprocess.run(again, env={**os.environ, **FIXED}).returncode)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--against", type=Path, help="digests to compare with")
    parser.add_argument("--recipes", help="comma-separated names; every one by default")
    arguments = parser.parse_args()
    names, tuning = list(recipes.available()), list(recipes.available_tuning())
    if arguments.recipes is not None:
        chosen = arguments.recipes.split(",")
        names, tuning = ([n for n in all_ if n in chosen] for all_ in (names, tuning))
    before = None if arguments.against is None else json.loads(arguments.against.read_text())
    if before is not None and before["machine"] != machine():
        print("This machine computes in another way than the one of --against.")
        sys.exit(ANOTHER_MACHINE)
    found = digests(names, tuning)
    arguments.output.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
    if before is not None:
        differ = [name for name in found if found[name] != before.get(name)]
        print(f"{len(found) - len(differ)} as before; others: {', '.join(differ) or 'none'}")
        sys.exit(bool(differ))


if __name__ == "__main__":
    main()
