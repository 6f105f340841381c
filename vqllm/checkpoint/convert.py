"""A checkpoint of another tool written in our own format, without loss."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from vqllm._version import __version__
from vqllm.checkpoint import atomic, writer
from vqllm.checkpoint.file_names import FileNames
from vqllm.checkpoint.format import QuantizationConfig, shard_name
from vqllm.checkpoint.merged_experts import linears_of_experts
from vqllm.checkpoint.new_folder import Made, new_folder, num_bytes, split
from vqllm.checkpoint.shards import natural_order
from vqllm.checkpoint.side_files import copy_files
from vqllm.checkpoint.source import SourceTensors
from vqllm.checkpoint.stored import StoredFolder, coded_folder
from vqllm.core import local_paths
from vqllm.errors import CheckpointError
from vqllm.foreign import METHODS
from vqllm.foreign.base import CannotHoldError
from vqllm.foreign.coded_model import CodedModule
from vqllm.hf.decoder_layers import layer_names
from vqllm_kernels.linear import LinearSpec

INSTEAD = "Write dense weights instead (vqllm dequantize), or quantize from this folder."


def convert_checkpoint(folder: str | Path, output: str | Path) -> Path:
    """Write a checkpoint of another tool so that it runs as one of ours.

    The decoded weights are the same numbers. All linears must have a place in our format: which
    have not is found before any codes are read. The result appears whole, or not at all.

    Args:
        folder: a checkpoint in a format of `vqllm.foreign`.
        output: a new or an empty folder.

    Returns:
        `output`.

    Raises:
        CheckpointError: our format cannot hold a linear, or `output` is in use.
        ModelError: `folder` is damaged, or has an option that is not known.
        OutOfSpaceError: the disk is full.
    """
    folder, output = Path(folder), Path(output)
    stored = coded_folder(folder)
    if stored is None or stored.coded is None:
        raise CheckpointError(
            f"{folder} is no checkpoint of another tool that is read here: "
            f"{', '.join(METHODS)}. Quantize a dense model instead."
        )
    source = SourceTensors.open(folder)
    experts = linears_of_experts(source)
    names = _names_in_model(stored.coded.modules, source, experts)
    specs = {name: _spec(stored.coded.modules[name]) for name in names}
    file_names = FileNames(source.blueprint, names.values())
    prefixes = {name: file_names.prefix(names[name], spec) for name, spec in specs.items()}
    layers = tuple(f"{name}." for name in layer_names(source.blueprint.model))
    config = QuantizationConfig.build(
        {prefixes[name]: spec for name, spec in specs.items()},
        outside_layers=[
            prefixes[own] for own, name in names.items() if not name.startswith(layers)
        ],
        linear_form=file_names.differ,
        producer={"vqllm": __version__},
        source={"model": local_paths.name_of(str(folder.absolute()))},
    )
    # With experts apart, those that are not coded are linears of their own in the files too.
    moved = {key: file_names.of(name) for key, name in experts.items() if file_names.is_apart(name)}
    made = _made(stored, source, specs, prefixes, moved)
    with new_folder(output, num_bytes(made), "converted model") as partial_folder:
        _write(folder, made, partial_folder, config)
    return output


def _names_in_model(
    modules: Mapping[str, CodedModule], source: SourceTensors, experts: Mapping[str, str]
) -> dict[str, str]:
    """The linear of the model that each coded module is.

    Args:
        experts: names of experts' weights in the model by those in the files.

    Raises:
        CheckpointError: it is a part of a tensor of the model in a way that is not known.
    """
    parts, origins = source.blueprint.parts, source.blueprint.conversions.origins
    alone = {
        origin.keys[0]: name
        for name, origin in origins.items()
        if not origin.patterns and name not in parts
    }
    found = {}
    for module in modules:
        name = alone.get(f"{module}.weight") or experts.get(f"{module}.weight")
        if name is None:
            raise CheckpointError(
                f"{source.folder} cannot be converted: {module} is no linear of its own in "
                f"transformers' {type(source.blueprint.model).__name__}. {INSTEAD}"
            )
        found[module] = name.removesuffix(".weight")
    return found


def _spec(module: CodedModule) -> LinearSpec:
    try:
        return module.pack()[0]
    except CannotHoldError as error:
        raise CheckpointError(
            f"{module.stored.folder} cannot be converted: of {module.name}, {error}. {INSTEAD}"
        ) from error


def _made(
    stored: StoredFolder,
    source: SourceTensors,
    specs: Mapping[str, LinearSpec],
    prefixes: Mapping[str, str],
    moved: Mapping[str, str],
) -> list[Made]:
    """All tensors of the result. Stored ones that the model has no place for, such as biases of
    zeros that some tools write, are left out.

    Args:
        moved: the names of stored tensors that have other ones in the result.
    """
    assert stored.coded is not None
    made = []
    for name, spec in specs.items():
        layout = spec.layout()
        sizes = {f"{prefixes[name]}.{key}": own.num_bytes for key, own in layout.items()}
        made.append(Made(sizes, partial(_packed, stored.coded.modules[name], prefixes[name])))
    left_out = {f"{name}.weight" for name in specs} | set(source.unused())
    for key, header in stored.tensors.items():
        if key not in left_out:
            name = moved.get(key, key)
            made.append(Made({name: header.num_bytes}, partial(_stored, stored, key, name)))
    return sorted(made, key=lambda own: natural_order(next(iter(own.sizes))))


def _packed(module: CodedModule, prefix: str) -> dict[str, Tensor]:
    spec, make = module.pack()
    tensors = make()
    if problem := spec.problem(tensors):
        raise CheckpointError(
            f"{module.stored.folder} cannot be converted: of {module.name}, {problem}. {INSTEAD}"
        )
    return {f"{prefix}.{key}": value for key, value in tensors.items()}


def _stored(stored: StoredFolder, key: str, name: str) -> dict[str, Tensor]:
    return {name: stored.read(key)}


def _write(source: Path, made: Sequence[Made], folder: Path, config: QuantizationConfig) -> None:
    """Everything of the checkpoint, into a folder that is empty."""
    staging = folder / ".staging"
    staging.mkdir()
    shards, checksums = list(split(made)), {}
    for number, group in enumerate(shards, start=1):
        file = shard_name(number, len(shards))
        tensors = {name: tensor for own in group for name, tensor in own.make().items()}
        checksums[file] = atomic.write_shard(folder / file, tensors, staging)
    copy_files(source, folder, staging, trust_remote_code=True)
    writer.write_index(folder, checksums, staging, writer.read_config(source))
    writer.write_config(source, folder, staging, config)
    staging.rmdir()
