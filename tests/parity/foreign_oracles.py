"""Random linears in the formats of other tools, each decoded by a program that its authors or
others wrote: a file a case, with the stored tensors, what the program makes of them (`expected`),
and the `quantization_config` as metadata.

Runs in an environment of its own, which the project does not need; it imports nothing of vqllm:

    python -m venv oracles && . oracles/bin/activate
    pip install torch safetensors numpy scipy transformers
    pip install --no-deps aqlm==1.1.7 compressed-tensors==0.20.1 gptqmodel==7.7.0
    pip install PyPcre logbar tokenicer device-smi defuser threadpoolctl pydantic loguru
    pip download --no-deps --no-binary :all: autoawq==0.2.9     # unpacked, on PYTHONPATH
    python tests/parity/foreign_oracles.py SEED FOLDER

Cases whose program is missing are left out.
"""

# pyright: reportMissingImports=false

import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

ROWS, COLS = 32, 96
Case = tuple[str, dict[str, Any], dict[str, Tensor], Tensor]


def words(*shape: int) -> Tensor:
    return torch.randint(-(1 << 31), 1 << 31, shape).int()


def scales(*shape: int) -> Tensor:
    return (torch.rand(shape) * 0.02 + 0.001).half()


def gptq() -> Iterator[Case]:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.backend import BACKEND
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    for bits in (2, 3, 4, 8):
        for version in ("gptq", "gptq_v2"):
            for order in (False, True):
                group = 32
                linear = TorchLinear(
                    bits=bits,
                    group_size=group,
                    sym=True,
                    desc_act=order,
                    in_features=COLS,
                    out_features=ROWS,
                    bias=False,
                    pack_dtype=torch.int32,
                    backend=BACKEND.GPTQ_TORCH,
                    register_buffers=True,
                )
                group_C = torch.arange(COLS) // group
                tensors = {
                    "qweight": words(COLS * bits // 32, ROWS),
                    "qzeros": words(COLS // group, ROWS * bits // 32),
                    "scales": scales(COLS // group, ROWS),
                    "g_idx": (group_C[torch.randperm(COLS)] if order else group_C).int(),
                }
                if bits != 3 and version == "gptq":
                    # A symbol of all ones is a zero point of 2^bits, which no program agrees on.
                    ones = sum(1 << at for at in range(0, 32, bits))
                    tensors["qzeros"] &= torch.tensor(~ones, dtype=torch.int64).int()
                for name, value in tensors.items():
                    getattr(linear, name).data = value.clone()
                if version == "gptq":
                    convert_gptq_v1_to_v2_format_module(linear, bits, torch.int32)
                linear.post_init()
                config = {
                    "quant_method": "gptq",
                    "bits": bits,
                    "group_size": group,
                    "desc_act": order,
                    "sym": True,
                    "checkpoint_format": version,
                }
                name = f"{version}-{bits}{'-act-order' if order else ''}"
                yield name, config, tensors, linear.dequantize_weight().T


def awq() -> Iterator[Case]:
    # The package's __init__ asks for more than its unpacking does.
    found = importlib.util.find_spec("awq")
    if found is None or not found.submodule_search_locations:
        raise ImportError("awq is not there")
    path = Path(found.submodule_search_locations[0]) / "utils" / "packing_utils.py"
    spec = importlib.util.spec_from_file_location("packing_utils", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for group in (32, -1):
        size = COLS if group == -1 else group
        tensors = {
            "qweight": words(COLS, ROWS // 8),
            "qzeros": words(COLS // size, ROWS // 8),
            "scales": scales(COLS // size, ROWS),
        }
        config = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group,
            "version": "gemm",
            "zero_point": True,
        }
        dense = module.dequantize_gemm(*tensors.values(), 4, size)
        yield f"awq-{'rows' if group == -1 else group}", config, tensors, dense.T


def compressed_tensors() -> Iterator[Case]:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    for bits in (4, 8):
        for group in (32, None):
            for symmetric in (True, False):
                weights = {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": symmetric,
                    "strategy": "group" if group else "channel",
                    "group_size": group,
                }
                num_groups = COLS // (group or COLS)
                tensors = {
                    "weight_packed": words(ROWS, COLS * bits // 32),
                    "weight_scale": scales(ROWS, num_groups),
                    "weight_shape": torch.tensor([ROWS, COLS]),
                }
                if not symmetric:
                    tensors["weight_zero_point"] = words(ROWS * bits // 32, num_groups)
                scheme = QuantizationScheme(targets=["Linear"], weights=weights)
                dense = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
                config = {
                    "quant_method": "compressed-tensors",
                    "format": "pack-quantized",
                    "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
                    "ignore": ["lm_head"],
                }
                name = f"compressed-{bits}-{group or 'rows'}{'' if symmetric else '-zeros'}"
                yield name, config, tensors, dense


def aqlm() -> Iterator[Case]:
    from aqlm.utils import _dequantize_weight, unpack_int_data

    for num, bits, rows, cols in ((1, 16, 1, 8), (2, 8, 1, 8), (3, 5, 2, 4), (1, 8, 1, 16)):
        bits = min(bits, 10)  # of 16 bits the table alone would take a megabyte
        low, high = -(1 << bits - 1), 1 << bits - 1
        integers = torch.int8 if bits <= 8 else torch.int16
        tensors = {
            "codes": torch.randint(low, high, (ROWS // rows, COLS // cols, num)).to(integers),
            "codebooks": torch.randn(num, 1 << bits, rows, cols).half(),
            "scales": scales(ROWS // rows, 1, 1, 1),
        }
        codes = unpack_int_data(tensors["codes"], bits)
        dense = _dequantize_weight(codes, tensors["codebooks"].float(), tensors["scales"].float())
        config = {
            "quant_method": "aqlm",
            "num_codebooks": num,
            "nbits_per_codebook": bits,
            "in_group_size": cols,
            "out_group_size": rows,
            "linear_weights_not_to_quantize": ["lm_head.weight"],
        }
        yield f"aqlm-{num}x{bits}-{rows}x{cols}", config, tensors, dense


def exl3() -> Iterator[Case]:
    from gptqmodel.nn_modules.exllamav3_torch import ExllamaV3TorchLinear

    class HalfBits(ExllamaV3TorchLinear):
        """The program knows whole bits only: the states of half bits are taken one by one."""

        def _unpack_indices(self, start: int = 0, stop: int | None = None) -> Tensor:
            return torch.tensor(
                [[states(tile) for tile in row[start:stop]] for row in self.trellis.tolist()]
            )

    factors = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}
    forms = (("3inst", 3), ("mcg", 2), ("mul1", 5), ("mul1", 1.5), ("mul1", 3.5))
    for generator, bits, end in (*((*own, "") for own in forms), ("mcg", 4, "-signs")):
        tensors = {
            "trellis": torch.randint(-(1 << 15), 1 << 15, (8, 8, int(16 * bits))).to(torch.int16),
            "suh": torch.randn(128).half(),
            "svh": torch.randn(128).half(),
        }
        if end:
            tensors |= {name: tensors[name].sign() for name in ("suh", "svh")}
        if generator in factors:
            tensors[generator] = torch.tensor(factors[generator] - (1 << 32), dtype=torch.int32)
        program = ExllamaV3TorchLinear if bits == int(bits) else HalfBits
        linear = program.from_tensors(
            in_features=128, out_features=128, name="linear", tensors=dict(tensors)
        )
        dense = linear.get_weight_tensor(torch.float32).T
        if end:
            tensors |= {name[:2]: bit_field(tensors.pop(name)) for name in ("suh", "svh")}
        config = {"quant_method": "exl3", "version": "0.0.1", "bits": float(bits), "head_bits": 6}
        yield f"exl3-{generator}-{bits}{end}", config, tensors, dense


def states(tile: list[int]) -> list[int]:
    """The 16 bits before the end of each symbol of a tile of half bits, whose symbols have k and
    k + 1 bits in turn."""
    words = [(tile[i + 1] & 0xFFFF, tile[i] & 0xFFFF) for i in range(0, len(tile), 2)]
    ring = "".join(f"{half:016b}" for word in words for half in word)
    few = len(tile) // 16
    ends = itertools.accumulate((few, few + 1) * 128)
    return [int((ring + ring)[end + len(ring) - 16 : end + len(ring)], 2) for end in ends]


def bit_field(signs: Tensor) -> Tensor:
    """A bit for each number, 1 where it is negative, the first one lowest: int16 words."""
    bits = (signs < 0).long().view(-1, 16) << torch.arange(16)
    return bits.sum(1).to(torch.int16)


SOURCES: dict[str, Callable[[], Iterator[Case]]] = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "aqlm": aqlm,
    "exl3": exl3,
}


def main(seed: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for method, cases in SOURCES.items():
        torch.manual_seed(seed)
        try:
            for name, config, tensors, expected in cases():
                stored = {key: value.contiguous() for key, value in tensors.items()}
                stored["expected"] = expected.contiguous()
                metadata = {"quantization_config": json.dumps(config)}
                save_file(stored, folder / f"{name}.safetensors", metadata)
        except ImportError as error:
            print(f"{method}: left out, {error!r}", file=sys.stderr)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
