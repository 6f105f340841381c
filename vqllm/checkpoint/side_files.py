"""The files of a model folder that belong to every copy of it: which they are, and their copies.

A folder that somebody works in also holds logs, keys, notes and states of training, so that files
are copied for what they are, not for what they are not. A link counts as the file that it leads to
inside the folder, or inside the cache of the hub that the folder is a part of; what it leads to
elsewhere is nobody's to publish.
"""

import json
import logging
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from vqllm.checkpoint import atomic
from vqllm.core import json_text, local_paths
from vqllm.errors import ModelError
from vqllm.hf.refusals import adapter_files

logger = logging.getLogger(__name__)

TOKENIZERS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v*",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "vocab.bpe",
    "merges.txt", "bpe.codes",
    "encoder.json", "dict.txt", "spiece.model", "sentencepiece*.model", "spm*.model", "source.spm",
    "target.spm", "vocab-src.json", "vocab-tgt.json", "target_vocab.json", "entity_vocab.json",
    "normalizer.json", "byte_maps.json", "emoji.json", "word_pronunciation.json",
    "word_shape.json", "*.tiktoken", "tekken.json", "prophetnet.tokenizer",
    "audio_tokenizer_config.json",
)  # fmt: skip
"""Names of the files of tokenizers: those of all classes of transformers, and of tiktoken."""
SETTINGS = (
    "generation_config.json", "chat_template.json", "chat_template*.jinja",
    "preprocessor_config.json", "processor_config.json", "*_preprocessor_config.json",
    "*_processor_config.json", "feature_extractor_config.json", "modules.json",
    "config_sentence_transformers.json", "sentence_bert_config.json",
)  # fmt: skip
"""What transformers and sentence-transformers read beside weights, config.json and tokenizer."""
LICENCE = re.compile(
    r"(licen[cs]e|notice|copying|copyright|((acceptable|prohibited)[-_])?us(e|age)[-_]policy)"
    r"([-_.](code|model|weights|apache|mit|bsd|gpl|llama|gemma|2\.0|3\.0|2|3))*(\.(txt|md|rst|pdf))?",
    re.IGNORECASE,
)
TEMPLATES = "additional_chat_templates"
"""The one subfolder that transformers' tokenizers read."""
MAX_COPIED_BYTES = 256 << 20
"""The largest tokenizer files in use have about 35 MB; a larger file is no small file."""
PATH_KEYS = ("name_or_path", "_file")
"""Ends of the keys under which transformers noted where files lay when it saved a configuration."""


def copied_files(source: Path, trust_remote_code: bool) -> list[Path]:
    """The small files of a model folder that belong to every copy of it, relative to the folder.

    Tokenizer, settings of generation, processors, chat templates and the licence; Python files only
    if `trust_remote_code`. Not weights, not config.json (which is patched), not the model card (a
    new one is written), not the files of an adapter (transformers would apply it to the copy too).
    """
    return [path for path in _wanted(source, trust_remote_code) if not _leads_out(source, path)]


def copy_files(source: Path, folder: Path, staging: Path, trust_remote_code: bool = False) -> None:
    """Copy these files byte for byte, but for local paths in them.

    Raises:
        ModelError: a file cannot be read.
    """
    if adapter := adapter_files(source):
        logger.warning(
            "%s also holds an adapter (%s), which is left out of the copy",
            *(source, ", ".join(adapter)),
        )
    for relative in _wanted(source, trust_remote_code):
        if _leads_out(source, relative):
            logger.warning(
                "%s is a link to a place outside of its folder and is left out of the copy; put "
                "the file itself there if the copy needs it",
                source / relative,
            )
            continue
        try:
            data = (source / relative).read_bytes()
        except OSError as error:
            raise ModelError(
                f"{source / relative} cannot be read: {error.strerror}. Make it readable, or move "
                "it away if the model does not need it."
            ) from error
        atomic.make_folder((folder / relative).parent)
        atomic.write_bytes(folder / relative, _published(relative, data), staging)


def _wanted(source: Path, trust_remote_code: bool) -> list[Path]:
    """What is copied, links that lead out of the folder included, in the order of names."""
    return sorted(_small_files(source, trust_remote_code))


def _small_files(source: Path, trust_remote_code: bool) -> Iterator[Path]:
    for path in [*source.iterdir(), *(source / TEMPLATES).glob("*.jinja")]:
        wanted = path.parent != source or is_side_file(path.name)
        if not wanted and not (path.suffix == ".py" and trust_remote_code):
            continue
        if path.is_file() and path.stat().st_size <= MAX_COPIED_BYTES:
            yield path.relative_to(source)


def is_side_file(name: str) -> bool:
    """Whether a file of this name belongs to every copy of a model."""
    known = any(fnmatchcase(name, pattern) for pattern in (*TOKENIZERS, *SETTINGS))
    return known or LICENCE.fullmatch(name) is not None


def _leads_out(source: Path, relative: Path) -> bool:
    """Whether a file is really in another place, by a link of itself or of a folder above it."""
    folder, real = source.resolve(), (source / relative).resolve()
    places = [folder]
    if folder.parent.name == "snapshots":  # of the hub's cache: its files are links to ../../blobs
        places.append(folder.parent.parent / "blobs")
    return not any(real.is_relative_to(place) for place in places)


def _published(relative: Path, data: bytes) -> bytes:
    """The contents of a file as they are copied."""
    if not relative.name.endswith("config.json"):
        return data
    try:
        values = json_text.loads(data)
    except ValueError:
        return data  # whoever reads it says what is wrong with it
    found = without_places(values)
    return data if found == values else (json.dumps(found, indent=2) + "\n").encode()


def without_places(values: Any) -> Any:
    """JSON values of a configuration with names in place of the local paths under `PATH_KEYS`."""
    if isinstance(values, list):
        return [without_places(value) for value in values]
    if not isinstance(values, dict):
        return values
    return {
        key: local_paths.name_of(value)
        if isinstance(value, str) and key.endswith(PATH_KEYS)
        else without_places(value)
        for key, value in values.items()
    }
