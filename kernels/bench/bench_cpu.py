"""Time look-ups on a CPU against torch's products with decoded weights.

    python kernels/bench/bench_cpu.py [--output FILE.csv] [--threads N]

One row of x. The contenders take turns; times are medians, speedup is the median of the ratios of
rounds, speedup_best that of the fastest ones, and load that of the machine, averaged over a minute.
"""

import argparse
import csv
import os
import statistics
import time
from collections.abc import Callable
from operator import truediv
from pathlib import Path

import torch
from bench_matmul import provenance, random_tensors

from vqllm_kernels import dispatch, formats


def lut(cols: int, bits: int) -> dict:
    return {"format": "lut-v1", "tile_rows": 1, "tile_cols": cols, "index_bits": bits}


FORMATS = {
    "1x8, 8 bit": lut(8, 8),
    "1x4, 8 bit": lut(4, 8),
    "1x8, 8 bit, twice": {"format": "residual-v1", "stages": [lut(8, 8), lut(8, 8)]},
    "1x2, 6 bit": lut(2, 6),
    "e81b": {"format": "e81b-v1"},
}
SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (1024, 1024), (1536, 576), (576, 1536)]
ROUNDS = 15
MIN_SECONDS = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="CSV file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dry-run", action="store_true", help="one small shape")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    where = provenance(torch.device("cpu")) | {"threads": arguments.threads}
    where["device"] = processor()
    rows = []
    for shape in [(64, 96)] if arguments.dry_run else SHAPES:
        for name, values in FORMATS.items():
            rows.append({**where, "format": name, **measure(values, shape)})
            print({key: rows[-1][key] for key in rows[-1] if key not in where}, flush=True)
    if arguments.output is not None:
        with arguments.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def processor() -> str:
    """The name of the processor, where Linux tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "cpu"


def measure(values: dict, shape: tuple[int, int]) -> dict[str, object]:
    """One row of the table."""
    num_rows, num_cols = shape
    spec = formats.from_dict(values)
    tensors = random_tensors(spec, shape, torch.Generator().manual_seed(0))
    x = torch.randn(1, num_cols)
    W_RC = spec.decode(tensors, num_rows, num_cols)
    narrow, x_narrow = W_RC.bfloat16(), x.bfloat16()
    y = dispatch.matmul(x, tensors, spec, num_rows, num_cols)
    torch.testing.assert_close(y, x @ W_RC.T, rtol=1e-3, atol=1e-3 * float(y.abs().max()))
    times = in_turns(
        lookup=lambda: dispatch.matmul(x_narrow, tensors, spec, num_rows, num_cols),
        bfloat16=lambda: torch.nn.functional.linear(x_narrow, narrow),
        float32=lambda: torch.nn.functional.linear(x, W_RC),
    )
    return {
        "rows": num_rows,
        "cols": num_cols,
        **{f"{name}_us": round(1e6 * statistics.median(t), 1) for name, t in times.items()},
        "speedup": round(statistics.median(map(truediv, times["bfloat16"], times["lookup"])), 2),
        "speedup_best": round(min(times["bfloat16"]) / min(times["lookup"]), 2),
        "load": round(os.getloadavg()[0], 1),
    }


def in_turns(**calls: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of a call in every round, by name."""
    repeats = {
        name: max(1, int(MIN_SECONDS / max(seconds(call, 2), 1e-7))) for name, call in calls.items()
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(seconds(call, repeats[name]))
    return times


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Of one call, the mean of so many."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


if __name__ == "__main__":
    with torch.inference_mode():
        main()
