"""One export to a GGUF file: which linear gets which type, their codes, the file."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vqllm.calibration.layer_stream import LayerStream
from vqllm.checkpoint import atomic
from vqllm.core.listing import listed
from vqllm.core.progress import Progress
from vqllm.errors import ModelError
from vqllm.export import tensors, writing
from vqllm.export.coded_layers import CodedLayers
from vqllm.export.layer_run import code_layers
from vqllm.export.mix import Mix, options
from vqllm.export.native_types import NativeType
from vqllm.models.resolve import ResolvedModel
from vqllm.quantization.checks import Checked
from vqllm.quantization.loop import sequences_of
from vqllm.recipes import Recipe
from vqllm.runs.arguments import ExportArguments
from vqllm.runs.devices import device_of, dtype_of
from vqllm.runs.mixed_types import MixedTypes

logger = logging.getLogger(__name__)

TYPE_OF, HESSIAN_OF = "type of ", "hessian of "
"""Before the names of tensors, in what a run keeps of the choice of types."""


@dataclass(frozen=True)
class GgufRun:
    """What was asked for, the model, and the folder of the run."""

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
