"""The original model's predictions, computed once for all members that are measured against it.

Its logits of 24 windows of 2048 tokens are 4.8 GB for a vocabulary of 49,152 tokens; the states
that its output head turns into them are 57 MB. So the states are kept, and the model is run again
on one token, with the states put in front of its head: whatever comes after (caps, scales) is
applied as ever, and the logits are the same to the bit, which is checked for every window before
it is kept. The demo model on one core: 0.73 s a window in place of 6.2 s, of the 14.7 s that a
comparison of it took.
"""

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vqllm.checkpoint import atomic

logger = logging.getLogger(__name__)

STATES = "states"


class Remembering:
    """A model to compare with, as `evaluation.compare` calls it, whose forward passes are kept in a
    folder. A model whose head cannot be given its input is run every time."""

    def __init__(self, model: Any, folder: Path) -> None:
        self._model, self._folder = model, folder
        self._head: nn.Module | None = model.get_output_embeddings()
        self.config, self.device = model.config, model.device

    def __call__(self, input_ids: Tensor, **options: Any) -> Any:
        """The output for one window, [1, L]; its `logits` are those of the model itself."""
        if self._head is None:
            return self._model(input_ids=input_ids, **options)
        digest = hashlib.sha256(input_ids.cpu().numpy().tobytes()).hexdigest()
        path = self._folder / f"{digest[:32]}.safetensors"
        states = self._kept(path)
        if states is not None:
            return self._replay(self._head, input_ids, states, options)
        seen: list[Tensor] = []
        handle = self._head.register_forward_pre_hook(lambda _, given: seen.extend(given[:1]))
        try:
            output = self._model(input_ids=input_ids, **options)
        finally:
            handle.remove()
        if len(seen) == 1:
            again = self._replay(self._head, input_ids, seen[0], options)
            if torch.equal(again.logits, output.logits):
                atomic.make_folder(self._folder)
                atomic.write_shard(path, {STATES: seen[0].cpu()}, self._folder)
                return output
        logger.info(
            "the original model is run for every member: its logits do not follow from what its "
            "output head is given"
        )
        self._head = None
        return output

    def _replay(
        self, head: nn.Module, input_ids: Tensor, states: Tensor, options: dict[str, Any]
    ) -> Any:
        handle = head.register_forward_pre_hook(lambda _, given: (states, *given[1:]))
        try:
            return self._model(input_ids=input_ids[:, :1], **options)
        finally:
            handle.remove()

    def _kept(self, path: Path) -> Tensor | None:
        try:
            return load_file(path)[STATES].to(self.device) if path.is_file() else None
        except (SafetensorError, OSError, KeyError) as error:
            logger.warning("%s cannot be read (%s): it is made again", path, error)
            return None
