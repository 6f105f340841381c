"""Peak memory and time of quantizing large mixtures of experts, on two layers of their shape.

    python eval/bench_big.py [--shapes mixtral qwen3] [--recipes rtn-4bit e8p-2bit] [--threads 2]

Writes a model of the shape with random bfloat16 weights, tensor by tensor in the names of the
published checkpoint, and quantizes it with `vqllm quantize` in a process of its own, calibrated on
random text. Prints and adds to results/big.json:

- share: quantized weights of all that the layers have
- peak: resident memory (VmHWM), mapped files included
- anonymous: the largest RssAnon seen in samples every 50 ms, mapped files not included
- seconds of a layer: from the first layer's shard to the second's
- all layers: that times the number of layers of the published model. Extrapolated, not measured.

`--skip REGEX` leaves linears out where a layer takes too long; the table then says so. Linux only.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

RESULTS = Path(__file__).parent / "results" / "big.json"
SHARD_BYTES = 4 << 30
CHARACTERS = 200_000
NUM_NOISE = (1 << 24) - 3
"""Odd, so that no two rows of a matrix are equal."""


@dataclass(frozen=True)
class BigShape:
    """A published model's shape."""

    title: str
    num_layers: int
    config: dict[str, Any]
    """of transformers' AutoConfig, without the number of layers"""
    mlp: str
    """where a layer has its experts, in the names of the files"""
    matrices: tuple[str, str, str]
    """gate, up and down of an expert, in those names"""
    num_experts: int
    expert_size: int


ATTENTION = {"num_attention_heads": 32, "head_dim": 128, "tie_word_embeddings": False}
SHAPES = {
    "mixtral": BigShape(
        "Mixtral-8x7B",
        32,
        {
            **ATTENTION,
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "vocab_size": 32000,
        },
        "block_sparse_moe",
        ("w1", "w3", "w2"),
        8,
        14336,
    ),
    "qwen3": BigShape(
        "Qwen3-30B-A3B",
        48,
        {
            **ATTENTION,
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "vocab_size": 151936,
        },
        "mlp",
        ("gate_proj", "up_proj", "down_proj"),
        128,
        768,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--recipes", nargs="*", default=["rtn-4bit", "e8p-2bit"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip", default="", help="linears to leave out")
    parser.add_argument("--folder", type=Path, help="where models are kept; else a temporary one")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        for key in arguments.shapes:
            source = folder / f"{key}-{arguments.layers}"
            if not (source / "config.json").is_file():
                build(source, SHAPES[key], arguments.layers)
            for recipe in arguments.recipes:
                row = measure(source, SHAPES[key], recipe, Path(temporary) / "out", arguments)
                print(line(row), flush=True)
                add(arguments.output, row)


def tensors_of(shape: BigShape, num_layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors, as the published checkpoint stores them."""
    config = shape.config
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    gate, up, down = shape.matrices
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in (f"model.layers.{index}" for index in range(num_layers)):
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield f"{layer}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, queries)
        if config["model_type"] == "qwen3_moe":
            yield f"{layer}.self_attn.q_norm.weight", (config["head_dim"],)
            yield f"{layer}.self_attn.k_norm.weight", (config["head_dim"],)
        yield f"{layer}.{shape.mlp}.gate.weight", (shape.num_experts, hidden)
        for expert in range(shape.num_experts):
            prefix = f"{layer}.{shape.mlp}.experts.{expert}"
            yield f"{prefix}.{gate}.weight", (shape.expert_size, hidden)
            yield f"{prefix}.{up}.weight", (shape.expert_size, hidden)
            yield f"{prefix}.{down}.weight", (hidden, shape.expert_size)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def build(folder: Path, shape: BigShape, num_layers: int) -> None:
    """Write the model, shard by shard, with a byte tokenizer: of the vocabulary 256 ids are used.
    config.json comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    room = SHARD_BYTES
    for name, size in tensors_of(shape, num_layers):
        num_bytes = 2 * numel(size)
        if shards[-1] and num_bytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append((name, size))
        room -= num_bytes
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / file, tensors)
        weight_map |= dict.fromkeys((name for name, _ in tensors), file)
    index = {"metadata": {"total_size": sum(2 * numel(s) for own in shards for _, s in own)}}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({**index, "weight_map": weight_map})
    )
    write_tokenizer(folder)
    config = {**shape.config, "num_hidden_layers": num_layers, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))


def write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]]) -> None:
    """A safetensors file, with one tensor in memory at a time: 8 bytes of length, the header, the
    tensors. Norms are ones. All else begins somewhere in one long row of normal numbers with a
    deviation of .02, and repeats it: to draw all of them would take longer than the measurement."""
    import torch

    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(NUM_NOISE, generator=generator) * 0.02).bfloat16()

    header, end = {}, 0
    for name, size in tensors:
        start, end = end, end + 2 * numel(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, size in tensors:
            if len(size) == 1:
                values = torch.ones(size, dtype=torch.bfloat16)
            else:
                start = int(torch.randint(NUM_NOISE, (), generator=generator))
                values = noise[start : start + numel(size)]
                if len(values) < numel(size):
                    again = numel(size) // NUM_NOISE + 1
                    values = torch.cat([values, noise.repeat(again)])[: numel(size)]
            file.write(memoryview(values.view(torch.uint8).numpy()).cast("B"))


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def numel(size: tuple[int, ...]) -> int:
    total = 1
    for length in size:
        total *= length
    return total


def measure(
    source: Path, shape: BigShape, recipe: str, output: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Quantize and watch; a row of the table."""
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz    .,\n", k=CHARACTERS)
    text = output.with_name("text.txt")
    text.write_text("".join(letters))
    output = output.with_name(f"{source.name}-{recipe}")
    command = [sys.executable, "-m", "vqllm", "quantize", str(source), "--output", str(output)]
    command += ["--recipe", recipe, "--calibration", str(text), "--no-eval", "--device", "cpu"]
    command += ["--set", f"calibration.sequences={arguments.sequences}"]
    command += ["--set", f"calibration.length={arguments.length}"]
    if arguments.skip:
        command += ["--set", f"skip=['{arguments.skip}']"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    seen = watch(command, environment, output, arguments.layers)

    layers = [own for own in tensors_of(shape, arguments.layers) if ".layers." in own[0]]
    records = [json.loads(own) for own in (output / "report.jsonl").read_text().splitlines()]
    quantized = sum(record["rows"] * record["cols"] for record in records)
    stored = sum(record["bits_per_weight"] * record["rows"] * record["cols"] for record in records)
    return {
        "shape": shape.title,
        "recipe": recipe,
        "layers": arguments.layers,
        "tokens": arguments.sequences * arguments.length,
        "threads": arguments.threads,
        "skip": arguments.skip,
        "share": round(quantized / sum(numel(size) for _, size in layers), 4),
        "bits": round(stored / quantized, 3),
        **seen,
        "hours_all_layers_extrapolated": round(
            seen["seconds_a_layer"] * shape.num_layers / 3600, 1
        ),
        "source_gb": round(size_of(source), 2),
        "output_gb": round(size_of(output), 2),
    }


def watch(
    command: list[str], environment: dict[str, str], output: Path, num_layers: int
) -> dict[str, float]:
    """Run a command until it ends: its memory, and the time between the last two layers' shards,
    or until the first is there. RuntimeError if it fails."""
    start = time.perf_counter()
    peak = anonymous = 0
    done = [start]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        while process.poll() is None:
            sample = resident(process.pid)
            peak = max(peak, sample.get("VmHWM", 0))
            anonymous = max(anonymous, sample.get("RssAnon", 0))
            shards = list(output.glob("model-*.safetensors"))
            if len(done) <= len(shards) and len(done) <= num_layers:
                done.append(time.perf_counter())
            time.sleep(0.05)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.read()}")
    return {
        "peak_gb": round(peak / 1e9, 2),
        "anonymous_gb": round(anonymous / 1e9, 2),
        "seconds_a_layer": round(done[-1] - done[-2], 1),
        "seconds": round(time.perf_counter() - start, 1),
    }


def resident(process: int) -> dict[str, int]:
    """Memory of a process by kind in bytes, as Linux tells it; empty when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (text.split(":", 1) for text in lines if text.endswith(" kB"))
    return {key: int(value.split()[0]) * 1024 for key, value in pairs}


def size_of(folder: Path) -> float:
    """GB of weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9


def line(row: dict[str, Any]) -> str:
    part = f", without {row['skip']}" if row["skip"] else ""
    return (
        f"{row['shape']} ({row['layers']} layers), {row['recipe']}{part}: "
        f"{100 * row['share']:.2f} % quantized at {row['bits']} bits, peak {row['peak_gb']} GB, "
        f"anonymous {row['anonymous_gb']} GB, {row['seconds_a_layer']} s a layer, all layers "
        f"{row['hours_all_layers_extrapolated']} h (extrapolated), "
        f"{row['source_gb']} -> {row['output_gb']} GB"
    )


def add(path: Path, row: dict[str, Any]) -> None:
    """Put a row into the results, in the place of an earlier one of the same run."""
    rows = json.loads(path.read_text()) if path.is_file() else []
    key = ("shape", "recipe", "layers", "skip")
    rows = [own for own in rows if any(own[name] != row[name] for name in key)]
    path.write_text(json.dumps([*rows, row], indent=2) + "\n")


if __name__ == "__main__":
    main()
