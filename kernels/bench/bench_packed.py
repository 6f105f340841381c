"""Time whole packed linears on a CPU against torch's bfloat16 product with the same weights.

    python kernels/bench/bench_packed.py [--output FILE.csv] [--threads N] [--rows 1 8 256]

A linear has scales and Hadamard transforms on both sides, as in the default recipes, and all of
that is timed. The contenders take turns, and each of them goes through so many copies of its
weights that none is left in a cache (`--megabytes` of the dense ones): in a model no weight is read
twice a token. Times are medians over rounds of one call's; speedup is the median of the ratios of
rounds.

A processor with AVX2 only is imitated on both sides by what is set in the environment:

    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2                          torch's product
    NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx,+avx2,+fma,+bmi,+bmi2,..   packed products
"""

import argparse
import csv
import os
import statistics
import time
from collections.abc import Callable
from itertools import cycle
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from bench_cpu import processor
from bench_matmul import provenance, random_tensors

from vqllm_kernels import formats
from vqllm_kernels.cpu import bound, instructions
from vqllm_kernels.linear import BoundLinear, LinearSpec
from vqllm_kernels.transforms import HadamardSpec, ScaleSpec


def trellis(code: str, rate: float, state_bits: int) -> dict:
    return {
        "format": "trellis-v1",
        "tile_rows": 64,
        "code": code,
        "tile_bits": int(256 * rate),
        "state_bits": state_bits,
        "step_weights": 2 if code == "bytes2" else 1,
        "table_bits": 0,
    }


def parities(rate: float, masks: int) -> dict:
    """The time does not depend on the masks."""
    return {
        "format": "trellis-v2",
        "tile_rows": 64,
        "tile_bits": int(256 * rate),
        "state_bits": 12,
        "masks": [0b101100110101 >> i | 1 << i for i in range(masks)],
    }


FORMATS = {
    "bytes2, 2 bits": trellis("bytes2", 2, 14),
    "bytes2, 2.25 bits": trellis("bytes2", 2.25, 14),
    "bytes4, 3 bits": trellis("bytes4", 3, 12),
    "bytes4, 4 bits": trellis("bytes4", 4, 12),
    "gf2, 2 bits": parities(2, 6),
    "gf2, 2.5 bits": parities(2.5, 7),
    "gf2, 3 bits": parities(3, 7),
    "gf2, 4 bits": parities(4, 7),
    "e8p, 2 bits": {"format": "e8p-v1"},
    "e81b, 1 bit": {"format": "e81b-v1"},
    "1 x 4, 8 bits": {"format": "lut-v1", "tile_rows": 1, "tile_cols": 4, "index_bits": 8},
    "e8p twice, 4 bits": {"format": "residual-v1", "stages": [{"format": "e8p-v1"}] * 2},
}
SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (1536, 576)]
ROUNDS = 11
MOST_COPIES = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="CSV file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 256])
    parser.add_argument("--shapes", type=shape_of, nargs="+", default=SHAPES, help="as 4096x4096")
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--only", nargs="+", default=list(FORMATS), help="formats by name")
    parser.add_argument("--dry-run", action="store_true", help="one small shape")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    where = provenance(torch.device("cpu")) | {
        "device": processor(),
        "instructions": instructions.instructions(),
        "torch_instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": arguments.threads,
    }
    lines = []
    for shape in [(64, 96)] if arguments.dry_run else arguments.shapes:
        for name in arguments.only:
            for row in measure(FORMATS[name], shape, arguments.rows, arguments.megabytes):
                lines.append({**where, "format": name, **row})
                print({"format": name} | row, flush=True)
    if arguments.output is not None:
        with arguments.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)


def shape_of(text: str) -> tuple[int, int]:
    rows, cols = text.split("x")
    return int(rows), int(cols)


def measure(
    values: dict, shape: tuple[int, int], numbers: list[int], megabytes: int
) -> list[dict[str, object]]:
    """A row of the table for each number of rows of x."""
    rows, cols = shape
    spec = formats.from_dict(values)
    sides = (("in", cols), ("out", rows))
    linear = LinearSpec(
        rows=rows,
        cols=cols,
        format=spec,
        transforms=(
            *(ScaleSpec(side=side, size=size) for side, size in sides),
            *(HadamardSpec(side=side, size=size) for side, size in sides),
        ),
    )
    copies = max(2, min(MOST_COPIES, megabytes * 10**6 // (2 * rows * cols)))
    packed, dense = [], []
    for seed in range(copies):
        own = random_tensors(spec, shape, torch.Generator().manual_seed(seed))
        tensors = own | {
            name: torch.ones(t.shape, dtype=t.dtype)
            for name, t in linear.layout().items()
            if name not in own
        }
        made = bound.linears_of([BoundLinear.of(linear, tensors)])
        assert not isinstance(made, str), made
        packed.append(made)
        dense.append(torch.randn(rows, cols).bfloat16())
    found = []
    for number in numbers:
        x = torch.randn(number, cols).bfloat16()
        for linears in packed:  # what a first call writes down takes longer than a small product
            linears(x)
        times = in_turns(
            packed=over(packed, lambda linears, x=x: linears(x)),
            bfloat16=over(dense, lambda W, x=x: torch.nn.functional.linear(x, W)),
        )
        found.append(
            {
                "rows": rows,
                "cols": cols,
                "rows_of_x": number,
                **{f"{name}_us": round(1e6 * statistics.median(t), 1) for name, t in times.items()},
                "speedup": round(
                    statistics.median(map(truediv, times["bfloat16"], times["packed"])), 2
                ),
                "load": round(os.getloadavg()[0], 1),
            }
        )
    return found


def over(copies: list[Any], call: Callable[[Any], object]) -> Callable[[], object]:
    """The call with one copy after the other."""
    turns = cycle(copies)
    return lambda: call(next(turns))


def in_turns(**calls: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of a call in every round, by name: of the processor where one thread runs."""
    for call in calls.values():
        call()
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = clock()
            for _ in range(4):
                call()
            times[name].append((clock() - start) / 4)
    return times


if __name__ == "__main__":
    with torch.inference_mode():
        main()
