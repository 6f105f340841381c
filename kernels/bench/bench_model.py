"""Tokens a second of a whole quantized model at batch 1, beside the same model in bfloat16.

    python kernels/bench/bench_model.py --output FOLDER [--formats NAME ...] [--shape llama-3-8b]
    python kernels/bench/bench_model.py --dry-run

Weights are random: only their shapes matter for the speed. One step of decoding with a static cache
is captured in a CUDA graph and replayed; the models take turns, round by round, and medians are
compared.
"""

import argparse
import copy
import gc
import json
import statistics
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from bench_matmul import provenance, random_tensors, trellis
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from vqllm.runtime import VQLinear, describe
from vqllm.runtime.replace import group_inputs
from vqllm_kernels import formats
from vqllm_kernels.linear import LinearSpec
from vqllm_kernels.transforms import CodedScaleSpec, HadamardSpec, TransformSpec

SHAPES = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    },
}


FORMATS = {
    "trellis 2 bits": trellis("bytes2", 2, 14),
    "trellis 3 bits": trellis("bytes4", 3, 12),
    "trellis 4 bits": trellis("bytes4", 4, 12),
    "e8p 2 bits": {"format": "e8p-v1"},
}
INPUT_OF = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Linears that have the input of another."""
CONTEXT = 256
"""Tokens in the cache while decoding."""
STEPS, ROUNDS = 32, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for the JSON file")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--shape", default="llama-3-8b", choices=list(SHAPES))
    parser.add_argument("--block", type=int, default=None, help="of the Hadamard transforms")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU, without graphs")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run works without one")
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    config = LlamaConfig(**SHAPES["tiny" if arguments.dry_run else arguments.shape])
    rows = []
    for name in arguments.formats:
        rows.append({**provenance(device), "model": arguments.shape, "format": name})
        rows[-1] |= measure(config, FORMATS[name], arguments.block, device)
        print(json.dumps(rows[-1]), flush=True)
        gc.collect()
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        path = arguments.output / f"model-{str(rows[0]['device']).replace(' ', '-')}.json"
        path.write_text(json.dumps(rows, indent=1) + "\n")


def measure(config: LlamaConfig, values: dict, block: int | None, device: torch.device) -> dict:
    """Medians of both models, in turns."""
    with torch.device(device):
        torch.manual_seed(0)
        dense = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    packed = quantized_like(dense, values, block)
    steps = {"quantized": step_of(packed, device), "dense": step_of(dense, device)}
    times = {name: [] for name in steps}
    for _ in range(1 if device.type == "cpu" else ROUNDS):
        for name, step in steps.items():
            times[name].append(seconds(step, device) / STEPS)
    median = {name: statistics.median(values) for name, values in times.items()}
    kernels = {run.implementation for run in describe(packed, (1,))}
    return {
        "kernels": sorted(kernels),
        "quantized_tokens_per_s": round(1 / median["quantized"], 2),
        "dense_tokens_per_s": round(1 / median["dense"], 2),
        "speedup": round(median["dense"] / median["quantized"], 3),
        "spread": {n: round(max(values) / min(values), 3) for n, values in times.items()},
    }


def quantized_like(dense: nn.Module, values: dict, block: int | None) -> nn.Module:
    """A copy with random packed linears; the head and embeddings stay dense, and are shared."""
    memo = {id(p): p for p in (*dense.model.embed_tokens.parameters(), *dense.lm_head.parameters())}
    linears = [n for n, m in dense.model.named_modules() if isinstance(m, nn.Linear)]
    hidden = {name: dense.model.get_submodule(name) for name in linears}
    for name in linears:  # not copied, only to be replaced
        dense.model.set_submodule(name, nn.Identity())
    packed = copy.deepcopy(dense, memo)
    for name, linear in hidden.items():
        dense.model.set_submodule(name, linear)
        own = name.rpartition(".")[-1]
        seed = zlib.crc32(INPUT_OF.get(own, own).encode())
        packed.model.set_submodule(name, packed_like(linear, values, block, seed))
    group_inputs(packed)
    return packed


def packed_like(linear: nn.Linear, values: dict, block: int | None, seed: int) -> VQLinear:
    """Random codes; linears with equal seeds have equal signs, and so are taken for those of one
    input."""
    rows, cols = linear.weight.shape
    device = linear.weight.device
    generator = torch.Generator(device).manual_seed(0)
    transforms: list[TransformSpec] = []
    for side, size in (("in", cols), ("out", rows)):
        transforms.append(CodedScaleSpec(side=side, size=size, bits=2))
    for side, size in (("in", cols), ("out", rows)):
        transforms.append(HadamardSpec(side=side, size=size, block=block))
    spec = LinearSpec(
        rows=rows, cols=cols, format=formats.from_dict(values), transforms=tuple(transforms)
    )
    tensors = random_tensors(spec.format, (rows, cols), generator)
    for i, transform in enumerate(transforms):
        for name, layout in transform.layout().items():
            ones = torch.ones(layout.shape, device=device).to(layout.dtype)
            tensors[f"t{i}_{name}"] = ones
        if (transform.kind, transform.side) == ("hadamard", "in"):
            signs = torch.rand(cols, generator=torch.Generator().manual_seed(seed)) - 0.5
            tensors[f"t{i}_signs"] = HadamardSpec.pack_signs(signs)["signs"].to(device)
    return VQLinear.from_tensors(spec, tensors, None, torch.bfloat16).to(device)


def step_of(model: nn.Module, device: torch.device) -> Callable[[], object]:
    """Decodes one token after CONTEXT others; on a CUDA device a graph."""
    # Every step, captured or replayed, moves on by one place.
    length = CONTEXT + STEPS * (ROUNDS + 1) + 16
    cache = StaticCache(config=model.config, max_cache_len=length)
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    position = torch.tensor([CONTEXT], device=device)
    prompt = torch.zeros(1, CONTEXT, dtype=torch.long, device=device)
    model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def step() -> None:
        model(
            token,
            past_key_values=cache,
            cache_position=position,
            position_ids=position[None],
            use_cache=True,
        )

    step()
    if device.type == "cpu":
        return step
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Of STEPS steps."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    with torch.inference_mode():
        main()
