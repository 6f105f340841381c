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
        return self.config.get("quant_method", "")

    @property
    def is_held(self) -> bool:
        """Whether our own format holds it."""
        return self.method in HELD and not self.name.endswith(("act-order", "bias"))

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
HELD = ("gptq", "awq", "compressed-tensors", "aqlm", "vptq", "exl3")


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
    config = case.config if config is None else config
    values = {"quantization_config" if "quant_method" in config else "quip_params": config}
    model = coded_model(Path("folder"), values, _headers(stored), stored.__getitem__)
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
    config, described = json.loads((folder / "config.json").read_text()), CONFIGS[method] | changes
    for name, (rows, cols) in _without_linears(tensors, method).items():
        own = RANDOM[method](rows, cols, generator)
        if name.endswith(("qkv_proj", "upgate_proj")):
            own["fuse_scales"] = torch.rand(3 if "qkv" in name else 2, generator=generator) + 0.5
        tensors |= {f"{name}.{end}": value.contiguous() for end, value in own.items()}
        if method == "vptq":
            layers = described.get("config_for_layers", {})
            described = described | {"config_for_layers": layers | {name: vptq_layer(rows, cols)}}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config["quantization_config" if "quant_method" in described else "quip_params"] = described
    (folder / "config.json").write_text(json.dumps(config))
    return {f"{name}.weight": weight for name, weight in decoded(tensors, config).items()}


def decoded(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of all linears in these tensors, float32."""
    model = coded_model(Path("folder"), config, _headers(tensors), tensors.__getitem__)
    assert model is not None
    return {name: own.decode(torch.float32) for name, own in model.modules.items()}


def _without_linears(tensors: dict[str, Tensor], method: str) -> dict[str, tuple[int, int]]:
    """Takes the linears of the layers out, and the head if the method stores it; their sizes by
    name, as the method stores them."""
    fused, places = method == "quip#", ("layers.", "lm_head") if method == "exl3" else ("layers.",)
    parts = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    parts |= {"up_proj": "upgate_proj", "gate_proj": "upgate_proj"}
    found: dict[str, tuple[int, int]] = {}
    stored = [key for key in tensors if any(place in key for place in places)]
    # Not norms, nor routers.
    for key in [key for key in stored if tensors[key].dim() == 2 and len(tensors[key]) >= 32]:
        parent, dot, name = key.removesuffix(".weight").rpartition(".")
        name = f"{parent}{dot}{parts.get(name, name) if fused else name}"
        rows, cols = tensors.pop(key).shape
        found[name] = (found.get(name, (0, 0))[0] + rows, cols)
    return found


def _headers(tensors: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    return {
        key: StoredTensor(DTYPE_NAMES[value.dtype], tuple(value.shape), value.nbytes)
        for key, value in tensors.items()
    }


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


def _vptq(rows: int, cols: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "indices": _words(generator, 1, rows // 4, cols // 2),
        "centroids.weight": torch.randn((1, 256 * 4), generator=generator).half(),
        "res_centroids.weight": torch.randn((1, 256 * 4), generator=generator).half() * 0.1,
        "perm": torch.randperm(cols, generator=generator).to(torch.int16),
    }


def vptq_layer(rows: int, cols: int) -> dict[str, Any]:
    """The options of a linear of VPTQ of 8 + 8 bits for 4 outputs."""
    return {
        "in_features": cols,
        "out_features": rows,
        "vector_lens": [-1, 4],
        "num_centroids": [-1, 256],
        "num_res_centroids": [-1, 256],
        "group_num": 1,
        "group_size": cols,
        "outlier_size": 0,
        "is_indice_packed": True,
        "enable_norm": False,
        "enable_perm": True,
    }


def _rotated(rows: int, cols: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "SU": torch.randn(cols, generator=generator).sign().half(),
        "SV": _scales(generator, rows),
    }


def _quip(rows: int, cols: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "Qidxs": _words(generator, rows, cols // 16).view(torch.int64),
        "Wscale": torch.tensor(1.0),
        "codebook_id": torch.tensor(7),
        **_rotated(rows, cols, generator),
    }


def _qtip(rows: int, cols: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "trellis": _words(generator, rows * cols // 256, 16).view(torch.int16),
        "tlut": torch.randn((512, 2), generator=generator).half(),
        "rcp": torch.tensor(0),
        "tp_rank": torch.tensor(8),
        **_rotated(rows, cols, generator),
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
    "vptq": _vptq,
    "quip#": _quip,
    "qtip": _qtip,
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
    "vptq": {"quant_method": "vptq"},
    "quip#": {"codebook": "E8P12", "codebook_version": 1, "lora_rank": 0, "rescale_WH": False},
    "qtip": {
        "codebook": "bitshift",
        "decode_mode": "quantlut_sym",
        "L": 16,
        "K": 2,
        "V": 2,
        "tlut_bits": 9,
        "td_x": 16,
        "td_y": 16,
    },
    "exl3": {"quant_method": "exl3", "version": "1.6.5", "bits": 4.0, "head_bits": 4},
}
