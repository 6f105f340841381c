"""The two Viterbi searches of the CPU side by side: costs of 16 bits, and in float32.

    python eval/bench_viterbi.py [--output FILE.csv] [--only CODE-STATES-BITS ...]

Gaussian tiles. Both search the same tiles in turns, on one thread: 10⁶ weights a second of CPU time
(the best of the rounds), and the mean squared errors, of which `mse_change` is the relative change.
"""

import argparse
import csv
import os
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from vqllm.codecs import CODECS
from vqllm.codecs.search import viterbi, viterbi_int16
from vqllm.codecs.trellis import Trellis
from vqllm_kernels.trellis import reference

CASES = [
    *(("mul1", state_bits, bits) for state_bits in (8, 10, 12, 14, 16) for bits in (2, 3, 4)),
    *(("bytes2", state_bits, bits) for state_bits in (12, 14) for bits in (1.5, 1.75, 2, 2.25)),
    *(("bytes4", 12, bits) for bits in (2.5, 2.75, 3, 3.5, 4, 4.5)),
    *(("gf2", 12, bits) for bits in (2, 3, 4)),
]
ROUNDS = 3
SECONDS = 1.0
"""About what the search in float32 takes for the tiles of a case, at 3 · 10⁹ states a second."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for row in measured(arguments.only):
        rows.append(row)
        print(*(f"{key} {value}" for key, value in row.items()), flush=True)
    if arguments.output:
        with arguments.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def measured(only: list[str]) -> Iterator[dict[str, str | int | float]]:
    fits = viterbi_int16.fits
    for code, state_bits, bits in CASES:
        codec = CODECS.get("trellis").model_validate(
            {"type": "trellis", "code": code, "state_bits": state_bits, "bits": bits}
        )
        assert isinstance(codec, Trellis)
        name = f"{code}-{state_bits}-{bits}"
        steps = 256 // reference.WEIGHTS_OF_STEP.get(code, 1)
        if (only and name not in only) or not fits(*shape(codec, steps)):
            continue
        num_tiles = max(8, int(SECONDS * 3e9 / (1.4 * steps * (1 << state_bits))))
        X_IJE = torch.randn(1, num_tiles, 256, generator=torch.Generator().manual_seed(0))
        state = codec.fit(X_IJE, None, torch.Generator())
        seconds: dict[bool, list[float]] = {False: [], True: []}
        errors = {}
        for short in [False, True] * (1 + ROUNDS):  # the first round compiles
            viterbi_int16.fits = fits if short else lambda *_: False
            viterbi._compiled.cache_clear()
            start = time.thread_time()
            codes_IJM = codec.encode(X_IJE, state)
            seconds[short].append(time.thread_time() - start)
            error = (codec.decode(codes_IJM, state) - X_IJE).square().mean()
            errors[short] = float(error)
        viterbi_int16.fits = fits
        viterbi._compiled.cache_clear()
        rates = {short: X_IJE.numel() / min(own[1:]) / 1e6 for short, own in seconds.items()}
        yield {
            "code": code,
            "state_bits": state_bits,
            "bits": bits,
            "float32": round(rates[False], 3),
            "int16": round(rates[True], 3),
            "speedup": round(rates[True] / rates[False], 2),
            "mse_float32": round(errors[False], 6),
            "mse_int16": round(errors[True], 6),
            "mse_change": round(errors[True] / errors[False] - 1, 6),
        }


def shape(codec: Trellis, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """What `viterbi_int16.fits` is asked with."""
    ends = np.array(reference.step_ends(round(codec.rate * 256), steps))
    return np.empty((1 << codec.state_bits, 256 // steps), np.float32), np.diff(ends, prepend=0)


if __name__ == "__main__":
    main()
