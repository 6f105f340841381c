"""Peak resident memory of a quantization run against the number of layers.

    python eval/bench_memory.py [--layers 4 8 16] [--hidden 1024] [--output FILE]

Builds random Llama models of equal layers, quantizes each in a process of its own, calibrated on a
text file so that no whole model is ever needed, and prints the peak resident memory (VmHWM of the
child: all pages, mapped files included) side by side, with the ratio to the smallest model's. Linux
only.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

CHILD = """
import json, sys
from vqllm import api, memory
from vqllm.recipe import from_dict
source, text, output = sys.argv[1:4]
recipe = from_dict({
    "name": "bench", "calibration": {"source": [text], "sequences": 16, "length": 256},
    "transforms": [{"type": "hadamard", "side": "both"}],
    "codec": {"type": "e8p"}, "rounding": {"type": "ldlq"},
}, "bench")
imports = memory.peak_resident() / 2**20
api.quantize(source, output, recipe=recipe, evaluate=False, device="cpu")
print(json.dumps({"imports_mb": imports, "peak_mb": memory.peak_resident() / 2**20}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="*", default=[4, 8, 16])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--output", type=Path, help="CSV file")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("".join(f"Line {i} of a text that means nothing.\n" for i in range(4000)))
        for num_layers in arguments.layers:
            source = Path(folder) / f"model{num_layers}"
            num_bytes = build(source, num_layers, arguments.hidden)
            command = [sys.executable, "-c", CHILD, str(source), str(text), f"{source}-out"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            measured = json.loads(done.stdout.splitlines()[-1])
            measured = {key: round(value, 1) for key, value in measured.items()}
            rows.append({"layers": num_layers, "model_mb": round(num_bytes / 1e6, 1), **measured})
            ratio = measured["peak_mb"] / rows[0]["peak_mb"]
            print(
                f"{num_layers:3d} layers, model {num_bytes / 1e6:7.0f} MB: imports "
                f"{measured['imports_mb']:5.0f} MB, peak {measured['peak_mb']:6.0f} MB, "
                f"{ratio:.3f} x the first"
            )
    if arguments.output:
        with arguments.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


def build(folder: Path, num_layers: int, hidden: int) -> int:
    """A random float16 Llama with a byte tokenizer; returns the bytes of its weights."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config).half()
    model.save_pretrained(folder)
    return sum(p.numel() * 2 for p in model.parameters())


if __name__ == "__main__":
    main()
