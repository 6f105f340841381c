"""Compile the Triton kernels for NVIDIA targets without a GPU and print what came out, as JSON.

    echo "90 e8p fp16" | python aot.py     # lines of a target and a case, answered one by one

Run as a program of its own, without TRITON_INTERPRET: in a process with the interpreter there are
no compilable kernels. The host functions run on the CPU with kernels replaced by recorders, so what
is compiled is what they launch, with the arguments specialised as a launch specialises them.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vqllm_kernels import activations, formats, gpu, transforms
from vqllm_kernels.e8p import kernels as e8p_kernels
from vqllm_kernels.e8p import triton as e8p
from vqllm_kernels.hadamard import triton as hadamard
from vqllm_kernels.lut import kernels as lut_kernels
from vqllm_kernels.lut import triton as lut
from vqllm_kernels.trellis import triton as trellis
from vqllm_kernels.trellis import viterbi

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")

E8P = {"format": "e8p-v1"}
E81B = {"format": "e81b-v1"}

# An H100 has 132; how many there are decides between tiles of 16 and of 32 rows.
gpu.num_multiprocessors = lambda device: 132

Case = tuple[Callable[[], None], str, int]
"""What launches a kernel, the kernel's name, and the weights that a lane decodes in a step, or the
states that it goes through."""


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launch."""

    def __init__(self, kernel: "triton.JITFunction") -> None:
        self.kernel = kernel
        self.args: dict = {}

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.args = dict(zip(self.kernel.arg_names, args)) | kwargs

        return launch


def compile_recorded(recorder: Recorder, sm: int) -> "triton.compiler.CompiledKernel":
    """Compile the recorded launch; pointers and integers divisible by 16 are known as such."""
    options = {k: recorder.args[k] for k in LAUNCH_OPTIONS if recorder.args.get(k) is not None}
    signature, constants, attributes = {}, {}, {}

    def specialize(path: tuple[int, ...], value: object, is_constant: bool) -> object:
        """The type of an argument, or of an entry of one that is a tuple."""
        if isinstance(value, tuple):
            return tuple(specialize((*path, j), v, is_constant) for j, v in enumerate(value))
        if is_constant or (isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        aligned = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if isinstance(aligned, int) and aligned % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return TYPES[value.dtype]
        return "fp32" if isinstance(value, float) else "i32"

    for i, param in enumerate(recorder.kernel.params):
        value = recorder.args[param.name]
        signature[param.name] = specialize((i,), value, param.is_constexpr)
    source = ASTSource(recorder.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def loop(sass: str) -> list[str]:
    """Opcodes of the innermost loop with the most instructions, or of all if there is no loop."""
    opcodes, labels, loops = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"^\.(L_x_\d+):", line.strip()):
            labels[label[1]] = len(opcodes)
        elif found := re.match(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)(.*)$", line):
            target = re.search(r"\.(L_x_\d+)", found[2])
            opcodes.append(found[1])
            if found[1].startswith("BRA") and target and target[1] in labels:
                loops.append((labels[target[1]], len(opcodes)))
    loops = [a for a in loops if a[1] - a[0] > 1]  # a kernel ends in a branch to itself
    inner = [a for a in loops if not any(a[0] <= b[0] and b[1] <= a[1] and a != b for b in loops)]
    start, end = max(inner, key=lambda a: a[1] - a[0], default=(0, len(opcodes)))
    return opcodes[start:end]


def measure(compiled: "triton.compiler.CompiledKernel", weights_per_lane: int) -> dict:
    """Resources of a compiled kernel and instruction counts of its loop."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        run = {"capture_output": True, "text": True, "check": True}
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin], **run).stdout
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], **run).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    counts = Counter(loop(sass))

    def count(pattern: str) -> int:
        return sum(n for opcode, n in counts.items() if re.match(pattern, opcode))

    return {
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "instructions": counts.total(),
        "per_weight": round(counts.total() / weights_per_lane, 3) if weights_per_lane else None,
        "mma": count(r"[HIQ]G?MMA|UTC\w*MMA"),
        "mma_anywhere": len(re.findall(r"\b(?:[HIQ]G?MMA|UTC\w*MMA)\b", sass)),
        "shuffles": count("SHFL"),
        "shared_memory": count("LDS|STS|STSM"),
        "global_loads": {k: n for k, n in sorted(counts.items()) if re.match("LDG", k)},
        "global_stores": sorted(set(re.findall(r"STG[\w.]*", sass))),
    }


def packed(spec: formats.FormatSpec, rows: int, cols: int) -> dict[str, torch.Tensor]:
    return {n: torch.zeros(t.shape, dtype=t.dtype) for n, t in spec.layout(rows, cols).items()}


def matmul_case(
    module: ModuleType, values: dict, tokens: int, dtype: str, rows=(4096,), cols=4096
) -> Case:
    """A matmul; the weights of a step are rows of the program times columns, over its lanes."""
    spec = formats.from_dict(values)
    kernels = spec.kernels("triton")
    x = torch.zeros(tokens, cols, dtype=DTYPES[dtype])
    tensors = [packed(spec, own, cols) for own in rows]

    def launch() -> None:
        kernels.matmuls(x, tensors, rows, cols, x.dtype)

    kernel = "matmul_kernel"
    if module is lut:
        tile = lut_kernels.tiling(x, spec, sum(rows))
    elif kernels.wanted(x):
        tile, kernel = e8p_kernels.bytes_tiling(tokens, sum(rows), x.device), "bytes_matmul_kernel"
    else:
        tile = e8p_kernels.tiling(x, sum(rows))
    bits = {"e8p-v1": 16, "e81b-v1": 8}.get(spec.format_id) or values["index_bits"]
    codes_per_lane = 8 if bits not in (8, 12, 16) else (32 if bits == 12 else 128 // bits)
    return launch, kernel, tile.row_groups * codes_per_lane * spec.tile[0] * spec.tile[1]


def decode_case(values: dict, dtype: str) -> Case:
    spec = formats.from_dict(values)
    tensors = packed(spec, 4096, 4096)

    def launch() -> None:
        spec.kernels("triton").decode(tensors, 4096, 4096, DTYPES[dtype])

    codes = 4 * 64 // (4 * 32)
    return launch, "decode_kernel", codes * spec.tile[0] * spec.tile[1]


def hadamard_case(size: int, dtype: str, block: int | None = None, members: int = 1) -> Case:
    """The transform of an input, or those of several outputs."""
    spec = transforms.HadamardSpec(side="in", size=size, block=block)
    every = [torch.zeros(1, size, dtype=DTYPES[dtype]) for _ in range(members)]
    signs = [spec.pack_signs(torch.ones(size)) for _ in range(members)]
    direction = "input" if members == 1 else "output"

    def launch() -> None:
        spec.kernels().transforms(every, [spec] * members, signs, direction, [()] * members)

    return launch, "dense_kernel" if block else "pass_kernel", 0


def quantize_case(size: int, dtype: str, block: int | None = None) -> Case:
    spec = transforms.HadamardSpec(side="in", size=size, block=block)
    x = torch.zeros(1, size, dtype=DTYPES[dtype])
    signs = spec.pack_signs(torch.ones(size))
    wanted = formats.from_dict(BYTES2).kernels("triton").wanted(x)

    def launch() -> None:
        spec.kernels().quantize(x, spec, signs, (), wanted)

    return launch, "quantized_pass_kernel", 0


def lut_values(rows: int, cols: int, bits: int) -> dict:
    return {"format": "lut-v1", "tile_rows": rows, "tile_cols": cols, "index_bits": bits}


def search_case(state_bits: int, shifts: list[int], num_weights: int = 1) -> Case:
    x = torch.zeros(1, len(shifts), num_weights)
    values = torch.zeros(1 << state_bits, num_weights)
    context = torch.zeros(1, dtype=torch.int32)

    def launch() -> None:
        viterbi.search(x, values, shifts, context)

    states = viterbi.BLOCK // (32 * viterbi.NUM_WARPS) << max(shifts)
    return launch, "search_kernel", states


def trellis_values(code: str, rate: float, state_bits: int, tile_rows: int = 64) -> dict:
    return {
        "format": "trellis-v1",
        "tile_rows": tile_rows,
        "code": code,
        "tile_bits": round(256 * rate),
        "state_bits": state_bits,
        "step_weights": 2 if code in ("mul2", "bytes2", "hybrid") else 1,
        "table_bits": 9 if code == "hybrid" else 0,
    }


def trellis_case(
    values: dict, tokens: int, dtype: str, rows: tuple[int, ...] = (4096,), cols: int = 16384
) -> Case:
    """A step of a lane is a tile, or one part of its rows."""
    spec = formats.from_dict(values)
    x = torch.zeros(tokens, cols, dtype=DTYPES[dtype])
    tensors = [packed(spec, own, cols) for own in rows]

    def launch() -> None:
        spec.kernels("triton").matmuls(x, tensors, rows, cols, x.dtype)

    return launch, "matmul_kernel", 256 * min(32, values["tile_rows"]) // values["tile_rows"]


def trellis_decode_case(values: dict, dtype: str, rows: int = 4096, cols: int = 4096) -> Case:
    spec = formats.from_dict(values)
    tensors = packed(spec, rows, cols)

    def launch() -> None:
        spec.kernels("triton").decode(tensors, rows, cols, DTYPES[dtype])

    return launch, "decode_kernel", 256 * min(32, values["tile_rows"]) // values["tile_rows"]


QKV = (4096, 1024, 1024)
GF2 = {
    "format": "trellis-v2",
    "tile_rows": 64,
    "tile_bits": 512,
    "state_bits": 12,
    "masks": [0x1, 0x802, 0x5BA, 0xAC3, 0x925, 0xFFF],
}
BYTES2, BYTES4 = trellis_values("bytes2", 2, 14), trellis_values("bytes4", 3, 12)
CASES: dict[str, tuple[ModuleType, Case]] = {
    "bytes2, 2 bits": (trellis, trellis_case(BYTES2, 1, "bf16")),
    "bytes2, 1.75 bits": (trellis, trellis_case(trellis_values("bytes2", 1.75, 14), 1, "bf16")),
    "bytes2, 2 bits, 16 tokens": (trellis, trellis_case(BYTES2, 16, "bf16")),
    "bytes2, 2 bits, q, k, v": (trellis, trellis_case(BYTES2, 1, "bf16", QKV)),
    "bytes2, 2 bits, fp32": (trellis, trellis_case(BYTES2, 1, "fp32")),
    "bytes2, 2 bits, 16 rows": (
        trellis,
        trellis_case(trellis_values("bytes2", 2, 14, 16), 1, "bf16"),
    ),
    "bytes4, 3 bits": (trellis, trellis_case(BYTES4, 1, "fp16")),
    "bytes4, 4 bits": (trellis, trellis_case(trellis_values("bytes4", 4, 12), 1, "fp16")),
    "bytes4, 2 bits, 2^16": (trellis, trellis_case(trellis_values("bytes4", 2, 16), 1, "fp16")),
    "mul1, 2 bits": (trellis, trellis_case(trellis_values("mul1", 2, 12), 1, "bf16")),
    "mul1, 4 bits, 16 tokens": (trellis, trellis_case(trellis_values("mul1", 4, 12), 16, "bf16")),
    "3inst, 2 bits": (trellis, trellis_case(trellis_values("3inst", 2, 16), 1, "fp16")),
    "hybrid, 2 bits": (trellis, trellis_case(trellis_values("hybrid", 2, 16), 1, "fp16")),
    "gf2, 2 bits": (trellis, trellis_case(GF2, 1, "bf16")),
    "bytes2 decode": (trellis, trellis_decode_case(BYTES2, "bf16")),
    "bytes4 decode": (trellis, trellis_decode_case(BYTES4, "bf16")),
    # Arguments of 1 are constants to the compiler.
    "one tile, product": (trellis, trellis_case(BYTES2, 1, "fp16", (1,), 1)),
    "one tile, sum": (trellis, (trellis_case(BYTES2, 1, "fp16", (1,), 1)[0], "finish_kernel", 0)),
    "one tile, decoded": (trellis, trellis_decode_case(BYTES2, "fp16", 1, 1)),
    "activations as bytes, bf16": (
        trellis,
        (trellis_case(BYTES2, 1, "bf16")[0], "quantize_kernel", 0),
    ),
    "sum of the pieces, bf16": (
        trellis,
        (trellis_case(BYTES2, 1, "bf16", QKV)[0], "finish_kernel", 0),
    ),
    "3inst decode": (trellis, trellis_decode_case(trellis_values("3inst", 2, 16), "fp16")),
    "e8p fp16": (e8p, matmul_case(e8p, E8P, 1, "fp16")),
    "e8p bf16, 8 tokens": (e8p, matmul_case(e8p, E8P, 8, "bf16")),
    "e8p bf16, gate, up": (e8p, matmul_case(e8p, E8P, 1, "bf16", rows=(14336, 14336))),
    "e8p bf16, 16 tokens": (e8p, matmul_case(e8p, E8P, 16, "bf16")),
    "e8p fp16, 64 tokens": (e8p, matmul_case(e8p, E8P, 64, "fp16", rows=(28672,))),
    "e8p fp32": (e8p, matmul_case(e8p, E8P, 1, "fp32")),
    "e81b bf16": (e8p, matmul_case(e8p, E81B, 1, "bf16")),
    "e81b bf16, 28672 rows": (e8p, matmul_case(e8p, E81B, 1, "bf16", rows=(28672,))),
    "e81b fp16, 16 tokens": (e8p, matmul_case(e8p, E81B, 16, "fp16")),
    "lut 1x8, 8 bit, fp16": (lut, matmul_case(lut, lut_values(1, 8, 8), 1, "fp16")),
    "lut 1x4, 8 bit, bf16": (lut, matmul_case(lut, lut_values(1, 4, 8), 1, "bf16")),
    "lut 8x1, 16 bit, fp16": (lut, matmul_case(lut, lut_values(8, 1, 16), 1, "fp16")),
    "lut 6x1, 12 bit, fp16": (lut, matmul_case(lut, lut_values(6, 1, 12), 1, "fp16")),
    "lut 8x1, 8 bit, fp16, 32 tokens": (lut, matmul_case(lut, lut_values(8, 1, 8), 32, "fp16")),
    "e8p decode": (e8p, decode_case(E8P, "fp16")),
    "lut 1x8, 8 bit, decode": (lut, decode_case(lut_values(1, 8, 8), "fp16")),
    "hadamard 4096, fp16": (hadamard, hadamard_case(4096, "fp16")),
    "hadamard 11008, bf16": (hadamard, hadamard_case(11008, "bf16")),
    "hadamard 11008, bf16, gate, up": (hadamard, hadamard_case(11008, "bf16", members=2)),
    "hadamard 14336, fp32": (hadamard, hadamard_case(14336, "fp32")),
    "hadamard, blocks of 128, bf16": (hadamard, hadamard_case(4096, "bf16", 128)),
    "hadamard 4096 to bytes, bf16": (hadamard, quantize_case(4096, "bf16")),
    "hadamard 8192 to bytes, fp16": (hadamard, quantize_case(8192, "fp16")),
    "hadamard, blocks of 128 to bytes, bf16": (hadamard, quantize_case(8192, "bf16", 128)),
    "viterbi 2^16, 2 bits": (viterbi, search_case(16, [2] * 256)),
    "viterbi 2^16, 4 bits": (viterbi, search_case(16, [4] * 256)),
    "viterbi 2^12, 2.5 bits": (viterbi, search_case(12, [2, 3] * 128)),
    "viterbi 2^16, pairs, 2 bits": (viterbi, search_case(16, [4] * 128, 2)),
}


def record(launch: Callable[[], None], modules: tuple[ModuleType, ...]) -> dict[str, Recorder]:
    """Call `launch` with every kernel of the modules replaced by a recorder; these by name."""
    found = {}
    for module in modules:
        for name, value in vars(module).items():
            if name.endswith("_kernel") and isinstance(value, triton.JITFunction):
                found[name] = (module, Recorder(value))
    for name, (module, recorder) in found.items():
        setattr(module, name, recorder)
    try:
        launch()
    finally:
        for name, (module, recorder) in found.items():
            setattr(module, name, recorder.kernel)
    return {name: recorder for name, (_, recorder) in found.items()}


def main() -> None:
    """Answer each line of the standard input, "target case", with a line of figures."""
    assert os.environ.get("TRITON_INTERPRET", "0") in ("", "0"), "the interpreter compiles nothing"
    for line in sys.stdin:
        sm, _, name = line.strip().partition(" ")
        module, (launch, kernel, weights) = CASES[name]
        compiled = compile_recorded(record(launch, (module, activations))[kernel], int(sm))
        print(json.dumps(measure(compiled, weights)), flush=True)


if __name__ == "__main__":
    main()
