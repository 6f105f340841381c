"""Linears in formats of other tools, as files of random tensors with what others decode of them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.tiny import save_tiny
from vqllm.checkpoint.shards import DTYPE_NAMES, StoredTensor
from vqllm.foreign.coded_model import CodedModule, coded_model


@dataclass(frozen=True)
class Case:
    """A linear: `expected` is what another program decodes of `tensors`."""

    name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    expected: Tensor

    @property
    def method(self) -> str:
        return self.config["quant_method"]

    @property
    def is_held(self) -> bool:
        """Whether our own format holds it."""
        return self.method in HELD and "act-order" not in self.name

    @property
    def rtol(self) -> float:
        """Most programs compute in float16, where we have float32; then the last bits differ."""
        return 1e-3 if self.expected.dtype == torch.float16 else 1e-6

    @property
    def atol(self) -> float:
        return 1e-6 * float(self.expected.abs().max())


MIXTURES = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
}
"""Models whose experts are stored one by one, under other names than in memory or the same."""
DATA = Path(__file__).parents[1] / "data" / "foreign"
HELD = ("gptq", "awq", "compressed-tensors", "aqlm", "exl3")


def cases(folder: Path) -> list[Case]:
    """All cases of a folder."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            config = json.loads(file.metadata()["quantization_config"])
        found.append(Case(path.stem, config, tensors, tensors.pop("expected")))
    return found


def told(case: Case) -> str:
    """Its name, for pytest."""
    return case.name


def linear_of(
    case: Case,
    tensors: Mapping[str, Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
) -> CodedModule:
    """The linear of a case, or of changed tensors or another configuration."""
    tensors = case.tensors if tensors is None else tensors
    stored = {f"model.layers.0.mlp.up_proj.{key}": value for key, value in tensors.items()}
    headers = {
        key: StoredTensor(DTYPE_NAMES[value.dtype], tuple(value.shape), value.nbytes)
        for key, value in stored.items()
    }
    values = {"quantization_config": case.config if config is None else config}
    model = coded_model(Path("folder"), values, headers, stored.__getitem__)
    assert model is not None
    (module,) = model.modules.values()
    return module


def write_coded(
    folder: Path, method: str, model: str = "llama", **changes: Any
) -> dict[str, Tensor]:
    """A tiny model whose linears are random codes of a format; returns its dense weights.

    Args:
        model: "llama", or one of MIXTURES.
        changes: keys of its `quantization_config` that replace the usual ones.
    """
    sizes = SIZES if method == "exl3" else {"intermediate_size": 128}
    save_tiny(folder, model, dtype=torch.float16, **sizes | MIXTURES.get(model, {}))
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    dense = {}
    parts = ("layers.", "lm_head") if method == "exl3" else ("layers.",)
    for key in [key for key in tensors if any(part in key for part in parts)]:
        if tensors[key].dim() == 1 or len(tensors[key]) < 32:  # norms, routers
            continue
        name, (rows, cols) = key.removesuffix(".weight"), tensors.pop(key).shape
        own = RANDOM[method](rows, cols, generator)
        tensors |= {f"{name}.{end}": value.contiguous() for end, value in own.items()}
        case = Case(name, CONFIGS[method] | changes, own, torch.empty(0))
        dense[key] = linear_of(case).decode(torch.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = CONFIGS[method] | changes
    path.write_text(json.dumps(config))
    return dense


def _words(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).int()


def _scales(generator: torch.Generator, *shape: int) -> Tensor:
    return (torch.rand(shape, generator=generator) * 0.02 + 0.01).half()


def _gptq(rows: int, cols: int, generator: torch.Generator) -> dict[str, Tensor]:
    num_groups = cols // 32
    return {
        "qweight": _words(generator, cols // 8, rows),
        "qzeros": torch.full((num_groups, rows // 8), 0x77777777, dtype=torch.int32),
        "scales": _scales(generator, num_groups, rows),
        "g_idx": (torch.arange(cols) // 32).int(),
    }


def _awq(rows: int, cols: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "qweight": _words(generator, cols, rows // 8),
        "qzeros": _words(generator, cols // 32, rows // 8),
        "scales": _scales(generator, cols // 32, rows),
    }


def _compressed(rows: int, cols: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "weight_packed": _words(generator, rows, cols // 8),
        "weight_scale": _scales(generator, rows, cols // 32),
        "weight_shape": torch.tensor([rows, cols]),
    }


def _aqlm(rows: int, cols: int, generator: torch.Generator) -> dict[str, Tensor]:
    codes = torch.randint(-128, 128, (rows, cols // 8, 2), generator=generator)
    return {
        "codes": codes.to(torch.int8),
        "codebooks": torch.randn((2, 256, 1, 8), generator=generator).half(),
        "scales": _scales(generator, rows, 1, 1, 1) * 5,
    }


def _exl3(rows: int, cols: int, generator: torch.Generator) -> dict[str, Tensor]:
    words = torch.randint(-(1 << 15), 1 << 15, (cols // 16, rows // 16, 64), generator=generator)
    scales = {
        name: _scales(generator, size)
        * 10
        * (1 - 2 * torch.randint(0, 2, (size,), generator=generator).half())
        for name, size in (("suh", cols), ("svh", rows))
    }
    mul1 = torch.tensor(0x83DCD12D - (1 << 32), dtype=torch.int32)
    return {"trellis": words.short(), "mul1": mul1, **scales}


RANDOM = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "aqlm": _aqlm,
    "exl3": _exl3,
}
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 64,
    "num_attention_heads": 2,
}
"""What EXL3 asks for: multiples of 128 everywhere."""
_WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": _WEIGHTS}},
    },
    "aqlm": {
        "quant_method": "aqlm",
        "num_codebooks": 2,
        "nbits_per_codebook": 8,
        "in_group_size": 8,
        "out_group_size": 1,
    },
    "exl3": {"quant_method": "exl3", "version": "1.6.5", "bits": 4.0, "head_bits": 4},
}
