"""Whether a teacher is the model that a checkpoint was made from."""

from pathlib import Path
from typing import Any

from torch import nn

from vqllm.checkpoint.reader import Checkpoint, is_checkpoint
from vqllm.errors import CheckpointError, ModelError
from vqllm.hf.loading import load_tokenizer, skeleton
from vqllm.hf.refusals import refuse_adapter
from vqllm.runs import originals


def teacher_of(checkpoint: Checkpoint) -> str:
    """The original model: where it is on this machine, or else as the checkpoint names it.

    Raises:
        CheckpointError: it does not say.
    """
    source = checkpoint.quantization.extra.get("source")
    if not isinstance(source, dict) or not isinstance(source.get("model"), str):
        raise CheckpointError(
            f"{checkpoint.folder} does not say which model it was made from: pass it with "
            "--teacher."
        )
    # A part of a run has the place itself, which an equal checkpoint noted elsewhere may not share.
    named = source["model"]
    if Path(named).is_absolute() and Path(named).exists():
        return named
    return originals.recall(checkpoint.folder) or named


def check_folders(folder: Path, teacher: Path, trust_remote_code: bool) -> None:
    """Look at the sizes and vocabularies of both models before anything is computed.

    Args:
        folder: of the checkpoint.
        teacher: the folder of the original.

    Raises:
        ModelError: as of `check_teacher`, or the teacher is a quantized checkpoint, or there is an
            adapter in the folder of the checkpoint.
    """
    refuse_adapter(folder)
    if is_checkpoint(teacher):
        raise ModelError(
            f"the teacher {teacher} is a quantized checkpoint itself. Pass the original model that "
            f"{folder} was made from."
        )
    check_teacher(
        folder,
        skeleton(folder, trust_remote_code=trust_remote_code),
        skeleton(teacher, trust_remote_code=trust_remote_code),
        load_tokenizer(folder, trust_remote_code=trust_remote_code),
        load_tokenizer(teacher, trust_remote_code=trust_remote_code),
    )


def check_teacher(
    folder: Path, own: nn.Module, teacher: nn.Module, own_tokenizer: Any, tokenizer: Any
) -> None:
    """Refuse a teacher that the checkpoint cannot have been made from.

    Args:
        folder: of the checkpoint.
        own: the model that it configures, as `skeleton` gives it.

    Raises:
        ModelError: a tensor has another size there or is missing in one of them, or tokens differ.
    """
    ours, theirs = _shapes(own), _shapes(teacher)
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            here, there = (shapes.get(name, "no such tensor") for shapes in (ours, theirs))
            raise ModelError(
                f"the teacher does not fit: of {name} {folder} has {here}, and the teacher has "
                f"{there}. Pass the model that it was made from."
            )
    if tokenizer.get_vocab() != own_tokenizer.get_vocab():
        raise ModelError(
            f"the teacher does not fit: it has another vocabulary than {folder}. Pass the model "
            "that it was made from."
        )


def _shapes(model: nn.Module) -> dict[str, str]:
    """Of the parameters by name, tied ones too: "64 x 172"."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: " x ".join(map(str, tensor.shape)) for name, tensor in parameters}
