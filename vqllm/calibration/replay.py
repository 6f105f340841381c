"""What a layer's children need not compute again in further passes, stored.

A layer runs once for each of its input groups and once more for its output. Two things are the same
in all passes that follow, once some linears of a child (attention, MLP) have their final weights:

- if all have, the output of the child;
- if all but one have, and the child returns what that one gives: the input of that one, its last.

The first pass that comes by stores them, the others read them from here: so each part of a Llama
layer runs once, and its last linears once more.

    pass          q, k, v    o_proj        gate, up             down        output
    self_attn                runs to o     o of stored input    replayed    replayed
    mlp                                                         to down     down of stored input
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vqllm.calibration.layer_calls import changed, entries
from vqllm.hf.linears import is_linear


class Replay:
    """Stores the outputs of settled children of one layer, and the inputs of their last linears, up
    to `budget_bytes`.

    Batches that do not fit are computed again; so are children that return something else than a
    tensor or a tuple of tensors, or set entries of a dict that they are given.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._left = budget_bytes
        self._batch: Hashable = None
        self._children: dict[str, _Child] = {}
        self._last: dict[nn.Module, _Last] = {}

    @contextmanager
    def learning(self, layer: nn.Module) -> Iterator[None]:
        """Within, `layer` runs once: which of its children return the output of a linear is found
        out."""
        with ExitStack() as stack:
            seen = [_Seen(child, stack) for child in layer.children()]
            yield
        self._last = {own.child: own.last for own in seen if own.last is not None}

    def settle(self, layer: nn.Module, unfinished: Iterable[nn.Module]) -> None:
        """Store from now on what children of `layer` that have linears need not compute again, if
        all of these are finished, or all but the last one.

        All that runs before such a child must be settled too. That holds if linears are finished in
        the order in which they run.
        """
        waiting = set(unfinished)
        for name, module in layer.named_children():
            linears = {m for m in module.modules() if is_linear(m)}
            left = linears & waiting
            last = self._last.get(module)
            if not linears or (left and (last is None or left != {last.linear})):
                continue
            if name not in self._children:
                self._children[name] = _Child(module, last if left else None, self)
            self._children[name].is_final = not left

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

    def give_back(self, num_bytes: int) -> None:
        """Bytes that were reserved are free again."""
        self._left += num_bytes

    def close(self) -> None:
        """Free all that is stored; the children run by themselves again."""
        for child in self._children.values():
            child.release()
        self._children = {}


@dataclass(frozen=True)
class _Last:
    """The linear whose output a child returns, alone or first in a tuple of this length."""

    linear: nn.Module
    length: int | None


class _Seen:
    """A child in a pass that all of it runs in; afterwards `last` is known if it has one."""

    def __init__(self, child: nn.Module, stack: ExitStack) -> None:
        self.child = child
        self.last: _Last | None = None
        self._made: list[tuple[nn.Module, Tensor, int]] = []
        self._before: dict[Any, Tensor] | None = None
        for linear in filter(is_linear, child.modules()):
            stack.callback(linear.register_forward_hook(self._note).remove)
        before = child.register_forward_pre_hook(self._begin, with_kwargs=True)
        after = child.register_forward_hook(self._end, with_kwargs=True)
        stack.callback(before.remove)
        stack.callback(after.remove)

    def _note(self, linear: nn.Module, _: object, output: Tensor) -> None:
        self._made.append((linear, output, output._version))

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Of a child that runs twice, nothing is known.
        self._before = entries(args, kwargs) if self._before is None else {}
        self.last = None

    def _end(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        first, *others = output if type(output) is tuple else (output,)
        found = [(own, version) for own, made, version in self._made if made is first]
        if len(found) != 1 or any(other is not None for other in others):
            return
        linear, version = found[0]
        runs_once = sum(own is linear for own, _, _ in self._made) == 1
        is_as_made = first._version == version
        if runs_once and is_as_made and not changed(self._before or {}, entries(args, kwargs)):
            self.last = _Last(linear, len(output) if type(output) is tuple else None)


class _Child:
    """A module whose forward returns the stored output if there is one, or computes it from the
    stored input of `last`, its last linear."""

    def __init__(self, module: nn.Module, last: "_Last | None", replay: Replay) -> None:
        self.module = module
        self.is_final = False
        """all its linears are finished, so that its outputs can be stored"""
        self.num_calls = 0
        self._replay = replay
        self._last = last
        self._own: Callable[..., Any] = module.forward
        self._instances_own = module.__dict__.get("forward")
        self._outputs: dict[Hashable, Any] = {}
        self._inputs: dict[Hashable, Tensor] = {}
        """of the last linear"""
        self._never = False
        """nothing is stored"""
        module.forward = self._forward

    def release(self) -> None:
        del self.module.forward
        if self._instances_own is not None:
            self.module.forward = self._instances_own
        self._outputs, self._inputs = {}, {}

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        batch, device = self._replay.batch, _device_of(args, kwargs)
        if self.num_calls > 1 and not self._never:
            # Two different outputs in one pass: to store neither is simpler than to store both.
            self._never = True
            self._outputs, self._inputs = {}, {}
        if batch in self._outputs:
            return _copy(self._outputs[batch], device)
        before = entries(args, kwargs)
        if self._last is not None and batch in self._inputs:
            made = self._last.linear(self._inputs[batch].to(device))
            length = self._last.length
            output = made if length is None else (made, *[None] * (length - 1))
        else:
            output = self._run(args, kwargs)
        if changed(before, entries(args, kwargs)):
            self._never = True
        if self.is_final and not self._never:
            self._store(output)
        return output

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's own output; the input of the last linear is stored on the way."""
        if self._last is None or self.is_final or self._never:
            return self._own(*args, **kwargs)

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self._replay.take(args[0].nbytes):
                self._inputs[self._replay.batch] = _copy(args[0], torch.device("cpu"))

        # Before other hooks, which may end the pass here.
        handle = self._last.linear.register_forward_pre_hook(keep, prepend=True)
        try:
            return self._own(*args, **kwargs)
        finally:
            handle.remove()

    def _store(self, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        if not all(part is None or isinstance(part, Tensor) for part in parts):
            return
        batch = self._replay.batch
        if self._replay.take(sum(part.nbytes for part in parts if part is not None)):
            self._outputs[batch] = _copy(output, torch.device("cpu"))
            stored = self._inputs.pop(batch, None)
            self._replay.give_back(0 if stored is None else stored.nbytes)


def _copy(output: Any, device: torch.device) -> Any:
    """A copy, because layers may write into what their children return."""
    if isinstance(output, tuple):
        return tuple(None if part is None else part.to(device, copy=True) for part in output)
    return output.to(device, copy=True)


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    values = [*args, *kwargs.values()]
    return next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu"))
