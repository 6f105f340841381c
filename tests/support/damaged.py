"""Folders of models changed after they were written."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from vqllm.checkpoint.source_files import stored_tensors
from vqllm.hf import loading


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of the folder's one file."""
    tensors = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def early_check(folder: Path) -> None:
    """What `quantize` does before anything else; reads headers only."""
    shapes = {name: tensor.shape for name, tensor in stored_tensors(folder).items()}
    loading.check_tensors(folder, loading.skeleton(folder), shapes)
