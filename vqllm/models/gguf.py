"""A GGUF file as an ordinary Hugging Face folder, converted once into the cache.

transformers reads the file (every architecture it knows, none named here). It loses three things,
which are restored here:

    the pre-tokenizer  of byte-level vocabularies whose `tokenizer.ggml.pre` transformers does not
                       know: a wrong one splits numbers differently, without a warning;
    rope_theta         is only inside `rope_parameters`, which transformers 4 does not read: it
                       would take 10000, without a warning;
    tokenizer_class    is a name that transformers 4 does not have.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vqllm.core.listing import listed
from vqllm.errors import ModelError, OutOfSpaceError
from vqllm.hf import claims
from vqllm.hf.refusals import DECODERS
from vqllm.models import gguf_claims
from vqllm.models.cache import build_once, cache_dir, check_room

logger = logging.getLogger(__name__)

# Part of the cache key: a change in what a conversion writes gets a new number.
CONVERSION = 1

# Values of `tokenizer.ggml.pre`. Source: llama.cpp, src/llama-vocab.cpp, the regular expressions
# of each LLAMA_VOCAB_PRE_TYPE: the first set splits at every digit and then as GPT-2 does.
DIGITS_THEN_GPT2 = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
)
GPT2 = frozenset({"gpt-2", "mpt", "olmo", "jais", "trillion", "phi-2", "gigachat"})


def convert(file: Path) -> Path:
    """The folder that holds the model of a `.gguf` file: float16 safetensors, tokenizer, config.

    The file is read whole each time to find its sha256, which names the folder; the conversion
    itself (which needs the dense model in memory) happens once.

    Raises:
        ModelError: no GGUF file, a part of a split one, or one that transformers cannot load.
        OutOfSpaceError: no room for the dense weights in the cache.
    """
    try:
        with file.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise ModelError(
                    f"{file} is not a GGUF file: it does not begin with the bytes 'GGUF'."
                )
            gguf_claims.check(file)
            stream.seek(0)
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}.") from error
    target = folder_of(sha256)
    return build_once(target, lambda folder: write(file.resolve(), folder))


def folder_of(sha256: str) -> Path:
    """Where the conversion of the GGUF file with this sha256 is, or will be."""
    return cache_dir() / "gguf" / f"{sha256}-{CONVERSION}"


def write(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file, which is known to be one, into a folder of the cache. Errors
    are those of `convert`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logger.info("converting %s to an ordinary folder in %s", file.name, folder.parent)
    try:
        pre = _metadata(file, folder)
        # A folder of its own, because `from_pretrained` also reads tokenizer and configuration
        # files that lie beside the GGUF file, and the result must depend on the file alone.
        with tempfile.TemporaryDirectory(dir=folder) as alone:  # goes with it if we are killed
            (Path(alone) / file.name).symlink_to(file)
            _refuse_sizes(file, AutoConfig.from_pretrained(alone, gguf_file=file.name))
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=file.name)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                alone,
                gguf_file=file.name,
                dtype=torch.float16,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
        model, info = loaded
        if info["missing_keys"]:
            raise ValueError(f"it lacks {listed(info['missing_keys'])}.")
    except (ModelError, OutOfSpaceError):
        raise
    except Exception as error:
        raise ModelError(
            f"{file} cannot be loaded: {error} Either the file is damaged (compare its sha256 with "
            "its source), or this version of transformers does not know its architecture; the "
            "original Hugging Face folder of the model works in both cases."
        ) from error
    # The three things that transformers loses on the way, see the top of this file.
    fix_pre_tokenizer(tokenizer, pre)
    model.save_pretrained(folder, max_shard_size="2GB")
    tokenizer.save_pretrained(folder)
    _patch(folder / "config.json", _portable_config)
    _patch(
        folder / "tokenizer_config.json",
        lambda values: _portable_tokenizer(
            values, getattr(model.config, "max_position_embeddings", None)
        ),
    )


def _refuse_sizes(file: Path, config: Any) -> None:
    """Raise ModelError where the values of a file ask for a larger model than its tensors are."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    claims.refuse_sizes(config.to_dict(), file)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    stored = sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)
    claims.refuse_larger(model, stored, str(file))


def _metadata(file: Path, folder: Path) -> str | None:
    """`tokenizer.ggml.pre` of the file, after the checks that need no weights."""
    from gguf import GGUFReader

    reader = GGUFReader(file)

    def value(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    # Checked before the weights are read, which takes long.
    if (value("split.count") or 1) > 1:
        raise ModelError(
            f"{file} is one part of a split GGUF file. Join the parts with llama.cpp's "
            "`llama-gguf-split --merge` and pass the result."
        )
    _refuse_other_kinds(file, reader, value)
    needed = 2 * sum(int(tensor.n_elements) for tensor in reader.tensors)
    check_room(folder, needed, f"the dense float16 weights of {file.name}")
    # Only byte-level vocabularies ("gpt2") have a pre-tokenizer that may need a fix.
    return value("tokenizer.ggml.pre") if value("tokenizer.ggml.model") == "gpt2" else None


def _refuse_other_kinds(file: Path, reader: Any, value: Callable[[str], Any]) -> None:
    """Raise ModelError for a file that holds no decoder: a part of a model, or an encoder.

    Args:
        value: of the file's metadata, by key; None where there is no such key.
    """
    kind, architecture = value("general.type") or "model", value("general.architecture")
    if kind == "adapter":
        raise ModelError(
            f"{file} holds only an adapter (LoRA). Merge it into its model first, with llama.cpp's "
            "`llama-export-lora`, and pass the result."
        )
    if kind != "model":
        raise ModelError(f"{file} holds no model but {kind!r}. Pass the file of the model itself.")
    encoder = any(tensor.name.startswith("enc.") for tensor in reader.tensors)
    if encoder or value(f"{architecture}.attention.causal") is False:
        raise ModelError(
            f"{file} holds {architecture!r}, "
            f"{'an encoder-decoder model' if encoder else 'an encoder'}. {DECODERS}"
        )


def fix_pre_tokenizer(tokenizer: Any, pre: str | None) -> None:
    """Give a byte-level tokenizer the pre-tokenizer that the GGUF metadata names.

    Args:
        tokenizer: a transformers tokenizer, changed in place.
        pre: `tokenizer.ggml.pre`, or None where the vocabulary is not byte-level.
    """
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if pre in DIGITS_THEN_GPT2:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            ]
        )
        return
    # transformers gives the names that it knows a sequence with their own expression; a plain
    # ByteLevel is what it gives the rest.
    plain = isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel)
    if pre is not None and pre not in GPT2 and plain:
        logger.warning(
            "the pre-tokenizer %r of this GGUF file is unknown: text may be split into tokens "
            "differently from the original model, most likely at numbers",
            pre,
        )


def _patch(path: Path, change: Any) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _portable_config(values: dict[str, Any]) -> None:
    values.pop("_model_name_or_path", None)
    for key, value in values.items():
        # GGUF keeps float32: 9.999999747378752e-06 was 1e-05 in the original configuration.
        if isinstance(value, float) and float(np.float32(value)) == value:
            values[key] = float(str(np.float32(value)))
    rope = values.get("rope_parameters") or {}
    if "rope_theta" not in rope:  # no rope, or one for each kind of layer: transformers 5 only
        return
    values.setdefault("rope_theta", rope["rope_theta"])
    if rope.get("rope_type", "default") != "default":
        values.setdefault("rope_scaling", {k: v for k, v in rope.items() if k != "rope_theta"})


def _portable_tokenizer(values: dict[str, Any], max_length: int | None) -> None:
    for key in ("backend", "is_local", "local_files_only", "gguf_file", "name_or_path"):
        values.pop(key, None)
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    values["clean_up_tokenization_spaces"] = False
    if max_length is not None:
        values["model_max_length"] = max_length
