"""Outputs of a layer's children that will not change any more, stored for further passes.

A layer runs once for each of its input groups and once more for its output. When the last linear of
its attention is quantized, attention has the same output in all passes that follow: the first of
them stores it, the others read it from here. In a Llama layer, which runs four times and a bit,
that saves two of four attentions.

    pass      o_proj    gate, up       down      output
    self_attn runs      runs, stored   replayed  replayed
"""

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vqllm.calibration.layer_calls import changed, entries
from vqllm.hf.linears import is_linear


class Replay:
    """Stores the outputs of settled children of one layer, up to `budget_bytes`.

    Batches that do not fit are computed again; so are children that return something else than a
    tensor or a tuple of tensors, or set entries of a dict that they are given.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._left = budget_bytes
        self._batch: Hashable = None
        self._children: dict[str, _Child] = {}

    def settle(self, layer: nn.Module, unfinished: Iterable[nn.Module]) -> None:
        """Store from now on the outputs of children of `layer` that have linears, none of them in
        `unfinished`.

        All that runs before such a child must be settled too. That holds if linears are finished in
        the order in which they run.
        """
        waiting = set(unfinished)
        for name, module in layer.named_children():
            linears = {m for m in module.modules() if is_linear(m)}
            if linears and not linears & waiting and name not in self._children:
                self._children[name] = _Child(module, self)

    def begin(self, batch: Hashable) -> None:
        """The next pass of the layer is for the batch of this name."""
        self._batch = batch
        for child in self._children.values():
            child.num_calls = 0

    @property
    def batch(self) -> Hashable:
        return self._batch

    def take(self, num_bytes: int) -> bool:
        """Reserve so many bytes of the budget; False if they do not fit."""
        fits = num_bytes <= self._left
        self._left -= num_bytes if fits else 0
        return fits

    def close(self) -> None:
        """Free all outputs; the children run by themselves again."""
        for child in self._children.values():
            child.release()
        self._children = {}


class _Child:
    """A module whose forward returns the stored output if there is one."""

    def __init__(self, module: nn.Module, replay: Replay) -> None:
        self.module = module
        self.num_calls = 0
        self._replay = replay
        self._own: Callable[..., Any] = module.forward
        self._instances_own = module.__dict__.get("forward")
        self._outputs: dict[Hashable, Any] = {}
        self._never = False
        """its outputs are not stored"""
        module.forward = self._forward

    def release(self) -> None:
        del self.module.forward
        if self._instances_own is not None:
            self.module.forward = self._instances_own
        self._outputs = {}

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        batch = self._replay.batch
        if self.num_calls > 1 and not self._never:
            # Two different outputs in one pass: to store neither is simpler than to store both.
            self._never = True
            self._outputs = {}
        if batch in self._outputs:
            return _copy(self._outputs[batch], _device_of(args, kwargs))
        before = entries(args, kwargs)
        output = self._own(*args, **kwargs)
        if changed(before, entries(args, kwargs)):
            self._never = True
        parts = output if isinstance(output, tuple) else (output,)
        simple = all(part is None or isinstance(part, Tensor) for part in parts)
        if simple and not self._never:
            size = sum(part.nbytes for part in parts if part is not None)
            if self._replay.take(size):
                self._outputs[batch] = _copy(output, torch.device("cpu"))
        return output


def _copy(output: Any, device: torch.device) -> Any:
    """A copy, because layers may write into what their children return."""
    if isinstance(output, tuple):
        return tuple(None if part is None else part.to(device, copy=True) for part in output)
    return output.to(device, copy=True)


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    values = [*args, *kwargs.values()]
    return next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu"))
