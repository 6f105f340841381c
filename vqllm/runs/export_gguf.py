"""A dense model as a GGUF file: Hessians layer by layer, codes, the file."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vqllm import recipes
from vqllm.calibration.layer_stream import LayerStream
from vqllm.checkpoint import atomic
from vqllm.checkpoint.resume.journal import identity
from vqllm.core.listing import listed
from vqllm.core.progress import Progress
from vqllm.core.protocols import JSON
from vqllm.errors import CheckpointError, ModelError
from vqllm.export import container, tensors, writing
from vqllm.export.coded_layers import CodedLayers, folder_of
from vqllm.export.layer_run import code_layers
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
    """Write the file, whole or not at all; a run that was killed goes on.

    Raises:
        VqllmError: a mistake that the message explains.
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
    about = _identity(given, wanted, recipe, model, converter)
    with CodedLayers(output, about) as unfinished:
        export = _Export(given, wanted, recipe, model, checked, unfinished, progress)
        export.write(_source(model, converter, unfinished.scratch))
    return output


@dataclass(frozen=True)
class _Export:
    """One run."""

    given: ExportArguments
    wanted: NativeType
    recipe: Recipe
    model: ResolvedModel
    checked: Checked
    run: CodedLayers
    progress: Progress

    def write(self, source: Path) -> None:
        """Code the linears of the model, and write its file.

        Args:
            source: a GGUF file of the model with its own weights.
        """
        from gguf import GGUFReader

        given, trusted = self.given, self.given.trust_remote_code
        reader: Any = GGUFReader(source)
        places = tensors.places_of_linears(reader, self.checked.selection.shapes)
        types, orders = _plan(self.wanted, self.checked, places)
        self.progress.phase("calibration text")
        device = device_of(given.device)
        tokens_SL = self.run.load_or_make(
            "sequences", lambda: sequences_of(self.model.path, self.recipe, device, trusted)
        )["calibration"]
        dtype = dtype_of(given.compute_dtype)
        stream = LayerStream(self.model.path, device, dtype, trusted, self.checked.tensors)
        shrinkage = self.recipe.hessian.expert_shrinkage
        code_layers(stream, tokens_SL, types, shrinkage, self.run, self.progress)
        self.progress.phase("writing the file")
        new = self.run.scratch / "new.gguf"
        with _out_of_space(new):
            coded = self._in_file(types, orders, places)
            writing.write(reader, coded, self.wanted.name, new)
            with new.open("rb+") as file:
                os.fsync(file.fileno())
        self.run.finish(new)

    def _in_file(
        self,
        types: Mapping[str, NativeType],
        orders: Mapping[str, torch.Tensor],
        places: Mapping[str, tensors.Place],
    ) -> dict[str, tuple[NativeType, Path]]:
        """The blocks of each tensor that is new, in the file's order, in a file of their own."""
        parts: dict[str, list[str]] = {}
        for name in types:
            parts.setdefault(places[name].name, []).append(name)
        coded = {}
        for number, (tensor, names) in enumerate(parts.items()):
            blocks = {name: self.run.blocks(name)[orders[name]].numpy() for name in names}
            file = self.run.scratch / f"{number}.npy"
            np.save(file, tensors.in_order(blocks, places))
            coded[tensor] = types[names[0]], file
        return coded


@contextmanager
def _out_of_space(path: Path) -> Iterator[None]:
    """A full disk, told as elsewhere: what is coded is kept."""
    try:
        yield
    except OSError as error:
        if atomic.is_out_of_space(error):
            raise atomic.out_of_space(path, path.stat().st_size) from error
        raise


def _plan(
    wanted: NativeType, checked: Checked, places: Mapping[str, tensors.Place]
) -> tuple[dict[str, NativeType], dict[str, torch.Tensor]]:
    """The type of each linear that is coded, and its order of rows; told before anything is
    computed. ModelError where nothing is left."""
    shapes, orders = checked.selection.shapes, {}
    natives = {name: type_for(wanted, cols) for name, (_, cols) in shapes.items()}
    weights = {f"{name}.weight": name for name in places if natives[name] is not None}
    for weight, W_RC in checked.tensors.read_many(weights):
        order_R = tensors.row_order(places[weights[weight]], W_RC)
        if order_R is not None:
            orders[weights[weight]] = order_R
    whole = tensors.of_whole_tensors(places, orders)
    types = {name: native for name, native in natives.items() if native and name in whole}
    kept = [name for name in shapes if name not in types]
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


def _identity(
    given: ExportArguments,
    wanted: NativeType,
    recipe: Recipe,
    model: ResolvedModel,
    converter: Path | None,
) -> JSON:
    """All that could change a byte of the file."""
    settings = {
        "type": wanted.name,
        "device": device_of(given.device).type,
        "compute_dtype": str(dtype_of(given.compute_dtype) or "auto"),
        "converter": None if converter is None else str(converter),
    }
    return identity(
        model=model.name,
        source=model.path,
        recipe=recipe.to_dict(),
        settings=settings,
        trust_remote_code=given.trust_remote_code,
    )


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
    """A GGUF file of the model with its own weights; made once a run."""
    made = folder / "source.gguf"
    if converter is None and model.hub_id != demo.HUB_ID:
        return Path(model.name).expanduser()
    if not made.is_file():
        partial = folder / "source.part.gguf"
        if converter is None:
            partial = demo.gguf_file(folder)
        else:
            container.convert(converter, model.path, model.name, partial)
        partial.replace(made)
    return made


def _output(output: str | Path) -> Path:
    """The file to write. CheckpointError where it cannot be."""
    path = Path(output).expanduser().absolute()
    if path.suffix.lower() != ".gguf" or path.exists() or not path.parent.is_dir():
        raise CheckpointError(
            f"{output} cannot be the output: it must be the name of a new file that ends in .gguf, "
            "in a folder that exists."
            + (f" {folder_of(path)} is not needed any more." if _is_left(path) else "")
        )
    return path


def _is_left(path: Path) -> bool:
    """Whether a run that wrote a file was killed before it removed its folder."""
    return path.is_file() and folder_of(path).is_dir()
