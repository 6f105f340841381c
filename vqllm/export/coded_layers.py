"""The folder of a run: coded linears, layer by layer, until all of them are in one file.

    OUTPUT.unfinished/layer-00001.safetensors     blocks of the linears of a layer, uint8 [R, bytes]
    OUTPUT.unfinished/.vqllm/                     the journal, and files that are not finished

A run that is killed goes on behind the last layer here (`vqllm/checkpoint/resume/journal.py`).
"""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import gguf
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from vqllm.checkpoint import atomic
from vqllm.checkpoint.resume.journal import FinishedLayer, is_unfinished
from vqllm.checkpoint.resume.run_folder import RunFolder
from vqllm.core.protocols import JSON
from vqllm.errors import VqllmError


@dataclass(frozen=True)
class Coded:
    """A linear by its full name, and how it is stored."""

    name: str
    type: str
    blocks_RB: Tensor
    """uint8 [R, bytes of a row]"""
    record: JSON


def decoded(blocks_RB: Tensor, type_name: str) -> Tensor:
    """The weights [R, C], float32, as the package `gguf` decodes them."""
    values_RC = gguf.dequantize(blocks_RB.numpy(), gguf.GGMLQuantizationType[type_name])
    return torch.from_numpy(np.ascontiguousarray(values_RC))


def folder_of(output: Path) -> Path:
    """Where the run that writes a file keeps what it has done."""
    return output.with_name(f"{output.name}.unfinished")


class CodedLayers(RunFolder):
    """Writes linears layer by layer, and reads them back."""

    def __init__(self, output: Path, identity: JSON) -> None:
        """Begin or go on.

        Args:
            output: the file that is to be written in the end.
            identity: all that could change a byte of it (`journal.identity`).

        Raises:
            CheckpointError: another run into this file was begun; the differences are shown.
        """
        self._file = output
        self._is_new = not is_unfinished(folder_of(output))
        super().__init__(folder_of(output), identity)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *args: object) -> None:
        """A mistake of the user that is noticed before the first layer is coded leaves nothing."""
        self._journal.close()
        is_mistake = kind is not None and issubclass(kind, VqllmError)
        if is_mistake and self._is_new and not self.num_finished:
            shutil.rmtree(self._output, ignore_errors=True)

    @property
    def num_finished(self) -> int:
        """Layers that need not be done again."""
        return len(self._journal.finished)

    def write_layer(self, index: int, coded: Iterable[Coded]) -> None:
        """Bring a layer to the disk, and say so in the journal."""
        linears = {own.name: own for own in coded}
        shard = f"layer-{index + 1:05d}.safetensors"
        blocks = {name: own.blocks_RB for name, own in linears.items()}
        digest = atomic.write_shard(self._output / shard, blocks, self.scratch)
        self._journal.append(
            FinishedLayer(
                layer=index,
                shard=shard,
                sha256=digest,
                linears={name: {"type": own.type} for name, own in linears.items()},
                records=[own.record for own in linears.values()],
            )
        )

    def decoded(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """The weights of each coded linear of a finished layer."""
        layer = self._journal.finished[index]
        tensors = load_file(self._output / layer.shard)
        for name, values in layer.linears.items():
            yield name, decoded(tensors.pop(name), values["type"])

    def blocks(self, name: str) -> Tensor:
        """The blocks of a linear of a finished layer."""
        shard = next(own.shard for own in self._journal.finished if name in own.linears)
        with safe_open(self._output / shard, "pt") as file:
            return file.get_tensor(name)

    def records(self, index: int) -> list[JSON]:
        """The report lines of a finished layer."""
        return self._journal.finished[index].records

    def finish(self, whole: Path) -> None:
        """The file is written: move it to its place, and remove all that only the run needs.

        Args:
            whole: the file, in `scratch`.
        """
        whole.replace(self._file)
        atomic.sync_folder(self._file.parent)
        self.complete({})
        shutil.rmtree(self._output, ignore_errors=True)
