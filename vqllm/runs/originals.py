"""Where the original of a checkpoint lies on this machine.

What may be published has the original's name only. Its place, the texts and the whole command are
in a file of the user's own cache, found by the checkpoint's index, so that it serves for a copy of
the folder too, and `vqllm tune` needs no `--teacher`. Equal checkpoints in two places, made of two
copies of a model, have a file each.
"""

import hashlib
import json
import logging
import os
from pathlib import Path

from vqllm.checkpoint.format import INDEX
from vqllm.core import json_text
from vqllm.core.protocols import JSON
from vqllm.models.cache import cache_dir

logger = logging.getLogger(__name__)


def remember(checkpoint: Path, original: str, command: str, recipe: JSON) -> None:
    """Note what a finished checkpoint was made from. Where the cache cannot be written, a line of
    the log says so, and `vqllm tune` has to be told.

    Args:
        original: a name that finds it from any working directory.
        command: what the checkpoint was made with.
        recipe: every key of it.
    """
    path = _path(checkpoint)
    values = {
        "model": original,
        "checkpoint": str(checkpoint.absolute()),
        "command": command,
        "recipe": recipe,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.part")
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        logger.info(
            "%s cannot be written (%s): to tune this model, pass the original with --teacher",
            *(path, error.strerror),
        )


def recall(checkpoint: Path) -> str | None:
    """The original of a checkpoint that was made on this machine; None if that is not known."""
    own = _path(checkpoint)
    try:
        copies = sorted(own.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)
        values = json_text.read(own if own in copies or not copies else copies[-1])
    except (OSError, ValueError):
        return None
    name = values.get("model") if isinstance(values, dict) else None
    return name if isinstance(name, str) else None


def _path(checkpoint: Path) -> Path:
    digest = hashlib.sha256((checkpoint / INDEX).read_bytes()).hexdigest()
    place = hashlib.sha256(os.fsencode(checkpoint.absolute())).hexdigest()
    return cache_dir() / "originals" / digest / f"{place[:16]}.json"
