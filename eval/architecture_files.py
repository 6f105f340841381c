"""What the files of a quantized checkpoint say, read without vqllm."""

import json
import re
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from architecture_plain import is_tower


def share(folder: Path, made: dict[str, Any]) -> dict[str, Any]:
    """What share of the source's weights the checkpoint says to be quantized, and what stayed.

    Args:
        made: what `architecture_plain.make` said of the source.
    """
    quantization = json.loads((folder / "config.json").read_text())
    quantization = quantization["quantization_config"]
    weights: Counter[str] = Counter()
    inside = in_layers(quantization["modules"], made["layers"])
    for name, key in quantization["modules"].items():
        spec = quantization["specs"][key]
        weights["inside" if name in inside else "outside"] += spec["rows"] * spec["cols"]
    stayed: dict[str, Counter[str]] = {}
    for name, reason in quantization.get("not_quantized", {}).items():
        if any(name.startswith(f"{layers}.") for layers in made["layers"]):
            pattern = re.sub(r"\.\d+(?=\.|$)", ".*", name)
            stayed.setdefault(pattern, Counter())[reason] += 1
    return {
        "layers_share": weights["inside"] / made["layer_weights"],
        "share": weights.total() / made["weights"],
        "stayed": {pattern: dict(reasons) for pattern, reasons in sorted(stayed.items())},
    }


def in_layers(names: Iterable[str], layers: list[str]) -> set[str]:
    """Which of these modules belong to the decoder layers.

    Args:
        names: of modules as in the files, which may be others than in the model:
            `language_model.model.blocks` for `model.language_model.layers`.
        layers: the lists of decoder layers in the model.
    """
    inside = {name for name in names for prefix in layers if name.startswith(f"{prefix}.")}
    renamed = re.compile(r"(^|\.)(layers?|blocks|h)\.\d+\.")
    return inside or {name for name in names if renamed.search(name) and not is_tower(name)}


def different_tensors(folder: Path, again: Path) -> str:
    """The first difference between the tensors of two folders, "" if there is none."""
    ours, theirs = stored(folder), stored(again)
    if ours.keys() != theirs.keys():
        missing, added = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
        return f"missing {missing[:2]} of {len(missing)}, added {added[:2]} of {len(added)}"
    changed = [name for name in ours if ours[name] != theirs[name]]
    return f"{len(changed)} changed: {changed[:2]}" if changed else ""


def stored(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of every tensor in the safetensors files of a folder."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = (entry["dtype"], entry["shape"], data[begin:end])
    return tensors
