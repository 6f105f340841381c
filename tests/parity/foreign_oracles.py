"""Random linears in the formats of other tools, each decoded by a program that its authors or
others wrote: a file a case, with the stored tensors, what the program makes of them (`expected`),
and the `quantization_config` as metadata.

Runs in an environment of its own, which the project does not need; it imports nothing of vqllm:

    python -m venv oracles && . oracles/bin/activate
    pip install torch safetensors numpy scipy transformers
    pip install --no-deps aqlm==1.1.7 compressed-tensors==0.20.1 gptqmodel==7.7.0
    pip install PyPcre logbar tokenicer device-smi defuser threadpoolctl pydantic loguru
    pip download --no-deps --no-binary :all: autoawq==0.2.9     # unpacked, on PYTHONPATH
    git clone https://github.com/Cornell-RelaxML/quip-sharp
    git clone -b release20240109 https://github.com/Cornell-RelaxML/quip-sharp quip-sharp-old
    git clone https://github.com/Cornell-RelaxML/qtip     # all three folders, on PYTHONPATH
    python tests/parity/foreign_oracles.py SEED FOLDER

Cases whose program is missing are left out. Of QuIP# and QTIP single files are imported, those that
compute in plain torch.
"""

# pyright: reportMissingImports=false

import importlib.util
import itertools
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"

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


def vptq() -> Iterator[Case]:
    from gptqmodel.nn_modules.qlinear.vptq_torch import VPTQLinear
    from gptqmodel.utils.backend import BACKEND

    cases = {
        "vptq-8-8x1": {"vector_lens": (-1, 8), "num_centroids": (-1, 256)},
        "vptq-5+7-6x1-bias": {
            "vector_lens": (-1, 6),
            "num_centroids": (-1, 32),
            "num_res_centroids": (-1, 128),
            "group_num": 2,
            "enable_norm": True,
            "enable_perm": True,
        },
        "vptq-9+9-4x1": {
            "vector_lens": (-1, 4),
            "num_centroids": (-1, 512),
            "num_res_centroids": (-1, 512),
            "enable_norm": True,
        },
        "vptq-outliers": {
            "vector_lens": (4, 6),
            "num_centroids": (16, 64),
            "npercent": 5.0,
            "enable_norm": True,
            "norm_dim": 1,
            "enable_perm": True,
        },
        "vptq-outliers-groups": {
            "vector_lens": (4, 3),
            "num_centroids": (32, 16),
            "num_res_centroids": (-1, 8),
            "npercent": 5.0,
            "group_num": 3,
            "enable_perm": True,
        },
    }
    for name, options in cases.items():
        linear = VPTQLinear(
            bits=2,
            in_features=COLS,
            out_features=ROWS,
            dtype=torch.float32,
            backend=BACKEND.VPTQ_TORCH,
            **options,
        )
        size = ROWS if linear.norm_dim else COLS
        norm = {"weight_scale": scales(size), "weight_bias": scales(size) * name.endswith("bias")}
        tables = {"centroids": 1.0, "res_centroids": 0.1, "outlier_centroids": 4.0}
        tensors: dict[str, Tensor] = {}
        for key, stored in linear.state_dict().items():
            kind = key.removesuffix(".weight")
            if kind in tables:
                tensors[key] = (torch.randn(stored.shape) * tables[kind]).half()
            elif kind == "indices":
                tensors[key] = words(*stored.shape)
            elif kind == "outlier_indices":
                entries = linear.num_centroids_pair[0]
                tensors[key] = torch.randint(0, entries, stored.shape).to(torch.int16)
            else:
                tensors[key] = norm[kind] if kind in norm else torch.randperm(COLS).to(torch.int16)
        linear.load_state_dict(
            {key: value.to(linear.state_dict()[key]) for key, value in tensors.items()}
        )
        linear._validate_loaded_state()
        layer = {
            "bias": False,
            "in_features": COLS,
            "out_features": ROWS,
            "vector_lens": list(linear.vector_lens),
            "num_centroids": list(linear.num_centroids_pair),
            "num_res_centroids": list(linear.num_res_centroids_pair),
            "group_num": linear.group_num,
            "group_size": linear.group_size,
            "outlier_size": linear.outlier_size,
            "indices_as_float": False,
            "is_indice_packed": True,
            "enable_norm": linear.enable_norm,
            "norm_dim": linear.norm_dim,
            "enable_perm": linear.enable_perm,
            "vector_quant_dim": "out",
        }
        config = {"quant_method": "vptq", "shared_layer_config": {"up_proj": layer}}
        yield name, config, tensors, linear.dequantize()


def _file(path: str) -> Any:
    """A module of a source tree on the path, without what its package imports; its imports of
    compiled parts find empty modules."""
    name = path.removesuffix(".py").replace("/", ".")
    if hasattr(sys.modules.get(name), "__file__"):
        return sys.modules[name]
    found = next((Path(own) / path for own in sys.path if (Path(own) / path).is_file()), None)
    if found is None:
        raise ImportError(f"{path} is not there")

    def hadamard_transform(x: Tensor, scale: float) -> Tensor:
        from scipy.linalg import hadamard

        return x @ torch.from_numpy(hadamard(x.shape[-1])).to(x.dtype) * scale

    stubs = {
        "quiptools_cuda": {},
        "lib": {},
        "lib.utils": {"clean": lambda: None},
        "lib.codebook": {"kdict": {}},
        "lib.utils.matmul_had": {},
        "lib.utils.kernel_check": {},
        "lib.utils.kernel_decompress": {},
        "fast_hadamard_transform": {"hadamard_transform": hadamard_transform},
    }
    for stub, values in stubs.items():
        if stub not in sys.modules:
            sys.modules[stub] = types.ModuleType(stub)
            vars(sys.modules[stub]).update(values)
    sys.modules["lib"].utils = sys.modules["lib.utils"]
    spec = importlib.util.spec_from_file_location(name, found)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quip() -> Iterator[Case]:
    torch.library.impl_abstract = torch.library.register_fake  # its former name
    had = _file("lib/utils/matmul_had.py")
    e8p = _file("lib/codebook/latticee8_padded12.py")
    e8p3 = _file("lib/codebook/latticee8_padded12_rvq3bit.py")
    e8p4 = _file("lib/codebook/latticee8_padded12_rvq4bit.py")
    d4 = _file("lib/codebook/latticed4.py")
    hi = _file("lib/codebook/half_integer_4bit_1col.py")
    first = e8p._E8P_GRID

    def both(second: Tensor, scale: float) -> Callable[[Tensor], Tensor]:
        return lambda index: first[index >> 16] + second[index & 0xFFFF] / scale

    cases: list[tuple[str, Any, int, int, int, Callable[[Tensor], Tensor], int, dict[str, Any]]] = [
        ("E8P12", e8p.E8P12_codebook(True), 7, 32, 192, lambda index: first[index], 16, {}),
        (
            "E8P12RVQ3B", e8p3.E8P12RVQ3B_codebook(True), 18, 48, 64,
            both(e8p3.get_e81bgrid(), 2.04), 0, {"rescale_WH": True},
        ),
        ("E8P12RVQ4B", e8p4.E8P12RVQ4B_codebook(True), 17, 16, 128, both(first, 3.45), 32, {}),
        (
            "E8P12RVQ4B", e8p4.E8P12RVQ4B_codebook(True), 17, 16, 64, both(first, 3.2), 32,
            {"resid_scale_override": 3.2},
        ),
        ("D4", d4.D4_codebook(True), 0, 56, 64, d4.D4_codebook(True).by_idxs, 8, {"lora_rank": 4}),
        ("HI4B1C", hi.HI4B1C_codebook(True), 10, 20, 72, hi.HI4B1C_codebook(True).by_idxs, 4, {}),
    ]  # fmt: skip
    for name, book, number, rows, cols, decode, bits, options in cases:
        index = torch.randint(0, 1 << max(bits, 16) if name.startswith("E8P") else 1 << bits,
                              (rows, cols // book.codesz))  # fmt: skip
        if name == "E8P12RVQ3B":
            index = (index << 16) + torch.randint(0, 256, index.shape)
        inner = decode(index).reshape(rows, cols).float()
        packed = book.maybe_pack_idxs(index.clone()).to(book.idx_dtype)
        if name == "D4":  # as its unpack_quip does
            m, n = packed.shape
            packed = packed.view(m, n // 4, 4).permute(1, 0, 2).reshape(m, n)
        tensors = {
            "Qidxs": packed,
            "SU": (torch.randn(cols).sign() * (1 + torch.rand(cols))).half(),
            "SV": (torch.randn(rows).sign() * scales(rows).float()).half(),
            "Wscale": torch.tensor(0.75 if name in ("D4", "HI4B1C") else 1.0),
            "codebook_id": torch.tensor(number),
        }
        inner *= tensors["Wscale"]
        if rank := options.get("lora_rank"):
            tensors |= {"A": torch.randn(rows, rank).half(), "B": torch.randn(rank, cols).half()}
            inner += tensors["A"].float() @ tensors["B"].float()
        # As its incoherence_process does.
        dense = had.matmul_hadU(inner) * tensors["SU"].float()
        dense = (had.matmul_hadU(dense.T.contiguous()) * tensors["SV"].float()).T
        if options.get("rescale_WH"):
            tensors["scaleWH"] = torch.rand(cols) + 0.5
            dense = dense / tensors["scaleWH"]
        config = {
            "lora_rank": 0,
            "rescale_WH": False,
            "codebook": name,
            "codebook_version": book.version,
            "codesz": book.codesz,
            "idx_dtype": str(book.idx_dtype),
            "packsz": book.packsz,
            "resid_scale_override": -1,
            "model_version": 1,
            **options,
        }
        end = "-scale" if "resid_scale_override" in options else ""
        yield f"quip-{name.lower()}{end}", config, tensors, dense


def qtip() -> Iterator[Case]:
    check = _file("lib/utils/kernel_check.py")
    _file("lib/utils/kernel_decompress.py")
    had = _file("lib/utils/matmul_had.py")
    bitshift = _file("lib/codebook/bitshift.py")
    cases: list[tuple[str, dict[str, Any], int, int, int]] = [
        ("quantlut_sym", {"K": 2, "V": 2, "tlut_bits": 9}, 0, 32, 64),
        ("quantlut_sym", {"K": 3, "V": 2, "tlut_bits": 9}, 0, 64, 32),
        ("quantlut_sym", {"K": 4, "V": 2, "tlut_bits": 9}, 2, 64, 64),
        ("quantlut_sym", {"K": 2, "V": 2, "tlut_bits": 8}, 0, 32, 48),
        ("quantlut", {"K": 3, "V": 1, "tlut_bits": 7}, 0, 32, 48),
        ("lut", {"K": 2, "V": 2, "tlut_bits": 10, "L": 10}, 0, 32, 32),
        ("1mad", {"K": 2, "V": 1, "tlut_bits": 0}, 1, 48, 64),
        ("2mad", {"K": 1, "V": 1, "tlut_bits": 0, "L": 12}, 0, 24, 64),
        ("3inst", {"K": 5, "V": 1, "tlut_bits": 0, "td_x": 8, "td_y": 16}, 0, 40, 64),
    ]
    for mode, options, side, rows, cols in cases:
        config = {"td_x": 16, "td_y": 16, "L": 16, "decode_mode": mode, **options}
        if mode == "2mad":
            config["td_x"] = 8
        unit = config["td_x"] * config["td_y"]
        size = (rows * cols // unit, unit * config["K"] // 16)
        tensors = {
            "trellis": torch.randint(-(1 << 15), 1 << 15, size).to(torch.int16),
            "SU": (torch.randn(cols).sign() * (1 + torch.rand(cols))).half(),
            "SV": torch.randn(rows).sign() * scales(rows).float(),
            "rcp": torch.tensor(side),
            "tp_rank": torch.tensor(2),
        }
        if mode.endswith("lut") or mode.endswith("sym"):
            tensors["tlut"] = torch.randn(1 << config["tlut_bits"], config["V"]).half()
        arguments = [config[key] for key in ("td_x", "td_y", "L", "K", "V", "tlut_bits")]
        has_kernel = check.has_kernel(mode, *arguments[2:], *arguments[:2])
        table = tensors.get("tlut")
        linear = bitshift.BitshiftLinear(
            *arguments, mode, dtype=torch.float32, tlut=table, has_kernel=has_kernel
        )
        sides = [part for size in (cols, rows) for part in had.get_hadK(size)]
        linear.cache_hatW(
            tensors["trellis"], sides[0], sides[2], sides[1], sides[3], rows, cols, side, 2
        )
        dense = linear.hatW * linear.scale * tensors["SU"].float() * tensors["SV"][:, None]
        config |= {"codebook": "bitshift", "codebook_version": 0, "split_for_tp": side > 0}
        end = "-kernel" if has_kernel else ""
        yield f"qtip-{mode}-{config['K']}{end}", config, tensors, dense


SOURCES: dict[str, Callable[[], Iterator[Case]]] = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "aqlm": aqlm,
    "exl3": exl3,
    "vptq": vptq,
    "quip": quip,
    "qtip": qtip,
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
