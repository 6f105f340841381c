"""Resident memory of a model, in a process of its own, as a program that generates text has it.

    python -m vqllm.evaluation.resident FOLDER     prints what `resident_bytes` returns

What else a process has done changes what it has in memory, so nothing else is done in this one.
"""

import json
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

from vqllm.core.protocols import JSON
from vqllm.errors import EvaluationError

NEW_TOKENS = 32


def resident_bytes(folder: Path, *, trust_remote_code: bool = False) -> JSON | None:
    """Bytes of memory in use: after the imports, with the model loaded, and after 32 tokens.

    Args:
        folder: of a model that transformers loads.

    Returns:
        "imports", "loaded", "generated"; None on systems other than Linux.

    Raises:
        EvaluationError: the process failed.
    """
    if not Path("/proc/self/statm").exists():
        return None
    command = [
        sys.executable,
        "-m",
        "vqllm.evaluation.resident",
        str(folder),
        *["--trust"] * trust_remote_code,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EvaluationError(
            f"the process that measures the memory of {folder} failed: {done.stderr[-1000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def _measure(folder: str, trust_remote_code: bool) -> JSON:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import vqllm  # noqa: F401 - registers the format

    logging.disable_progress_bar()
    found = {"imports": _resident()}
    from vqllm.checkpoint.stored import tensors_to_load

    options: dict[str, Any] = {"dtype": torch.bfloat16, "trust_remote_code": trust_remote_code}
    # Checkpoints of other tools, which transformers would load by their own packages.
    decoded = tensors_to_load(Path(folder))
    if decoded is None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    else:
        from vqllm.hf.loading import load_model

        model = load_model(Path(folder), tensors=decoded, **options)
    found["loaded"] = _resident()
    tokens = torch.arange(8)[None]
    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    found["generated"] = _resident()
    return found


def _resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measure(sys.argv[1], "--trust" in sys.argv[2:])) + "\n")
