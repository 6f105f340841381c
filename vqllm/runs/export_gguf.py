"""A dense model as a GGUF file: Hessians layer by layer, codes, the file."""

import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from vqllm.export.mix import Mix, mix_of, options
from vqllm.export.native_types import NativeType
from vqllm.models import demo
from vqllm.models.resolve import ResolvedModel, resolve
from vqllm.quantization.checks import Checked, check_model
from vqllm.quantization.loop import sequences_of
from vqllm.recipes import Recipe
from vqllm.runs.devices import device_of, dtype_of
from vqllm.runs.mixed_types import MixedTypes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Those of `vqllm.api.export_gguf`."""

    model: str | Path
    output: str | Path
    type: str | None = None
    mix: str | Sequence[str] | None = None
    size: str | int | None = None
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
    wanted, output = mix_of(given.type, given.mix, given.size), _output(given.output)
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
        new = folder / "new.gguf"
        _write(given, wanted, recipe, model, checked, converter, folder, new, progress)
        shutil.move(new, output)
    return output


def _write(
    given: ExportArguments,
    wanted: NativeType | Mix,
    recipe: Recipe,
    model: ResolvedModel,
    checked: Checked,
    converter: Path | None,
    folder: Path,
    target: Path,
    progress: Progress,
) -> None:
    from gguf import GGUFReader

    progress.phase("the source as a GGUF file")
    reader: Any = GGUFReader(_source(model, converter, folder))
    found = tensors.tensors_of_linears(reader, checked.selection.shapes)
    types, orders = _plan(wanted, checked, found)
    mixed = None
    if isinstance(wanted, Mix):
        linears = {name: found[name].name for name in orders}
        mixed = MixedTypes.of(wanted, reader, checked.tensors.blueprint.model, linears, folder)
    progress.phase("calibration text")
    device = device_of(given.device)
    tokens_SL = sequences_of(model.path, recipe, device, given.trust_remote_code)["calibration"]
    dtype = dtype_of(given.compute_dtype)
    outside, hessians = writing.outside_types(reader), {}
    if mixed is not None:
        # The tensors of `checked` are for one stream, that of the layers that are coded.
        opened = partial(LayerStream, model.path, device, trust_remote_code=given.trust_remote_code)
        chosen, hessians = mixed.choose(opened, dtype, tokens_SL, given.seed, folder, progress)
        types = {name: chosen[found[name].name] for name in orders}
        outside |= {name: native for name, native in chosen.items() if name in writing.ENDS}
        _say(types | outside)
    stream = LayerStream(model.path, device, dtype, given.trust_remote_code, checked.tensors)
    coded: dict[str, tuple[NativeType, Path]] = {}
    for own in coded_linears(stream, tokens_SL, types, folder, progress):
        file = folder / f"{len(coded)}.npy"
        np.save(file, own.matrix.blocks_RB[orders[own.name]].cpu().numpy())
        coded[found[own.name].name] = types[own.name], file
    progress.phase("writing the file")
    main = wanted.main(types, checked.selection.shapes) if isinstance(wanted, Mix) else wanted
    writing.write(reader, coded, outside, hessians, main.name, target)


def _plan(
    wanted: NativeType | Mix, checked: Checked, found: dict[str, Any]
) -> tuple[dict[str, NativeType], dict[str, torch.Tensor]]:
    """The type of each linear that is coded (of a mix the first that it can have), and its order of
    rows; told before anything is computed. ModelError where nothing is left."""
    natives = wanted.types if isinstance(wanted, Mix) else (wanted,)
    types, orders, kept = {}, {}, []
    for name, (_, cols) in checked.selection.shapes.items():
        offered, order = options(natives, cols), None
        if offered and name in found:
            order = tensors.row_order(found[name], checked.tensors.read(f"{name}.weight"))
        if order is None:
            kept.append(name)
        else:
            types[name], orders[name] = offered[0], order
    if not types:
        raise ModelError(
            f"no linear can be stored as {listed([own.name for own in natives])}: blocks of "
            f"{natives[0].block} divide the columns of none, or the converter has none of them as "
            "a matrix of its own."
        )
    if not isinstance(wanted, Mix):
        _say(types)
    if kept:
        logger.warning(
            "%d linears stay as the GGUF file of the source has them: %s", len(kept), listed(kept)
        )
    return types, orders


def _say(types: Mapping[str, NativeType]) -> None:
    logger.info(tensors.sizes({name: native.name for name, native in types.items()}))


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
