"""The tensors of a model whose weights are not on this machine, as its config.json has them."""

import math
from pathlib import Path

import torch

from vqllm.checkpoint.shards import DTYPE_NAMES, StoredTensor
from vqllm.checkpoint.source import SourceTensors
from vqllm.checkpoint.source_files import has_weights
from vqllm.checkpoint.stored import StoredFolder
from vqllm.errors import ModelError
from vqllm.hf.blueprint import Blueprint
from vqllm.hf.loading import skeleton


class AbsentWeights(StoredFolder):
    """Names, dtypes and shapes of the tensors that transformers would save; none can be read."""

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        """ModelError when config.json cannot be understood."""
        self.folder, self.coded = folder, None
        model = skeleton(folder, trust_remote_code=trust_remote_code)
        self.tensors = {}
        seen: set[int] = set()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:  # tied ones are saved once
                seen.add(id(tensor))
                self.tensors[name] = _stored(tensor, model.dtype)

    def read(self, key: str) -> torch.Tensor:
        raise ModelError(f"{self.folder} has no weights, only a config.json.")

    def read_part(self, key: str, index: int | slice) -> torch.Tensor:
        return self.read(key)


def source_tensors(folder: Path, trust_remote_code: bool = False) -> SourceTensors:
    """The tensors of a folder: those of its files, or what config.json says of them where there
    are none.

    Raises:
        ModelError: the folder is damaged, or transformers does not know the model.
    """
    if has_weights(folder):
        return SourceTensors.open(folder, trust_remote_code)
    stored = AbsentWeights(folder, trust_remote_code)
    return SourceTensors(stored, Blueprint.of(folder, stored.tensors, trust_remote_code))


def _stored(tensor: torch.Tensor, dtype: torch.dtype) -> StoredTensor:
    own = dtype if tensor.is_floating_point() else tensor.dtype
    name = DTYPE_NAMES.get(own, "F32")
    shape = tuple(tensor.shape)
    return StoredTensor(name, shape, math.prod(shape) * own.itemsize)
