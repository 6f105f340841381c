"""Reading a checkpoint without a model: its specifications, its tensors, its dense weights."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping

from vqllm.checkpoint import checksums
from vqllm.checkpoint.format import CONFIG, JSON, QUANT_METHOD, RECORDS, QuantizationConfig
from vqllm.checkpoint.resume.journal import is_unfinished
from vqllm.checkpoint.shards import (
    DAMAGED,
    DTYPE_NAMES,
    StoredTensor,
    read_header,
    read_index,
)
from vqllm.core import json_text, path_names
from vqllm.core.bits import BitCount
from vqllm.errors import CheckpointError
from vqllm.hf.conversions import Renaming
from vqllm_kernels.linear import LinearSpec

MAX_REPORT_BYTES = 1 << 30


def is_checkpoint(folder: str | Path) -> bool:
    """Whether `folder` is a finished vqllm checkpoint, of any format version."""
    try:
        config = json_text.read(Path(folder) / CONFIG)
        return config["quantization_config"]["quant_method"] == QUANT_METHOD
    except (OSError, ValueError, KeyError, TypeError):
        return False


class Checkpoint:
    """A quantized model's folder.

    Attributes:
        folder: where it is.
        config: all of config.json.
        quantization: its `quantization_config`.
        linears: the specification of every quantized module (linears, and an embedding if one is
            quantized) by full name.
        tensors: every stored tensor by full name.

    Names are those of the files, unless it is seen `in_model`.
    """

    def __init__(
        self,
        folder: Path,
        config: JSON,
        quantization: QuantizationConfig,
        files: dict[str, str],
        tensors: dict[str, StoredTensor],
    ) -> None:
        self.folder = folder
        self.config = config
        self.quantization = quantization
        self.linears: dict[str, LinearSpec] = quantization.linears()
        self.tensors = tensors
        self._files = files
        self._keys: dict[str, str] = {}
        """names in the files by those used here, where they differ"""

    @classmethod
    def open(cls, folder: str | Path, verify: bool = True) -> "Checkpoint":
        """Open a checkpoint and check that it is whole.

        Args:
            folder: the checkpoint.
            verify: compare every shard with the sha256 in the index (reads all bytes once).
                Without it, files are still checked to be there, complete and consistent.

        Raises:
            CheckpointError: not a vqllm checkpoint, a newer format, or damaged; names the file.
        """
        # First the files by themselves; then whether they fit the specifications.
        folder = Path(folder)
        if (problem := path_names.problem(folder)) is not None:
            raise CheckpointError(f"{path_names.shown(folder)} is no checkpoint: {problem}.")
        config = _read_config(folder)
        quantization = QuantizationConfig.parse(config["quantization_config"], str(folder / CONFIG))
        index = read_index(folder)
        shards = sorted({*index.files.values(), *index.checksums})
        tensors: dict[str, StoredTensor] = {}
        for shard in shards:
            tensors |= read_header(folder / shard)
        # Index and headers must name the same tensors.
        missing = sorted(index.files.keys() - tensors.keys())
        if missing:
            raise CheckpointError(
                f"{folder}: the index names {len(missing)} tensors that no shard has, first "
                f"{missing[0]}. {DAMAGED}"
            )
        hidden = sorted(tensors.keys() - index.files.keys())
        if hidden:
            raise CheckpointError(
                f"{folder}: the index leaves out {len(hidden)} tensors of its shards, first "
                f"{hidden[0]}. {DAMAGED}"
            )
        checkpoint = cls(folder, config, quantization, index.files, tensors)
        checkpoint._check_linears()
        # Sizes come before the bytes, which may be many more than they should.
        found = sum(tensor.num_bytes for tensor in tensors.values())
        if index.checksums and index.total_size not in (None, found):
            raise CheckpointError(
                f"{folder}: the index announces {index.total_size} bytes of tensors, and the "
                f"shards have {found}. {DAMAGED}"
            )
        if verify:
            checksums.compare(folder, index)
        return checkpoint

    def _check_linears(self) -> None:
        """Raise CheckpointError unless each quantized module has the tensors of its specification,
        in shape and dtype."""
        for module, spec in self.linears.items():
            for name, expected in spec.layout().items():
                stored = self.tensors.get(f"{module}.{name}")
                if stored is None:
                    raise CheckpointError(
                        f"{self.folder}: {module} is quantized, but its tensor {name!r} is in no "
                        f"shard. {DAMAGED}"
                    )
                if (stored.shape, stored.dtype) != (expected.shape, DTYPE_NAMES[expected.dtype]):
                    raise CheckpointError(
                        f"{self.folder}: {module}.{name} is {stored.dtype} {stored.shape}, but its "
                        f"specification asks for {expected.dtype} {expected.shape}. {DAMAGED}"
                    )
        if foreign := self._packed_without_module():
            raise CheckpointError(
                f"{self.folder}: the packed tensors of {foreign} are there, but its {CONFIG} does "
                f"not name it among the quantized modules. {DAMAGED}"
            )

    def _packed_without_module(self) -> str | None:
        """A module that is not named, but has all tensors of one of the specifications."""
        known = {*self.linears, *self.quantization.tied}
        layouts = [
            {name: (DTYPE_NAMES[own.dtype], own.shape) for name, own in spec.layout().items()}
            for spec in {id(spec): spec for spec in self.linears.values()}.values()
        ]
        modules: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
        for full, tensor in self.tensors.items():
            module, _, name = full.rpartition(".")
            if module not in known:
                modules.setdefault(module, {})[name] = (tensor.dtype, tensor.shape)
        for module, tensors in modules.items():
            if any(layout.items() <= tensors.items() for layout in layouts):
                return module
        return None

    def read(self, name: str) -> Tensor:
        """One stored tensor. CheckpointError when its file is damaged."""
        path = self.folder / self._files[name]
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(self.name_in_files(name))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}. {DAMAGED}") from error

    def in_model(self, model: Any) -> "Checkpoint":
        """The same with the names that modules and tensors have in a model that was loaded from it;
        what the model has no place for keeps its name."""
        renaming = Renaming(model, get_model_conversion_mapping(model))
        modules = dict(model.named_modules(remove_duplicate=False))

        def module_name(name: str, tensor: str) -> str:
            return renaming.module(name, tensor, modules) or name

        names = {}
        for name in self.tensors:
            module, _, key = name.rpartition(".")
            names[name] = f"{module_name(module, key)}.{key}" if module else name
        if all(name == own for name, own in names.items()):
            return self
        own = self.quantization
        linears = {n: module_name(n, next(iter(s.layout()))) for n, s in self.linears.items()}
        seen = Checkpoint(
            self.folder,
            self.config,
            replace(
                own,
                modules={linears[name]: id for name, id in own.modules.items()},
                tied={module_name(n, "weight"): linears[other] for n, other in own.tied.items()},
                outside_layers=tuple(linears[name] for name in own.outside_layers),
            ),
            {names[name]: file for name, file in self._files.items()},
            {names[name]: tensor for name, tensor in self.tensors.items()},
        )
        seen._keys = {new: name for name, new in (names | linears).items()}
        return seen

    def name_in_files(self, name: str) -> str:
        """What a module or tensor is called in the files."""
        return self._keys.get(name, name)

    def shards(self) -> dict[str, list[str]]:
        """Names of the tensors of every file that has any."""
        names: dict[str, list[str]] = {}
        for name in sorted(self._files):
            names.setdefault(self._files[name], []).append(name)
        return names

    def packed(self, module: str) -> dict[str, Tensor]:
        """The stored tensors of a quantized module under their own names, bias excluded.

        CheckpointError when a file is damaged or a value cannot be decoded.
        """
        spec = self.linears[module]
        tensors = {name: self.read(f"{module}.{name}") for name in spec.layout()}
        if problem := spec.problem(tensors):
            raise CheckpointError(f"{self.folder}: {module}: {problem}. {DAMAGED}")
        return tensors

    def dense(self, module: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights of a quantized module [R, C] in the model's own basis, computed in float32
        and rounded once to `dtype`."""
        return self.linears[module].dequantize(self.packed(module), dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def bits(self, module: str) -> BitCount:
        """Exact bits of the stored tensors of a quantized module, bias excluded."""
        bits = {"codes": 0, "codebook": 0, "side": 0}
        for name, tensor in self.linears[module].layout().items():
            bits[tensor.kind] += 8 * self.tensors[f"{module}.{name}"].num_bytes
        return BitCount(**bits)

    def other_tensors(self) -> list[str]:
        """Names of the tensors that are stored as they were in the source, biases included."""
        packed = {
            f"{module}.{name}" for module, spec in self.linears.items() for name in spec.layout()
        }
        return sorted(self._files.keys() - packed)

    def records(self) -> dict[str, JSON]:
        """The report's line of each quantized module by name; empty where there is no report."""
        return {record["name"]: record for record in self._report_lines()}

    def _report_lines(self) -> Iterator[JSON]:
        path = self.folder / RECORDS
        if not path.is_file() or path.stat().st_size > MAX_REPORT_BYTES:
            return
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                # The report is for people: a damaged line is no obstacle.
                with suppress(ValueError, TypeError, RecursionError):
                    record = json.loads(line)
                    if record["name"] in self.linears:
                        yield record


def _read_config(folder: Path) -> JSON:
    """config.json of a checkpoint. CheckpointError says what else the folder seems to be."""
    path = folder / CONFIG
    if not path.is_file():
        if is_unfinished(folder):
            raise CheckpointError(
                f"{folder} holds an unfinished run. Repeat the command that began it; it goes on "
                "from the last finished layer."
            )
        raise CheckpointError(f"{folder} is no checkpoint: it has no {CONFIG}.")
    try:
        config = json_text.read(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. {DAMAGED}") from error
    if not isinstance(config, dict) or not isinstance(config.get("quantization_config"), dict):
        raise CheckpointError(
            f"{folder} is no vqllm checkpoint: its {CONFIG} has no quantization_config. It may be "
            "an ordinary model; quantize it first."
        )
    return config
