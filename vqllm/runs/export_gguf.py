"""A dense model as a GGUF file: Hessians layer by layer, codes, the file."""

import shutil
from pathlib import Path

from vqllm import recipes
from vqllm.checkpoint.dequantize import dequantize_checkpoint
from vqllm.checkpoint.resume.journal import identity
from vqllm.checkpoint.stored import coded_folder
from vqllm.core.progress import Progress
from vqllm.core.protocols import JSON
from vqllm.errors import CheckpointError
from vqllm.export import container
from vqllm.export.coded_layers import CodedLayers, folder_of
from vqllm.export.mix import Mix, mix_of
from vqllm.export.native_types import NativeType
from vqllm.models import demo
from vqllm.models.resolve import ResolvedModel, resolve
from vqllm.quantization.checks import check_model
from vqllm.recipes import Recipe
from vqllm.runs.arguments import ExportArguments
from vqllm.runs.devices import device_of, dtype_of
from vqllm.runs.gguf_run import GgufRun


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
        export = GgufRun(given, wanted, recipe, model, checked, unfinished, progress)
        export.write(_source(model, converter, unfinished.scratch))
    return output


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
