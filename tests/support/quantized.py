"""Tiny models of every type, quantized with a cheap recipe, and what to compare them with."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tests.support.architectures import model_class, save_tiny
from tests.support.mixtures import logits
from vqllm import api
from vqllm.checkpoint.dequantize import dequantize_checkpoint
from vqllm.recipes import Recipe, from_dict
from vqllm.runtime import VQLinear


def recipe(**changes: object) -> Recipe:
    """Two bits a weight, rounded at once."""
    values = {
        "name": "cheap",
        "calibration": {"sequences": 16, "length": 32},
        "transforms": [{"type": "hadamard", "side": "both"}],
        "codec": {"type": "e8p"},
        "rounding": {"type": "nearest"},
    }
    return from_dict({**values, **changes}, "cheap")


def write_words(path: Path) -> Path:
    """Lines of random words, and so of most tokens of the tokenizer."""
    generator = torch.Generator().manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?éüñß"
    lines = []
    for _ in range(60):
        picks = torch.randint(len(letters) + 12, (120,), generator=generator)
        lines.append("".join(letters[pick] if pick < len(letters) else " " for pick in picks))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def quantize(source: Path, output: Path, **options: Any) -> Any:
    """`api.quantize` on a text beside the output, without evaluation."""
    given: dict[str, Any] = {"recipe": recipe(), "evaluate": False, "device": "cpu"}
    text = options.pop("calibration", None) or write_words(output.with_suffix(".txt"))
    return api.quantize(source, output, **{**given, **options, "calibration": text})


@dataclass(frozen=True)
class Quantized:
    """A tiny model of a type: as it was, quantized, and as dense weights again."""

    model_type: str
    source: Path
    output: Path

    @property
    def dense(self) -> Path:
        """The folder that `vqllm dequantize` writes."""
        folder = self.output.with_name("dense")
        if not folder.exists():
            dequantize_checkpoint(self.output, folder, dtype="float32")
        return folder

    def load(self, folder: Path, cls: Any = None, **options: Any) -> Any:
        """The model in a folder, with every tensor that its class has and no other."""
        cls = cls or model_class(self.model_type)
        options = {"dtype": torch.float32, **options}
        model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        return model.eval()


Make = Callable[..., Quantized]


def maker(root: Path) -> Make:
    """A function from a model type to the model quantized; each is made once."""
    made: dict[str, Quantized] = {}

    def make(model_type: str) -> Quantized:
        if model_type not in made:
            folder = root / model_type.replace(" ", "_")
            source = save_tiny(model_type, folder / "source")
            quantize(source, folder / "quantized")
            made[model_type] = Quantized(model_type, source, folder / "quantized")
        return made[model_type]

    return make


def assert_close(got: Tensor, wanted: Tensor) -> None:
    """Equal but for the order of sums."""
    assert got.isfinite().all()
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5


def assert_same_logits(model: Any, other: Any) -> None:
    assert_close(logits(model), logits(other))


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder by its name in the files."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def assert_same_tensors(folder: Path, other: Path) -> None:
    ours, theirs = stored(folder), stored(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name


def decoder_layers(model: Any) -> dict[str, nn.Module]:
    """The decoder layers of the text part of a model, by name: the list of modules with the most
    weights that is in no tower, and those of the same class."""
    towers = ("vision", "visual", "audio", "vqmodel", "encoder", "mtp")
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and not any(word in name for word in towers)
    }
    outer = {n: m for n, m in lists.items() if not any(n.startswith(f"{o}.") for o in lists)}
    largest = max(outer.values(), key=lambda m: sum(p.numel() for p in m.parameters()))
    return {
        f"{name}.{index}": layer
        for name, module in outer.items()
        if type(module[0]) is type(largest[0])
        for index, layer in enumerate(module)
    }


def share_quantized(source: Any, quantized: Any) -> float:
    """The share of the weights of a model's decoder layers that is quantized.

    Args:
        source: the original, as transformers loads it.
        quantized: the quantized one, as transformers loads it with vqllm.
    """
    layers = decoder_layers(source)
    every = {id(p): p.numel() for layer in layers.values() for p in layer.parameters()}
    packed = sum(
        module.spec.rows * module.spec.cols
        for name, module in quantized.named_modules()
        if isinstance(module, VQLinear) and any(name.startswith(f"{own}.") for own in layers)
    )
    return packed / sum(every.values())
