"""The output folder of a tuning run: a checkpoint with some tensors of another one changed."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from vqllm.checkpoint import atomic, writer
from vqllm.checkpoint.format import CONFIG, JSON, RECORDS, QuantizationConfig
from vqllm.checkpoint.packed_matrix import bit_fields
from vqllm.checkpoint.reader import Checkpoint
from vqllm.checkpoint.resume.journal import identity
from vqllm.checkpoint.resume.run_folder import RunFolder
from vqllm.checkpoint.side_files import copy_files, without_places
from vqllm.core import local_paths
from vqllm_kernels.linear import LinearSpec

ABOUT_ORIGIN = {"recipe", "source", "tuning"}
"""Keys of `quantization_config`."""


class TunedWriter(RunFolder):
    """Writes a tuned checkpoint."""

    def __init__(self, output: Path, checkpoint: Checkpoint, recipe: JSON, settings: JSON) -> None:
        """Begin or go on.

        Args:
            checkpoint: the one that is tuned.
            settings: all else that could change the result: teacher, device.

        Raises:
            CheckpointError: something else is in the folder; a difference to the earlier run is
                shown.
        """
        self._checkpoint = checkpoint
        run = identity(
            model=str(checkpoint.folder),
            source=checkpoint.folder,
            recipe=recipe,
            settings=settings,
            trust_remote_code=True,
        )
        super().__init__(output, run)

    def write(
        self,
        specs: Mapping[str, LinearSpec],
        packed: Mapping[str, Mapping[str, Tensor]],
        others: Mapping[str, Tensor],
        record: JSON,
    ) -> None:
        """Write the shards of the checkpoint with these specifications, packed tensors (by module)
        and other tensors in the place of its own, and everything beside them.

        Args:
            record: is added to the `tuning` of config.json.
        """
        checkpoint = self._checkpoint
        linears = checkpoint.linears | dict(specs)
        # The shards stay those of the checkpoint: each tensor goes into the file where it was.
        modules = {
            f"{module}.{name}": module
            for module, spec in checkpoint.linears.items()
            for name in spec.layout()
        }
        written: dict[str, str] = {}
        checksums: dict[str, str] = {}
        for shard, names in checkpoint.shards().items():
            tensors: dict[str, Tensor] = {}
            for name in names:
                module = modules.get(name)
                if module is not None and module in packed:
                    own = packed[module]
                    # Where a module's tensors are spread over shards, the first one gets all.
                    if written.setdefault(module, shard) == shard:
                        tensors |= {f"{module}.{key}": tensor for key, tensor in own.items()}
                else:
                    tensors[name] = others[name] if name in others else checkpoint.read(name)
            checksums[shard] = atomic.write_shard(self._output / shard, tensors, self.scratch)
        old = checkpoint.quantization
        config = replace(
            QuantizationConfig.build(
                linears,
                outside_layers=old.outside_layers,
                tied=old.tied,
                linear_form=old.linear_form,
            ),
            extra=_published({**old.extra, "tuning": [*old.extra.get("tuning", []), record]}),
        )
        copy_files(checkpoint.folder, self._output, self.scratch, trust_remote_code=True)
        # Bits are those that it has now. Losses stay those of the rounding: tuning follows
        # predictions, not weights.
        lines = [
            json.dumps({**record, **bit_fields(linears[name])}, sort_keys=True) + "\n"
            for name, record in checkpoint.records().items()
        ]
        atomic.write_bytes(self._output / RECORDS, "".join(lines).encode(), self.scratch)
        writer.write_index(self._output, checksums, self.scratch, checkpoint.config)
        values = {**without_places(checkpoint.config), "quantization_config": config.to_dict()}
        writer.write_json(self._output / CONFIG, values, self.scratch)


def _published(extra: JSON) -> JSON:
    """What a checkpoint says about its origin, with names in place of local paths."""
    told = {key: local_paths.in_values(extra[key]) for key in extra.keys() & ABOUT_ORIGIN}
    return {**extra, **told}
