"""The steps of measuring one model type; each runs in a process of its own.

A step takes the model type, the working folder and the recipe, and returns what it found. Steps
that must not know vqllm import nothing of it.
"""

import sys
from pathlib import Path
from typing import Any

import architecture_plain as plain
import torch
from architecture_files import different_tensors

CHANGES = ("calibration.sequences=16", "calibration.length=64")


def source(model_type: str, folder: Path, _: str) -> dict[str, Any]:
    """Make the model in `folder/source`; transformers loads and runs it, and saves it again."""
    found = plain.make(model_type, folder / "source")
    logits = plain.logits(plain.load(model_type, folder / "source"))
    if not logits.isfinite().all():
        raise ValueError("logits of the source are not finite")
    plain.load(model_type, folder / "source", "auto").save_pretrained(folder / "copy")
    copied = plain.logits(plain.load(model_type, folder / "copy"))
    changed = different_tensors(folder / "source", folder / "copy")
    return found | {"source_changed": changed, "source_logits_kept": torch.equal(copied, logits)}


def quantized(model_type: str, folder: Path, recipe: str) -> dict[str, Any]:
    """Quantize `folder/source` into `folder/quantized`."""
    import vqllm

    text = folder / "text.txt"
    text.write_text(random_words())
    vqllm.quantize(
        folder / "source",
        folder / "quantized",
        recipe=recipe,
        calibration=text,
        changes=CHANGES,
        evaluate=False,
        device="cpu",
    )
    return {}


def dense(model_type: str, folder: Path, _: str) -> dict[str, Any]:
    """Write `folder/quantized` as dense weights."""
    from vqllm.checkpoint.dequantize import dequantize_checkpoint

    dequantize_checkpoint(folder / "quantized", folder / "dense", dtype="float32")
    return {}


def loaded(model_type: str, folder: Path, _: str) -> dict[str, Any]:
    """Load `folder/quantized`; save it, and load that."""
    import vqllm.integrations.transformers

    vqllm.integrations.transformers.register()
    logits = plain.logits(plain.load(model_type, folder / "quantized"))
    torch.save(logits, folder / "quantized.pt")
    plain.load(model_type, folder / "quantized", "auto").save_pretrained(folder / "again")
    again = plain.load(model_type, folder / "again")
    return {
        "tensors_changed": different_tensors(folder / "quantized", folder / "again"),
        "logits_kept": torch.equal(plain.logits(again), logits),
    }


def loaded_tokens(model_type: str, folder: Path, _: str) -> dict[str, Any]:
    """Tokens by `folder/quantized`: generated, and decoded one by one."""
    import vqllm.integrations.transformers

    vqllm.integrations.transformers.register()
    return _tokens(model_type, folder, "quantized")


def dense_tokens(model_type: str, folder: Path, _: str) -> dict[str, Any]:
    """The same by `folder/dense`, and its logits, by transformers alone."""
    if "vqllm" in sys.modules:
        raise RuntimeError("vqllm has been imported")
    torch.save(plain.logits(plain.load(model_type, folder / "dense")), folder / "dense.pt")
    return {f"dense_{key}": value for key, value in _tokens(model_type, folder, "dense").items()}


STEPS = (source, quantized, dense, loaded, loaded_tokens, dense_tokens)
"""In this order; the first three are needed by all that follow."""

WITH_VQLLM = (quantized, dense, loaded, loaded_tokens)


def differences(folder: Path) -> dict[str, float]:
    """How far the logits of `folder/quantized` are from those of `folder/dense`, relative to
    their norm."""
    found = {}
    for key, ending in (("difference", ".pt"), ("decode_difference", "-steps.pt")):
        pair = [folder / f"{name}{ending}" for name in ("quantized", "dense")]
        if all(path.exists() for path in pair):
            found[key] = plain.difference(*map(torch.load, pair))
    return found


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def random_words() -> str:
    """Lines of random words, and so of most tokens of the tokenizer."""
    generator = torch.Generator().manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?éüñß"
    lines = []
    for _ in range(400):
        picks = torch.randint(len(letters) + 12, (120,), generator=generator)
        lines.append("".join(letters[pick] if pick < len(letters) else " " for pick in picks))
    return "\n".join(lines)


def _tokens(model_type: str, folder: Path, name: str) -> dict[str, Any]:
    model = plain.load(model_type, folder / name)
    found: dict[str, Any] = {}
    try:
        found["generated"] = plain.generated(model)
    except Exception as error:  # the result of the measurement
        found["generate_error"] = first_line(error)
    try:
        torch.save(plain.stepwise_logits(model), folder / f"{name}-steps.pt")
    except Exception as error:
        found["decode_error"] = first_line(error)
    return found
