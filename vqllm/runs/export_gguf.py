"""A dense model as a GGUF file: Hessians layer by layer, codes, the file."""

import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vqllm import recipes
from vqllm.calibration.layer_stream import LayerStream
from vqllm.core.listing import listed
from vqllm.core.progress import Progress
from vqllm.errors import CheckpointError, ModelError
from vqllm.export import container, tensors, writing
from vqllm.export.layer_run import coded_linears
from vqllm.export.native_types import NativeType, type_for, type_of
from vqllm.models import demo
from vqllm.models.resolve import ResolvedModel, resolve
from vqllm.quantization.checks import Checked, check_model
from vqllm.quantization.loop import sequences_of
from vqllm.recipes import Recipe
from vqllm.runs.devices import device_of, dtype_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Those of `vqllm.api.export_gguf`."""

    model: str | Path
    output: str | Path
    type: str
    calibration: list[str] | None = None
    sequences: int | None = None
    seed: int = 0
    converter: str | Path | None = None
    device: str | None = None
    compute_dtype: str | None = None
    trust_remote_code: bool = False
    allow_bin: bool = False


def run(given: ExportArguments, progress: Progress) -> Path:
    """Write the file, whole or not at all.

    Raises:
        VqllmError: a mistake that the message explains; nothing is left then.
    """
    wanted, output = type_of(given.type), _output(given.output)
    recipe = _recipe(given)
    model = resolve(
        given.model, trust_remote_code=given.trust_remote_code, allow_bin=given.allow_bin
    )
    checked = check_model(model.path, model.name, recipe, given.trust_remote_code)
    converter = None
    if not _is_gguf(model):
        named = None if given.converter is None else Path(given.converter)
        converter = container.find_converter(named)
    with tempfile.TemporaryDirectory(prefix=f".{output.name[:64]}.", dir=output.parent) as made:
        folder = Path(made)
        partial = folder / "new.gguf"
        _write(given, wanted, recipe, model, checked, converter, folder, partial, progress)
        shutil.move(partial, output)
    return output


def _write(
    given: ExportArguments,
    wanted: NativeType,
    recipe: Recipe,
    model: ResolvedModel,
    checked: Checked,
    converter: Path | None,
    folder: Path,
    partial: Path,
    progress: Progress,
) -> None:
    from gguf import GGUFReader

    progress.phase("the source as a GGUF file")
    reader: Any = GGUFReader(_source(model, converter, folder))
    found = tensors.tensors_of_linears(reader, checked.selection.shapes)
    types, orders = _plan(wanted, checked, found)
    progress.phase("calibration text")
    device = device_of(given.device)
    tokens_SL = sequences_of(model.path, recipe, device, given.trust_remote_code)["calibration"]
    dtype = dtype_of(given.compute_dtype)
    stream = LayerStream(model.path, device, dtype, given.trust_remote_code, checked.tensors)
    coded: dict[str, tuple[NativeType, Path]] = {}
    for own in coded_linears(stream, tokens_SL, types, folder, progress):
        file = folder / f"{len(coded)}.npy"
        np.save(file, own.matrix.blocks_RB[orders[own.name]].cpu().numpy())
        coded[found[own.name].name] = types[own.name], file
    progress.phase("writing the file")
    writing.write(reader, coded, wanted.name, partial)


def _plan(
    wanted: NativeType, checked: Checked, found: dict[str, Any]
) -> tuple[dict[str, NativeType], dict[str, torch.Tensor]]:
    """The type of each linear that is coded, and its order of rows; told before anything is
    computed. ModelError where nothing is left."""
    types, orders, kept = {}, {}, []
    for name, (_, cols) in checked.selection.shapes.items():
        native = type_for(wanted, cols)
        order = None
        if native is not None and name in found:
            order = tensors.row_order(found[name], checked.tensors.read(f"{name}.weight"))
        if native is None or order is None:
            kept.append(name)
        else:
            types[name], orders[name] = native, order
    if not types:
        raise ModelError(
            f"no linear can be stored as {wanted.name}: its blocks of {wanted.block} divide the "
            "columns of none, or the converter has none of them as a matrix of its own."
        )
    logger.info(tensors.sizes({name: native.name for name, native in types.items()}))
    if kept:
        logger.warning(
            "%d linears stay as the GGUF file of the source has them: %s", len(kept), listed(kept)
        )
    return types, orders


def _recipe(given: ExportArguments) -> Recipe:
    """What of a recipe counts here: the text, the seed, and that routers stay."""
    calibration = {"source": given.calibration or ["self"], "sequences": given.sequences}
    return recipes.from_dict(
        {
            "name": "export-gguf",
            "seed": given.seed,
            "calibration": calibration,
            "codec": {"type": "uniform"},
            "rounding": {"type": "nearest"},
            "skip_kinds": ["routers", "few_rows"],
        },
        "export-gguf",
    )


def _is_gguf(model: ResolvedModel) -> bool:
    return model.hub_id == demo.HUB_ID or model.name.lower().endswith(".gguf")


def _source(model: ResolvedModel, converter: Path | None, folder: Path) -> Path:
    """A GGUF file of the model with its own weights."""
    if converter is not None:
        container.convert(converter, model.path, model.name, folder / "source.gguf")
        return folder / "source.gguf"
    if model.hub_id == demo.HUB_ID:
        return demo.gguf_file(folder)
    return Path(model.name).expanduser()


def _output(output: str | Path) -> Path:
    """The file to write. CheckpointError where it cannot be."""
    path = Path(output).expanduser().absolute()
    if path.suffix.lower() != ".gguf" or path.exists() or not path.parent.is_dir():
        raise CheckpointError(
            f"{output} cannot be the output: it must be the name of a new file that ends in .gguf, "
            "in a folder that exists."
        )
    return path
