"""Tiny models that `vllm_check.py` serves: what of the format each has, and how."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

NEAREST = (
    "rounding.type=nearest",
    "calibration.sequences=4",
    "calibration.length=32",
)
PACKED, DECODED = {"vqllm_weights": "packed"}, {"vqllm_weights": "decoded"}
TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
PREFIXES = {"enable_prefix_caching": True, "block_size": 32}

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


@dataclass(frozen=True)
class Case:
    """A checkpoint, what is done with its weights, options of vLLM."""

    checkpoint: str
    """a recipe and changes of it, with which a tiny Llama is quantized, or one of `FAKES`"""
    weights: str
    mode: dict[str, str] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    limit: float = 1e-4
    """of a difference of logits"""
    cached: int = 0
    """tokens of the prompt that the cache of prefixes has at the second call"""
    alone: bool = False
    """in a process of its own; vLLM makes no second model where llvmlite is loaded, which the
    packed products of a CPU load"""

    @property
    def title(self) -> str:
        is_fake = self.checkpoint in FAKES
        return self.checkpoint if is_fake else f"tiny Llama, {self.checkpoint}"

    @property
    def all_options(self) -> dict[str, Any]:
        mode = {} if self.mode is None else {"additional_config": self.mode}
        return {"dtype": "float32", "max_model_len": 128, **mode, **self.options}

    def made(self, work: Path) -> Path:
        """The checkpoint, made if it is not there."""
        if self.checkpoint in FAKES:
            return fake(work / self.checkpoint.replace(" ", "-"), FAKES[self.checkpoint])
        output = work / self.checkpoint.replace(" ", "-")
        return quantized(tiny_llama(work / "tiny"), output, self.checkpoint)


FAKES: dict[str, dict[str, Any]] = {
    # Biases of q, k and v, which vLLM fuses, and a head of its own.
    "tiny Qwen2, each linear in another format": {
        "arch": "qwen2",
        "format": {
            "q_proj": "e8p",
            "k_proj": "e81b",
            "v_proj": "residual",
            "o_proj": "uniform",
            "gate_proj": "lut_row",
            "up_proj": "lut_col",
            "down_proj": "residual",
        },
        "outside": "e8p",
        "tie_word_embeddings": False,
    },
    "tiny Qwen2, quantized head, dense embedding, k and up dense": {
        "arch": "qwen2",
        "format": {
            "q_proj": "residual",
            "v_proj": "residual",
            "o_proj": "residual",
            "gate_proj": "residual",
            "down_proj": "residual",
        },
        "outside": "e8p",
        "dense": ["model.embed_tokens"],
        "tie_word_embeddings": False,
    },
}
"""Checkpoints of random codes, by what `fake_checkpoint` takes."""
EVERY, HEAD = FAKES

SMALLEST = (
    Case("e8p-2bit", "decoded", DECODED),
    Case(EVERY, "packed, cached prefixes", PACKED, PREFIXES, cached=64),
    Case(HEAD, "packed", PACKED),
)
"""The part that tests run."""
CASES = (
    *SMALLEST,
    Case(EVERY, "decoded", DECODED),
    Case("small", "packed", PACKED),
    Case("small", "packed, the model of transformers", PACKED, {"model_impl": "transformers"}),
    Case("small", "packed, bfloat16", None, {"dtype": "bfloat16"}, limit=0.3, alone=True),
    Case("small", "packed, float16", None, {"dtype": "float16"}, limit=0.1, alone=True),
    Case("trellis-2bit-fast", "packed, compiled", PACKED, {"enforce_eager": False}, alone=True),
    Case("small", "decoded, 2 processes", DECODED, TWO, alone=True),
    Case("e8p-2bit", "packed, 2 processes", PACKED, TWO, alone=True),
    Case("trellis-2bit-fast tensor_parallel=2", "packed, 2 processes", PACKED, TWO, alone=True),
)


def tiny_llama(folder: Path) -> Path:
    """A random Llama with a tied head, and a tokenizer."""
    sys.path.insert(0, str(ROOT))
    from tests.support.tiny import save_tiny

    if folder.exists():
        return folder
    return save_tiny(folder, num_key_value_heads=4, tie_word_embeddings=True, **SIZES)


def quantized(source: Path, output: Path, recipe: str) -> Path:
    """A folder by nearest rounding and few calibration tokens."""
    recipe, *keys = recipe.split()
    if not (output / "config.json").exists():
        command = [sys.executable, "-m", "vqllm", "quantize", source, "--output", output]
        every = [part for key in (*NEAREST, *keys) for part in ("--set", key)]
        done = subprocess.run(
            [*command, "--recipe", recipe, "--no-eval", *every], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return output


def fake(folder: Path, values: dict[str, Any]) -> Path:
    """A folder of random codes."""
    sys.path.insert(0, str(ROOT))
    from tests.support.fake_checkpoint import FORMATS, fake_checkpoint

    if not folder.exists():
        formats = {last: FORMATS[name] for last, name in values["format"].items()}
        own = {**values, "format": formats, "outside": FORMATS[values["outside"]]}
        fake_checkpoint(folder, **own, **SIZES)
    return folder / "quantized"


def changed(model: Path, folder: Path, config: dict[str, Any]) -> Path:
    """The folder with another config.json."""
    folder.mkdir(exist_ok=True)
    for file in model.iterdir():
        if file.name != "config.json" and not (folder / file.name).exists():
            (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
