"""Other quantizers on the demo model, measured as `results_table.py` measures recipes.

    python eval/peers.py --data FOLDER --work FOLDER [--ggml LIBRARY] [--only NAME ...]

Every linear of the decoder layers is quantized by the peer's own code and decoded again; embedding
and head stay in float16. Perplexity and KL divergence are those of the first 24 windows of 2048
tokens of wikitext-2-raw/wiki.test.raw, in bfloat16 on the CPU, against the original. Rows go to
eval/results/peers.json; those that stand there are not repeated.

- llama.cpp: `ggml_quantize_chunk` of a shared library of ggml (ggml.c and ggml-quants.c), one type
  for all linears. Columns that 256 does not divide get the type that llama-quantize falls back to.
  The importance matrix is the mean square of every column's input over the sequences that recipes
  are calibrated on. Decoded by the package `gguf`.
- bitsandbytes and hqq: the packages, without calibration.
"""

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import gguf
import numpy
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from results_table import TEXTS, WINDOWS
from torch import Tensor, nn
from vqllm.runs.compare.original import Remembering

from vqllm.calibration.data.calibration_set import calibration_sequences
from vqllm.core.protocols import JSON
from vqllm.evaluation import perplexity as evaluation
from vqllm.models import resolve as models
from vqllm.models.load import load_to_run

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "eval" / "results" / "peers.json"
SEQUENCES, LENGTH = 512, 128
ABOUT = (
    "SmolLM2-135M-Instruct (released Q4_1 weights, expanded to float16). All linears of the "
    "decoder layers are quantized by the peer's own code and decoded again; embedding and head "
    f"stay in float16. First {WINDOWS} windows of 2048 tokens of WikiText-2's raw test file, "
    "against the original, in bfloat16 on a CPU. Bits count scales. Importance matrices of "
    f"llama.cpp are mean squares of inputs over {SEQUENCES} sequences of {LENGTH} tokens of C4 "
    "and Wikipedia. 256 does not divide the 576 columns of q, k, v, o, gate and up: as "
    "llama-quantize does, these have Q4_0 in place of Q2_K and Q3_K, and IQ4_NL in place of IQ "
    "types, hence about 4 bits in all."
)
GGML_TYPES = ("Q2_K", "IQ2_XXS", "Q3_K", "IQ3_XXS", "Q4_0", "IQ4_NL")
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0"}
"""What llama-quantize takes where 256 does not divide the columns; IQ4_NL for the IQ types."""

Quantizer = Callable[[Tensor, Tensor], tuple[Tensor, float]]
"""W [R, C] and the mean square of its input's columns [C] to the decoded W and bits a weight."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, default=os.environ.get("VQLLM_DATA"))
    parser.add_argument("--work", type=Path, required=True, help="folder for the predictions")
    parser.add_argument("--ggml", type=Path, help="shared library with ggml_quantize_chunk")
    parser.add_argument("--ggml-version", help="of llama.cpp, for the record")
    parser.add_argument("--only", nargs="*", default=[])
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("pass --data or set VQLLM_DATA")
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": {}}
    results["about"] = ABOUT
    peers = _peers(arguments.ggml, arguments.ggml_version)
    wanted = {k: v for k, v in peers.items() if not arguments.only or k in arguments.only}
    measured = _Measured(arguments.model, arguments.data, arguments.work)
    for name, (source, quantizer) in wanted.items():
        if name not in results["rows"]:
            results["rows"][name] = measured.row(quantizer) | {"source": source}
            print(name, results["rows"][name], flush=True)
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


class _Measured:
    """The original, its calibration statistics and the windows."""

    def __init__(self, model: str, data: Path, work: Path) -> None:
        cpu = torch.device("cpu")
        folder = models.resolve(model).path
        self.original, tokenizer = load_to_run(folder, cpu, False)
        texts = tuple(str(data / "calibration" / name) for name in TEXTS)
        tokens_SL = calibration_sequences(folder, texts, SEQUENCES, LENGTH, 0, cpu, False)
        self.weights = {
            name: module.weight.data.float()
            for name, module in load_to_run(folder, cpu, False, torch.float32)[0].named_modules()
            if isinstance(module, nn.Linear) and ".layers." in name
        }
        self.squares = mean_squares(self.original, list(self.weights), tokens_SL.calibration)
        self.tokens_SL = evaluation.text_windows(
            data / "wikitext-2-raw" / "wiki.test.raw", tokenizer, WINDOWS
        )
        self.folder = folder
        self.remembering = Remembering(self.original, work)

    def row(self, quantizer: Quantizer) -> JSON:
        model, _ = load_to_run(self.folder, torch.device("cpu"), False)
        bits, numel = 0.0, 0
        for name, W_RC in self.weights.items():
            W_hat_RC, per_weight = quantizer(W_RC, self.squares[name])
            model.get_submodule(name).weight.data.copy_(W_hat_RC)
            bits, numel = bits + per_weight * W_RC.numel(), numel + W_RC.numel()
        found = evaluation.compare(model, self.remembering, self.tokens_SL)
        return {
            "bits_per_weight": round(bits / numel, 4),
            "perplexity": round(found.perplexity, 4),
            "baseline_perplexity": round(found.baseline_perplexity, 4),
            "kl": round(found.kl, 5),
            "top1": round(found.top1, 5),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        }


@torch.inference_mode()
def mean_squares(model: Any, names: list[str], tokens_SL: Tensor) -> dict[str, Tensor]:
    """The mean square of every input feature of the named linears."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            squares = given[0].float().square().flatten(0, -2).sum(0)
            sums[name] = sums.get(name, torch.zeros_like(squares)) + squares

        return add

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names]
    for batch in tokens_SL.split(8):
        model.model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: total / tokens_SL.numel() for name, total in sums.items()}


def _peers(library: Path | None, version: str | None) -> dict[str, tuple[str, Quantizer]]:
    """Name to how it was made, and its quantizer; those whose package is missing are left out."""
    found: dict[str, tuple[str, Quantizer]] = {}
    if library is not None:
        ggml = ctypes.CDLL(str(library))
        ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
        for name in GGML_TYPES:
            source = f"ggml_quantize_chunk of llama.cpp {version}, with an importance matrix"
            found[f"llama.cpp {name}"] = source, _ggml(ggml, name)
    if version := _version("bitsandbytes"):
        found["bitsandbytes NF4"] = f"bitsandbytes {version}, blocks of 64, double", _nf4
    if version := _version("hqq"):
        for bits, group in ((3, 64), (4, 64)):
            source = f"hqq {version}, {bits} bits, groups of {group}, axis 1"
            found[f"HQQ {bits} bits"] = source, _hqq(bits, group)
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ggml(library: ctypes.CDLL, name: str) -> Quantizer:
    def quantize(W_RC: Tensor, squares_C: Tensor) -> tuple[Tensor, float]:
        rows, cols = W_RC.shape
        fits = cols % GGML_QUANT_SIZES[GGMLQuantizationType[name]][0] == 0
        kind = GGMLQuantizationType[name if fits else FALLBACKS.get(name, "IQ4_NL")]
        block, size = GGML_QUANT_SIZES[kind]
        packed = numpy.empty(rows * cols // block * size, dtype=numpy.uint8)
        given = numpy.ascontiguousarray(W_RC.numpy(), dtype=numpy.float32)
        importance = numpy.ascontiguousarray(squares_C.numpy(), dtype=numpy.float32)
        library.ggml_quantize_chunk(
            ctypes.c_int(kind.value),
            given.ctypes.data_as(ctypes.c_void_p),
            packed.ctypes.data_as(ctypes.c_void_p),
            *map(ctypes.c_int64, (0, rows, cols)),
            importance.ctypes.data_as(ctypes.c_void_p),
        )
        decoded = gguf.quants.dequantize(packed.reshape(rows, -1), kind)
        return torch.from_numpy(numpy.array(decoded)).view(rows, cols), 8 * size / block

    return quantize


def _nf4(W_RC: Tensor, _: Tensor) -> tuple[Tensor, float]:
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        W_RC, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    return functional.dequantize_4bit(packed, state).float(), 4 + 8 / 64 + 32 / (64 * 256)


def _hqq(bits: int, group: int) -> Quantizer:
    def quantize(W_RC: Tensor, _: Tensor) -> tuple[Tensor, float]:
        from hqq.core.quantize import Quantizer as Hqq

        packed, meta = Hqq.quantize(
            W_RC, nbits=bits, group_size=group, axis=1, device="cpu", compute_dtype=torch.float32
        )
        return Hqq.dequantize(packed, meta).float(), bits + 2 * 16 / group

    return quantize


if __name__ == "__main__":
    main()
