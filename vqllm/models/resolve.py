"""Where a model comes from: what the user calls MODEL becomes a folder that transformers loads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqllm.checkpoint.format import INDEX, SINGLE
from vqllm.checkpoint.source_files import has_weights, stored_tensors, weight_map
from vqllm.checkpoint.stored import coded_folder
from vqllm.core import json_text, path_names
from vqllm.core.listing import listed
from vqllm.errors import ModelError
from vqllm.hf import refusals
from vqllm.hf.other_quantizers import ORIGINAL, is_of_mlx, method_of
from vqllm.models import bin_weights, demo
from vqllm.models import gguf as gguf_model

# What is fetched from the hub: weights that cannot hold code, configuration, tokenizer files.
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt")
# Copies of the weights for other programs: subfolders, and the one-file form beside Mistral's.
NOT_FROM_HUB = ("*/*", "consolidated*.safetensors")

FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights, as safetensors calls them."""
CODES = ("weight", "weight_packed", "W_q", "Qidxs", "trellis")
"""Ends of the names of what is stored in the place of a weight."""


@dataclass(frozen=True)
class ResolvedModel:
    """A model that is on this machine.

    Attributes:
        name: what the user called it.
        path: an ordinary Hugging Face folder: config.json, safetensors, tokenizer.
        hub_id: its repository on the hub, where that is known.
    """

    name: str
    path: Path
    hub_id: str | None = None

    @property
    def origin(self) -> str:
        """A name that finds it from any working directory: of a local model, the whole path."""
        if self.hub_id is not None:
            return self.name
        return str(Path(self.name).expanduser().absolute())


def resolve(
    model: str | Path, *, trust_remote_code: bool = False, allow_bin: bool = False
) -> ResolvedModel:
    """Find, fetch or convert a model.

    Args:
        model: "demo" (a folder of that name is `./demo`), a local folder, a `.gguf` file, or the
            id of a repository on the Hugging Face hub.
        trust_remote_code: whether Python files of the model may be fetched and executed.
        allow_bin: whether weights as pickles (`pytorch_model.bin`) are converted, once.

    Raises:
        ModelError: there is no such model, or it is not one that can be loaded; says what to do.
    """
    name = str(model)
    if (problem := path_names.problem(model)) is not None:
        raise ModelError(
            f"{path_names.shown(model)} cannot be a model: {problem}. Give it another name."
        )
    path = Path(model).expanduser()
    hub_id = None
    if name == "demo":
        path, hub_id = demo.demo_folder(), demo.HUB_ID
    elif path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {path}.")
        path = gguf_model.convert(path)
    elif path.is_file():
        raise ModelError(
            f"{path} is a file. A model is a Hugging Face folder (pass the folder that holds "
            "config.json), a .gguf file, a hub id, or `demo`."
        )
    elif not path.is_dir():
        path, hub_id = _from_hub(name, trust_remote_code), name
    if path.is_dir() and not has_weights(path) and bin_weights.files_of(path):
        path = bin_weights.convert(path, allow_bin)
    check_folder(path, trust_remote_code=trust_remote_code)
    return ResolvedModel(name, path, hub_id)


def _from_hub(name: str, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    # Each way in which the hub can fail has a cause that the user can do something about.
    choices = "A model is `demo`, a local folder, a .gguf file or a hub id such as org/name."
    try:
        folder = snapshot_download(
            name,
            allow_patterns=[*HUB_FILES, *(["*.py"] if trust_remote_code else [])],
            ignore_patterns=list(NOT_FROM_HUB),
        )
    except HFValidationError as error:
        raise ModelError(
            f"there is no folder {name!r}, and it is no hub id either. {choices}"
        ) from (error)
    except GatedRepoError as error:
        raise ModelError(
            f"the hub gives {name!r} only to accounts that have accepted its terms: do so on its "
            "page, then run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no folder {name!r} and no such model on the hub. {choices} A private model "
            "needs `hf auth login`."
        ) from error
    except OSError as error:
        raise ModelError(
            f"there is no folder {name!r}, and as a hub id it is neither in the local cache nor "
            f"can it be fetched ({_first_line(error)}). {choices} To use a hub id, run again with "
            "a network and without HF_HUB_OFFLINE."
        ) from error
    return Path(folder)


def check_folder(path: Path, *, trust_remote_code: bool = False) -> None:
    """Raise ModelError unless `path` holds a model that can be loaded without executing its code
    (or with, if `trust_remote_code`). Reads JSON and the headers of weight files, no weights."""
    refusals.refuse_adapter(path)
    config = _read_json(path / "config.json")
    if config is None:
        raise ModelError(
            f"{path} is no model: it has no config.json. Pass a folder that "
            "`AutoModelForCausalLM.from_pretrained` loads."
        )
    _check_code(path, config, trust_remote_code)
    refusals.refuse_other_kinds(path, config)
    _check_weights(path, config)


def _check_code(path: Path, config: dict[str, Any], trust_remote_code: bool) -> None:
    """Raise ModelError unless transformers has the model's class, or its own code is trusted."""
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"{path / 'config.json'} names no model_type, so it is no model's.")
    if model_type in CONFIG_MAPPING_NAMES or (trust_remote_code and "auto_map" in config):
        return
    if "auto_map" in config:
        raise ModelError(
            f"{path} brings its own Python code, which is executed only on request: read it, then "
            "pass --trust-remote-code (in Python: trust_remote_code=True)."
        )
    raise ModelError(
        f"{path} is of model type {model_type!r}, which transformers {__version__} does not have; "
        "a newer one may."
    )


def _check_weights(path: Path, config: dict[str, Any]) -> None:
    """Raise ModelError unless there are safetensors files, of dense weights or of a method that
    config.json names."""
    if not has_weights(path):
        if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
            raise ModelError(
                f"{path} has its weights as pickles, under names that are not read. Load "
                "them with transformers in a place you trust and `save_pretrained` once: that "
                "writes safetensors."
            )
        raise ModelError(f"{path} has a config.json but no weights ({SINGLE} or {INDEX}).")
    quantization = config.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise ModelError(
            f"{path / 'config.json'} is damaged: its quantization_config is a "
            f"{type(quantization).__name__}, not an object. Fetch the model again."
        )
    if coded_folder(path) is not None:  # all of its tensors have been looked at now
        return
    if quantization and not is_of_mlx(config):
        weight_map(path)
    else:
        _check_dtypes(path, config)


def _check_dtypes(path: Path, config: dict[str, Any]) -> None:
    """Raise ModelError for weights as integers or as float8 without a quantization_config: these
    are codes, and only their own quantizer knows the scales."""
    coded = [
        f"{name} ({tensor.dtype})"
        for name, tensor in stored_tensors(path).items()
        if tensor.dtype.startswith("F8")
        or (tensor.dtype not in FLOATS and name.endswith(CODES) and len(tensor.shape) > 1)
    ]
    if not coded:
        return
    method = method_of(path, config)
    said = "config.json does not say how"
    if method is not None:
        said = f"{method[1]} says {method[0]!r}, which transformers does not load from this folder"
    raise ModelError(
        f"{path}: {len(coded)} of the weights are no plain floating-point numbers: "
        f"{listed(coded)}. They were quantized, and {said}. {ORIGINAL}"
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        values = json_text.read(path)
    except ValueError as error:
        raise ModelError(f"{path} is damaged: {error}. Fetch the model again.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds {type(values).__name__}, expected a JSON object.")
    return values


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else repr(error)
