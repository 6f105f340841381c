"""Time the decode-matmul kernels against torch's product and a copy of the same bytes.

    python kernels/bench/bench_matmul.py --output FOLDER [--formats NAME ...] [--batches N ...]
    python kernels/bench/bench_matmul.py --dry-run

See README.md beside this file for the columns.
"""

import argparse
import csv
import itertools
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vqllm_kernels import dispatch, formats
from vqllm_kernels.choice import bucket
from vqllm_kernels.formats import FormatSpec
from vqllm_kernels.linear import LinearSpec


def trellis(code: str, bits: float, state_bits: int) -> dict:
    """Tiles of 64 rows, as the shipped recipes have."""
    return {
        "format": "trellis-v1",
        "tile_rows": 64,
        "code": code,
        "tile_bits": round(256 * bits),
        "state_bits": state_bits,
        "step_weights": 2 if code == "bytes2" else 1,
        "table_bits": 0,
    }


FORMATS: dict[str, dict] = {
    "e8p": {"format": "e8p-v1"},
    "e81b + e8p": {
        "format": "residual-v1",
        "stages": [{"format": "e81b-v1"}, {"format": "e8p-v1"}],
    },
    "e8p + e8p": {"format": "residual-v1", "stages": [{"format": "e8p-v1"}, {"format": "e8p-v1"}]},
    "trellis bytes2, 2 bits": trellis("bytes2", 2, 14),
    "trellis bytes4, 3 bits": trellis("bytes4", 3, 12),
    "trellis bytes4, 4 bits": trellis("bytes4", 4, 12),
    "trellis mul1, 2 bits": trellis("mul1", 2, 12),
    "trellis 3inst, 2 bits": trellis("3inst", 2, 16),
    "lut 1x4, 8 bit": {"format": "lut-v1", "tile_rows": 1, "tile_cols": 4, "index_bits": 8},
    "lut 1x8, 16 bit": {"format": "lut-v1", "tile_rows": 1, "tile_cols": 8, "index_bits": 16},
    "lut 6x1, 12 bit": {"format": "lut-v1", "tile_rows": 6, "tile_cols": 1, "index_bits": 12},
}
Shape = tuple[tuple[int, ...], int]
"""Rows of a linear, or of those of one input, which are multiplied together; and columns."""
SHAPES: list[Shape] = [
    ((4096,), 4096),
    ((14336,), 4096),
    ((4096,), 14336),
    ((28672,), 8192),
    ((4096, 1024, 1024), 4096),
    ((14336, 14336), 4096),
]
"""Those of 7 to 70 billion parameter models; the last two are q, k, v and gate, up."""
DRY_SHAPES: list[Shape] = [((48,), 96), ((48, 16, 16), 96)]
BATCHES = [1, 4, 16, 64, 512]
ROTATED_BYTES = 128 << 20
"""Packed weights in rotation; the second-level cache of an H100 holds 50 MB."""
ROUNDS = 15
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Contender:
    """Something to time: `run(i)` works on copy i of its weights."""

    name: str
    run: Callable[[int], object]
    copies: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for the CSV file")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--batches", nargs="*", type=int, default=BATCHES)
    parser.add_argument(
        "--dry-run", action="store_true", help="small shapes on a CPU; times mean nothing"
    )
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run works without one")
    if not arguments.dry_run and arguments.output is None:
        parser.error("--output is needed")
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    where = provenance(device)
    rows = []
    shapes = DRY_SHAPES if arguments.dry_run else SHAPES
    for name, shape, batch in itertools.product(arguments.formats, shapes, arguments.batches):
        spec = formats.from_dict(FORMATS[name])
        figures = measure(spec, shape, batch, device)
        size = {"rows": "+".join(map(str, shape[0])), "cols": shape[1]}
        rows.append({**where, "format": name, **size, **figures})
        print({key: rows[-1][key] for key in rows[-1] if key not in where}, flush=True)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        path = arguments.output / f"matmul-{str(where['device']).replace(' ', '-')}.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def measure(spec: FormatSpec, shape: Shape, batch: int, device: torch.device) -> dict[str, object]:
    """One row of the table."""
    every_rows, num_cols = shape
    specs = [LinearSpec(rows=own, cols=num_cols, format=spec) for own in every_rows]
    no_bias = [None] * len(specs)
    generator = torch.Generator(device).manual_seed(0)
    tensors = [random_tensors(spec, (own, num_cols), generator) for own in every_rows]
    packed_bytes = sum(tensor.nbytes for own in tensors for tensor in own.values())
    copies = 2 if device.type == "cpu" else max(2, math.ceil(ROTATED_BYTES / packed_bytes))
    packed = [[{k: v.clone() for k, v in own.items()} for own in tensors] for _ in range(copies)]
    x_NC = torch.randn(batch, num_cols, generator=generator, device=device).to(DTYPE)
    check(x_NC, tensors, specs)
    # What is replaced has the rows of all in one matrix.
    parts = [
        dispatch.decode(own, spec, one.rows, num_cols, DTYPE) for own, one in zip(tensors, specs)
    ]
    dense = [torch.cat(parts) for _ in range(2)]
    sources = [torch.empty(packed_bytes, dtype=torch.uint8, device=device) for _ in range(copies)]
    target = torch.empty_like(sources[0])

    def by_decoding(i: int) -> None:
        for own, one in zip(packed[i], specs):
            W = dispatch.decode(own, spec, one.rows, num_cols, DTYPE)
            torch.nn.functional.linear(x_NC, W)

    contenders = [
        Contender("kernel", lambda i: dispatch.linears(x_NC, packed[i], specs, no_bias), copies),
        Contender("dense", by_decoding, copies),
        Contender("matmul", lambda i: torch.nn.functional.linear(x_NC, dense[i]), len(dense)),
        Contender("copy", lambda i: target.copy_(sources[i]), copies),
    ]
    times = {c.name: [] for c in contenders}
    timers = [timer(contender, device) for contender in contenders]
    for _ in range(1 if device.type == "cpu" else ROUNDS):
        for contender, seconds in zip(contenders, timers):
            times[contender.name].append(1e6 * seconds())
    median = {name: statistics.median(values) for name, values in times.items()}
    # A copy reads and writes; half of its time is for reading.
    median["copy"] /= 2
    taken = [
        choice.implementation
        for choice in dispatch.choices()
        if (choice.call.operation, choice.call.spec) == ("matmul", spec)
        and choice.call.batch == bucket(batch)
    ]
    return {
        "batch": batch,
        "implementation": taken[-1],
        "packed_bytes": packed_bytes,
        **{f"{name}_us": round(value, 2) for name, value in median.items()},
        "speedup": round(median["matmul"] / median["kernel"], 3),
        "of_copy": round(median["copy"] / median["kernel"], 3),
    }


def check(x_NC: Tensor, tensors: list[dict[str, Tensor]], specs: list[LinearSpec]) -> None:
    """Stop unless the results are as exact as torch's products with the reference's weights."""
    ys = dispatch.linears(x_NC, tensors, specs, [None] * len(specs))
    for y_NR, own, spec in zip(ys, tensors, specs):
        reference_RC = spec.format.decode(own, spec.rows, spec.cols)
        exact = x_NC.double() @ reference_RC.double().T
        naive = torch.nn.functional.linear(x_NC, reference_RC.to(x_NC.dtype))
        error, allowed = ((y.double() - exact).norm() / exact.norm() for y in (y_NR, naive))
        if not error <= 2 * allowed:
            sys.exit(
                f"{spec.to_dict()}, {spec.rows} x {spec.cols}, batch {len(x_NC)}: relative error "
                f"{error:.2e}, torch's is {allowed:.2e}. Nothing is timed before this is right."
            )


def timer(contender: Contender, device: torch.device) -> Callable[[], float]:
    """A function that gives the seconds of one call, the mean over a rotation of all copies."""
    if device.type == "cpu":

        def once() -> float:
            start = time.perf_counter()
            contender.run(0)
            return time.perf_counter() - start

        return once
    calls = max(contender.copies, 16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for i in range(3):  # compiles, and fills the allocator's pools before the capture
            contender.run(i % contender.copies)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            contender.run(i % contender.copies)

    def replay() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    replay()
    return replay


def random_tensors(
    spec: FormatSpec, shape: tuple[int, int], generator: torch.Generator
) -> dict[str, Tensor]:
    """Stored tensors with random codes."""
    tensors = {}
    for name, layout in spec.layout(*shape).items():
        size, device = layout.shape, generator.device
        if layout.dtype.is_floating_point:
            values = torch.randn(size, generator=generator, device=device) * 0.3 + 0.1
        else:
            info = torch.iinfo(layout.dtype)
            values = torch.randint(info.min, info.max + 1, size, generator=generator, device=device)
        tensors[name] = values.to(layout.dtype)
    return tensors


def provenance(device: torch.device) -> dict[str, object]:
    """Where the figures come from."""
    import triton

    root = Path(__file__).resolve().parents[2]
    run = {"cwd": root, "capture_output": True, "text": True, "check": False}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **run).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], **run).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit + ("+changes" if changed else ""),
    }


if __name__ == "__main__":
    with torch.inference_mode():
        main()
