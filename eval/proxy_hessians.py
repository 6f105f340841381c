"""Weights and Hessians of chosen layers of a model, measured once and kept in the cache.

The layers run with their original weights. H is measured on every second calibration sequence, and
again on the others: what is rounded with the first is judged with both.
"""

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vqllm.calibration.data.calibration_set import calibration_sequences
from vqllm.calibration.layer_calibrator import LayerCalibrator
from vqllm.calibration.layer_stream import LayerStream
from vqllm.hf.decoder_layers import linears_of
from vqllm.models import resolve as models
from vqllm.models.cache import build_once, cache_dir

FILE = "problems.safetensors"
HALVES = ("fit", "check")
ACTIVATIONS = 1 << 30
"""Bytes of hidden states in memory."""


@dataclass(frozen=True)
class Problem:
    """The linears of one input group: W [R, C] by full name, H [C, C] of each half."""

    weights: dict[str, Tensor]
    fit_CC: Tensor
    check_CC: Tensor


def problems(
    model: str, texts: tuple[Path, ...], layers: list[int], num_sequences: int, length: int
) -> list[Problem]:
    """Every input group of the layers; from the cache if these settings were measured before."""
    folder = models.resolve(model).path
    cpu = torch.device("cpu")
    sources = tuple(map(str, texts))
    sequences = calibration_sequences(folder, sources, num_sequences, length, 0, cpu, False)
    tokens = sequences.calibration
    digest = hashlib.sha256(f"{folder.resolve()} {layers}".encode())
    digest.update(tokens.numpy().tobytes())
    target = cache_dir() / "proxy" / digest.hexdigest()[:16]
    build_once(target, lambda partial: _measure(folder, tokens, layers, partial))
    return list(_read(load_file(target / FILE)))


def _read(tensors: dict[str, Tensor]) -> Iterator[Problem]:
    """Tensors are called `<group>/fit`, `<group>/check` and `<group>/W/<name of a linear>`."""
    for group in dict.fromkeys(key.split("/")[0] for key in sorted(tensors)):
        prefix = f"{group}/W/"
        weights = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        fit_CC, check_CC = (tensors[f"{group}/{half}"] for half in HALVES)
        yield Problem(dict(sorted(weights.items())), fit_CC, check_CC)


def _measure(folder: Path, tokens: Tensor, layers: list[int], target: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for i, half in enumerate(HALVES):
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            stream = LayerStream(folder, torch.device("cpu"))
            own = tokens[i :: len(HALVES)]
            calibrator = LayerCalibrator(stream, own, ACTIVATIONS, Path(scratch))
            for index in range(max(layers) + 1):
                with stream.layer(index) as layer:
                    linears = linears_of(layer, stream.names[index])
                    weights = {name: m.weight.data.float().clone() for name, m in linears.items()}
                    layer.to(stream.compute_dtype)
                    calibrator.begin(linears)
                    if index in layers:
                        tensors |= _measured(calibrator, index, linears, weights, half)
                    if index < max(layers):
                        calibrator.advance(index)
            calibrator.close()
    save_file(tensors, target / FILE)


def _measured(
    calibrator: LayerCalibrator,
    index: int,
    linears: dict[str, nn.Linear],
    weights: dict[str, Tensor],
    half: str,
) -> dict[str, Tensor]:
    """The tensors of a loaded layer."""
    tensors = {}
    groups = calibrator.groups(index, linears)
    for k, hessian in enumerate(calibrator.hessians(index, linears, groups)):
        names, group = groups[k].names, f"{index:03d}.{k}"
        tensors[f"{group}/{half}"] = hessian.matrix(names[0])
        tensors |= {f"{group}/W/{name}": weights[name] for name in names}
    return tensors
