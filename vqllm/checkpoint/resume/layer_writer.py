"""The output folder of a quantization: finished layers, and how they become a checkpoint."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from vqllm._version import __version__
from vqllm.checkpoint import atomic, writer
from vqllm.checkpoint.file_names import FileNames
from vqllm.checkpoint.format import (
    JSON,
    RECORDS,
    QuantizationConfig,
    shard_name,
    spec_from_dict,
    spec_to_dict,
)
from vqllm.checkpoint.packed_matrix import LinearRecord, PackedMatrix
from vqllm.checkpoint.planned_size import tensor_bytes
from vqllm.checkpoint.resume.journal import ROUNDED, WORK, FinishedLayer, identity
from vqllm.checkpoint.resume.run_folder import RunFolder
from vqllm.checkpoint.side_files import copy_files
from vqllm.checkpoint.source import SourceTensors
from vqllm.core import local_paths
from vqllm.errors import CheckpointError, NumericalError
from vqllm_kernels.linear import LinearSpec


class LayerWriter(RunFolder):
    """Writes a checkpoint layer by layer."""

    def __init__(
        self,
        output: Path,
        source: Path,
        model: str,
        recipe: JSON,
        settings: JSON,
        trust_remote_code: bool = False,
        *,
        origin: str,
        private: bool = False,
    ) -> None:
        """Begin or go on.

        Args:
            source: the folder of the model.
            model: the name that its user gave it.
            settings: all else that could change the result: device, dtype.
            origin: the name of the original model that the checkpoint records.
            private: whether the checkpoint is no result but a part of a run, and says where the
                original and its texts are. One that may be published has names only.

        Raises:
            CheckpointError: something else is in the folder; a difference to the earlier run is
                shown.
        """
        self._source, self._origin, self._private = source, origin, private
        self._recipe, self._trust_remote_code = recipe, trust_remote_code
        if (output / WORK / ROUNDED).is_dir():
            raise CheckpointError(
                f"{output} holds an unfinished run of a recipe with `tune`. Repeat the command "
                "that began it, or choose another output folder."
            )
        # A model that cannot become a checkpoint is refused before anything is written.
        writer.read_dense_config(source)
        run = identity(
            model=model,
            source=source,
            recipe=recipe,
            settings=settings,
            trust_remote_code=trust_remote_code,
        )
        super().__init__(output, run)

    @property
    def num_finished(self) -> int:
        """Layers that need not be done again."""
        return len(self._journal.finished)

    @property
    def quantized(self) -> dict[str, LinearSpec]:
        """The quantized linears of all finished layers."""
        return {
            name: spec_from_dict(values)
            for layer in self._journal.finished
            for name, values in layer.linears.items()
        }

    def save_packed(self, name: str, made: PackedMatrix) -> PackedMatrix:
        """Store a quantized matrix until the run is finished; returns it as read from the file."""
        record = {
            "name": made.name,
            "spec": spec_to_dict(made.spec),
            "record": made.record.to_dict(),
        }
        self.save_record(name, record, {f"packed.{key}": t for key, t in made.tensors.items()})
        loaded = self.load_packed(name)
        assert loaded is not None, "it was just written"
        return loaded

    def load_packed(self, name: str) -> PackedMatrix | None:
        """What `save_packed` wrote; None if there is nothing, or it is damaged."""
        stored = self.load_record(name)
        if stored is None:
            return None
        values, tensors = stored
        return PackedMatrix(
            values["name"],
            spec_from_dict(values["spec"]),
            {key.removeprefix("packed."): tensor for key, tensor in tensors.items()},
            LinearRecord.from_dict(values["record"]),
        )

    def begin(
        self,
        tensors: SourceTensors,
        layer_names: list[str],
        planned: Mapping[str, LinearSpec],
        tied: Collection[str] = (),
    ) -> None:
        """Set the model's layers, and check that its tensors are there and the disk has room.

        Args:
            tensors: of the source model.
            planned: the linears and embeddings that will be quantized.
            tied: modules that will use the tensors of another one.

        Raises:
            OutOfSpaceError: the checkpoint would not fit.
        """
        self._tensors, self._layer_names = tensors, layer_names
        self._names = FileNames(tensors.blueprint, planned)
        if self.num_finished == 0:
            atomic.check_space(self._output, tensor_bytes(tensors, planned, tied))

    def write_layer(
        self,
        index: int,
        results: Sequence[PackedMatrix],
        changed: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a finished layer's shard, then its line in the journal.

        Args:
            changed: values in the place of other tensors of the source, by full name; they get the
                dtype that the source has.

        Raises:
            NumericalError: a changed value is beyond what that dtype holds.
        """
        # The packed tensors of each quantized linear, and all other tensors of the layer.
        prefix = f"{self._layer_names[index]}."
        names = [name for name in self._tensors if name.startswith(prefix)]
        replaced = {f"{result.name}.weight" for result in results}
        tensors = self._packed(results) | self._others(names, replaced, changed or {})
        # The journal comes last: a layer without its line is done again.
        shard = self._shard(index)
        digest = atomic.write_shard(self._output / shard, tensors, self.scratch)
        self._journal.append(
            FinishedLayer(
                layer=index,
                shard=shard,
                sha256=digest,
                linears={result.name: spec_to_dict(result.spec) for result in results},
                records=[result.record.to_dict() for result in results],
            )
        )

    def _packed(self, results: Iterable[PackedMatrix]) -> dict[str, Tensor]:
        """The tensors of quantized matrices by their names in the files."""
        return {
            f"{self._names.prefix(result.name, result.spec)}.{key}": tensor.cpu()
            for result in results
            for key, tensor in result.tensors.items()
        }

    def _others(
        self, names: Iterable[str], replaced: Collection[str], changed: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """All of these tensors of the source but those replaced, by their names in the files: with
        the stored ones as they are, unless some of what such a one holds is replaced."""
        names = list(names)
        source = self._tensors
        taken = {
            key
            for name in names
            if name in replaced or self._names.is_apart(name) or source.is_decoded(name)
            for key in source.files_of(name)
        }
        others: dict[str, Tensor] = {}
        apart: list[str] = []
        for name in names:
            keys = source.files_of(name)
            if name in changed or (name not in replaced and not taken.isdisjoint(keys)):
                apart.append(name)
            elif name not in replaced:
                others |= {key: source.read_stored(key) for key in keys if key not in others}
        whole = {name for name in apart if self._names.is_whole(name)}
        for name in whole:  # the same for all of its parts
            origin = self._tensors.blueprint.origin(name)
            if self._names.of(origin) not in others:
                others[self._names.of(origin)] = source.read_origin(name)
        for name, values in source.read_many(name for name in apart if name not in whole):
            if name in changed:
                values = _as_stored(name, changed[name], values.dtype)
            others[self._names.of(name)] = values
        return others

    def packed(self, index: int) -> list[tuple[str, LinearSpec, dict[str, Tensor]]]:
        """Name, specification and stored tensors of each quantized linear of a finished layer."""
        layer = self._journal.finished[index]
        tensors = load_file(self._output / layer.shard)
        found = []
        for name, values in layer.linears.items():
            spec = spec_from_dict(values)
            prefix = self._names.prefix(name, spec)
            own = {key: tensors[f"{prefix}.{key}"] for key in spec.layout()}
            found.append((name, spec, own))
        return found

    def vectors(self, index: int, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of a finished layer that are not packed, by full name."""
        with safe_open(self._output / self._journal.finished[index].shard, "pt") as file:
            return {name: file.get_tensor(self._names.of(name)) for name in names}

    def records(self, index: int) -> list[JSON]:
        """The report lines of a finished layer."""
        return self._journal.finished[index].records

    def all_records(self) -> list[JSON]:
        """The report lines of all finished layers."""
        return [record for layer in self._journal.finished for record in layer.records]

    def finish(
        self,
        not_quantized: dict[str, str],
        outside: Sequence[PackedMatrix] = (),
        tied: Mapping[str, str] | None = None,
    ) -> None:
        """Write everything outside the layers, the report's records, the index and config.json.

        Args:
            not_quantized: reasons by module.
            outside: quantized matrices outside the layers.
            tied: modules that use the tensors of one of them, which is the value.
        """
        # The last shard: all of the source that no layer has, with packed tensors in place of the
        # weights of quantized and tied modules.
        tied = tied or {}
        inside = tuple(f"{name}." for name in self._layer_names)
        replaced = {f"{name}.weight" for name in (*tied, *(result.name for result in outside))}
        names = [name for name in self._tensors if not name.startswith(inside)]
        rest = self._packed(outside) | self._others(names, replaced, {})
        rest |= {key: self._tensors.read_stored(key) for key in self._tensors.unused()}
        checksums = {layer.shard: layer.sha256 for layer in self._journal.finished}
        last = self._shard(len(self._layer_names))
        checksums[last] = atomic.write_shard(self._output / last, rest, self.scratch)
        specs = self.quantized | {result.name: result.spec for result in outside}
        file_names = {name: self._names.prefix(name, spec) for name, spec in specs.items()}
        config = QuantizationConfig.build(
            {file_names[name]: spec for name, spec in specs.items()},
            outside_layers=[file_names[result.name] for result in outside],
            tied={self._names.module(name): file_names[other] for name, other in tied.items()},
            linear_form=self._names.differ,
            recipe=self._recipe if self._private else local_paths.in_values(self._recipe),
            not_quantized=not_quantized,
            producer={"vqllm": __version__},
            source={"model": self._origin if self._private else local_paths.name_of(self._origin)},
        )
        # config.json comes last: with its quantization_config the folder is a checkpoint.
        records = [*self.all_records(), *(result.record.to_dict() for result in outside)]
        lines = [
            json.dumps({**record, "name": file_names[record["name"]]}, sort_keys=True) + "\n"
            for record in records
        ]
        atomic.write_bytes(self._output / RECORDS, "".join(lines).encode(), self.scratch)
        copy_files(self._source, self._output, self.scratch, self._trust_remote_code)
        writer.write_index(self._output, checksums, self.scratch, writer.read_config(self._source))
        writer.write_config(self._source, self._output, self.scratch, config)

    def source_bytes(self) -> int:
        """Bytes of the tensors of the source model."""
        return self._tensors.num_bytes()

    def _shard(self, index: int) -> str:
        return shard_name(index + 1, len(self._layer_names) + 1)


def _as_stored(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in the dtype of the source. NumericalError if one is beyond its range."""
    stored = values.to("cpu", dtype)
    if not bool(stored.isfinite().all()):
        raise NumericalError(
            f"{name}: trained to values up to {float(values.abs().max()):.3g}, which {dtype} does "
            "not hold: lower layer.rate."
        )
    return stored
