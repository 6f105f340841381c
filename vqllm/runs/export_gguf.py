"""A dense model as a GGUF file: Hessians layer by layer, codes, the file."""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vqllm import recipes
from vqllm.calibration.layer_stream import LayerStream
from vqllm.checkpoint import atomic
from vqllm.checkpoint.dequantize import dequantize_checkpoint
from vqllm.checkpoint.resume.journal import identity
from vqllm.checkpoint.stored import coded_folder
from vqllm.core.listing import listed
from vqllm.core.progress import Progress
from vqllm.core.protocols import JSON
from vqllm.errors import CheckpointError, ModelError
from vqllm.export import container, tensors, writing
from vqllm.export.coded_layers import CodedLayers, folder_of
from vqllm.export.layer_run import code_layers
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

TYPE_OF, HESSIAN_OF = "type of ", "hessian of "
"""Before the names of tensors, in what a run keeps of the choice of types."""


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
    """Write the file, whole or not at all; a run that was killed goes on.

    Raises:
        VqllmError: a mistake that the message explains.
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
    about = _identity(given, wanted, recipe, model, converter)
    with CodedLayers(output, about) as unfinished:
        export = _Export(given, wanted, recipe, model, checked, unfinished, progress)
        export.write(_source(model, converter, unfinished.scratch))
    return output


@dataclass(frozen=True)
class _Export:
    """One run."""

    given: ExportArguments
    wanted: NativeType | Mix
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
        shapes = self.checked.selection.shapes
        places = tensors.places_of_linears(reader, shapes)
        types, orders = _plan(self.wanted, self.checked, places)
        mixed = None
        if isinstance(self.wanted, Mix):
            linears = {name: places[name].name for name in types}
            model = self.checked.tensors.blueprint.model
            mixed = MixedTypes.of(self.wanted, reader, model, linears, self.run.scratch)
        self.progress.phase("calibration text")
        device = device_of(given.device)
        tokens_SL = self.run.load_or_make(
            "sequences", lambda: sequences_of(self.model.path, self.recipe, device, trusted)
        )["calibration"]
        outside, hessians = writing.outside_types(reader), {}
        if mixed is not None:
            chosen, hessians = self._chosen(mixed, tokens_SL)
            types = {name: chosen[places[name].name] for name in types}
            outside |= {name: native for name, native in chosen.items() if name in writing.ENDS}
            _say(types | outside)
        dtype = dtype_of(given.compute_dtype)
        stream = LayerStream(self.model.path, device, dtype, trusted, self.checked.tensors)
        shrinkage = self.recipe.hessian.expert_shrinkage
        code_layers(stream, tokens_SL, types, shrinkage, self.run, self.progress)
        self.progress.phase("writing the file")
        main = self.wanted.main(types, shapes) if isinstance(self.wanted, Mix) else self.wanted
        new = self.run.scratch / "new.gguf"
        with _out_of_space(new):
            coded = self._in_file(types, orders, places)
            writing.write(reader, coded, outside, hessians, main.name, new)
            with new.open("rb+") as file:
                os.fsync(file.fileno())
        self.run.finish(new)

    def _chosen(
        self, mixed: MixedTypes, tokens_SL: torch.Tensor
    ) -> tuple[dict[str, NativeType], dict[str, torch.Tensor]]:
        """What `MixedTypes.choose` returns, once a run."""
        given, offered = self.given, mixed.offer.types
        device, dtype = device_of(given.device), dtype_of(given.compute_dtype)
        # The tensors of `checked` are for one stream, that of the layers that are coded.
        opened = partial(
            LayerStream, self.model.path, device, trust_remote_code=given.trust_remote_code
        )

        def choose() -> dict[str, torch.Tensor]:
            chosen, hessians = mixed.choose(
                opened, dtype, tokens_SL, given.seed, self.run.scratch, self.progress
            )
            numbers = {
                TYPE_OF + name: torch.tensor(offered[name].index(native))
                for name, native in chosen.items()
            }
            return numbers | {HESSIAN_OF + name: H_CC for name, H_CC in hessians.items()}

        stored = self.run.load_or_make("types", choose)
        types = {name: own[int(stored[TYPE_OF + name])] for name, own in offered.items()}
        hessians = {
            key.removeprefix(HESSIAN_OF): H_CC
            for key, H_CC in stored.items()
            if key.startswith(HESSIAN_OF)
        }
        return types, hessians

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
    wanted: NativeType | Mix, checked: Checked, places: Mapping[str, tensors.Place]
) -> tuple[dict[str, NativeType], dict[str, torch.Tensor]]:
    """The type of each linear that is coded (of a mix the first that it can have), and its order of
    rows; told before anything is computed. ModelError where nothing is left."""
    natives = wanted.types if isinstance(wanted, Mix) else (wanted,)
    shapes, orders = checked.selection.shapes, {}
    offered = {name: options(natives, cols) for name, (_, cols) in shapes.items()}
    weights = {f"{name}.weight": name for name in places if offered[name]}
    for weight, W_RC in checked.tensors.read_many(weights):
        order_R = tensors.row_order(places[weights[weight]], W_RC)
        if order_R is not None:
            orders[weights[weight]] = order_R
    whole = tensors.of_whole_tensors(places, orders)
    types = {name: own[0] for name, own in offered.items() if own and name in whole}
    kept = [name for name in shapes if name not in types]
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


def _identity(
    given: ExportArguments,
    wanted: NativeType | Mix,
    recipe: Recipe,
    model: ResolvedModel,
    converter: Path | None,
) -> JSON:
    """All that could change a byte of the file."""
    settings = {
        **_asked(wanted),
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


def _asked(wanted: NativeType | Mix) -> JSON:
    if not isinstance(wanted, Mix):
        return {"type": wanted.name}
    return {
        "type": None if wanted.plain is None else wanted.plain.name,
        "mix": [native.name for native in wanted.types],
        "size": wanted.num_bytes,
    }


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
            _convert(converter, model, partial)
        partial.replace(made)
    return made


def _convert(converter: Path, model: ResolvedModel, target: Path) -> None:
    """Run the converter, on dense weights also where another tool coded them."""
    if coded_folder(model.path) is None:
        container.convert(converter, model.path, model.name, target)
        return
    dense = target.with_name("dense")
    shutil.rmtree(dense, ignore_errors=True)
    container.convert(converter, dequantize_checkpoint(model.path, dense), model.name, target)
    shutil.rmtree(dense)


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
