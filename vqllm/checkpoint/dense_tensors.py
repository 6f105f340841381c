"""The tensors of an ordinary checkpoint from those of a quantized one.

Most come one from one. Where linears have other names in transformers' own model, or are parts of
one of its tensors (experts, Conv1D), they are put together again and go through transformers' rules
the way that saving goes, so that they get the names and shapes that the model's checkpoints have.

    experts.0.gate_proj.codes, ... ─► experts.gate_up_proj [E, 2 I, C] ─► experts.0.w1.weight, ...
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key, revert_weight_conversion

from vqllm.checkpoint.new_folder import Made
from vqllm.checkpoint.reader import Checkpoint
from vqllm.checkpoint.shards import DTYPE_NAMES, natural_order
from vqllm.checkpoint.stored import StoredFolder
from vqllm.errors import CheckpointError
from vqllm.foreign.coded_model import CodedModule
from vqllm.hf.conversions import Renaming
from vqllm.hf.linear_form import Part, fuse, to_linear_form
from vqllm.hf.loading import explained, skeleton
from vqllm.hf.rules import by_kind, made_together, undone_by_saving

FLOATS = {name: dtype for dtype, name in DTYPE_NAMES.items() if dtype.is_floating_point}
"""Dtypes of the tensors that a change of dtype concerns, by their names in safetensors files."""


def dense_tensors(checkpoint: Checkpoint, dtype: torch.dtype, source: torch.dtype) -> list[Made]:
    """All tensors of the dense model, in the order of their names.

    Args:
        dtype: of the decoded weights, and of all stored tensors of the dtype `source`; others keep
            the dtype that they have, such as float32 where a model needs it.

    Raises:
        CheckpointError: the checkpoint has linears that its model does not have.
    """
    parts = _Parts(checkpoint, dtype) if checkpoint.quantization.linear_form else None
    made = list(parts.fused()) if parts else []
    taken = parts.taken if parts else set()
    for module, spec in checkpoint.linears.items():
        if module not in taken:
            name = f"{module}.weight"
            sizes = {name: spec.rows * spec.cols * dtype.itemsize}
            made.append(Made(sizes, partial(_decoded, checkpoint, module, dtype)))
    for name in checkpoint.other_tensors():
        if name not in taken:
            stored = checkpoint.tensors[name]
            changes = FLOATS.get(stored.dtype) == source
            size = stored.numel * dtype.itemsize if changes else stored.num_bytes
            wanted = dtype if changes else None
            made.append(Made({name: size}, partial(_stored, checkpoint, name, wanted)))
    return sorted(made, key=lambda own: natural_order(next(iter(own.sizes))))


def decoded_tensors(stored: StoredFolder, dtype: torch.dtype, source: torch.dtype) -> list[Made]:
    """The same of a checkpoint of another tool, under the names that its files have."""
    assert stored.coded is not None
    made = []
    for name, header in stored.tensors.items():
        module = stored.coded.modules.get(name.removesuffix(".weight"))
        if module is not None and name.endswith(".weight"):
            size = module.shape.rows * module.shape.cols * dtype.itemsize
            made.append(Made({name: size}, partial(_decoded_by, module, name, dtype)))
            continue
        changes = FLOATS.get(header.dtype) == source
        size = math.prod(header.shape) * dtype.itemsize if changes else header.num_bytes
        wanted = dtype if changes else None
        made.append(Made({name: size}, partial(_stored, stored, name, wanted)))
    return sorted(made, key=lambda own: natural_order(next(iter(own.sizes))))


class _Parts:
    """What of a checkpoint goes through transformers' rules on its way to the dense model.

    Attributes:
        taken: the modules and tensors of the checkpoint, as it names them, that do.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype
        self._model: Any = skeleton(checkpoint.folder)
        self._tensors = dict(self._model.state_dict())
        linear = skeleton(checkpoint.folder)
        self._parts = to_linear_form(linear)
        rules = get_model_conversion_mapping(self._model)
        self._found = self._find(linear, rules)
        members: dict[str, dict[str, Part]] = {}
        for name in self._found:
            part = self._parts.get(name, Part(name))
            if part.tensor in self._tensors:
                members.setdefault(part.tensor, {})[name] = part
        changed = {tensor for tensor, own in members.items() if self._is_changed(own)}
        undone = undone_by_saving(
            rules, [rule for rule in rules if rule.was_used()], self._tensors.keys() - changed
        )
        self._model._weight_conversions = undone
        self._groups = [
            {tensor: members[tensor] for tensor in group if tensor in members}
            for group in made_together(self._tensors, undone)
            if not changed.isdisjoint(group)
        ]
        self.taken = {
            self._found[name] for group in self._groups for own in group.values() for name in own
        }

    def _find(self, linear: Any, rules: list[Any]) -> dict[str, str]:
        """The modules that are quantized and all other tensors, as the checkpoint names them, by
        the parameter of the model in linear form that each is. Marks the rules that are used."""
        checkpoint, modules = self._checkpoint, dict(linear.named_modules())
        renaming = Renaming(self._model, rules)
        found: dict[str, str] = {}
        for module, spec in checkpoint.linears.items():
            own = renaming.module(module, next(iter(spec.layout())), modules)
            if own is None:
                raise CheckpointError(
                    f"{checkpoint.folder}: {module} is quantized, but {type(self._model).__name__} "
                    "has no module of that name. Get an undamaged copy."
                )
            found[f"{own}.weight"] = module
        renamings, converters = by_kind(rules)
        for name in checkpoint.other_tensors():
            module, _, key = name.rpartition(".")
            own = renaming.module(module, key, modules)
            if own is not None:
                found[f"{own}.{key}"] = name
            if own is None or f"{own}.{key}" not in self._parts:
                rename_source_key(
                    name, renamings, converters, self._model.base_model_prefix, self._tensors
                )
        return found

    def _is_changed(self, own: Mapping[str, Part]) -> bool:
        """Whether a tensor of transformers' own model with these parts is not stored as in ordinary
        files. A Conv1D that is not quantized is."""
        quantized = [self._found[name] in self._checkpoint.linears for name in own]
        is_expert = any(part.expert is not None or part.rows for part in own.values())
        return is_expert or all(quantized)

    def fused(self) -> Iterator[Made]:
        """The tensors that the parts make together."""
        for group in self._groups:
            empty = {
                tensor: torch.empty(
                    self._tensors[tensor].shape, dtype=self._dtype_of(own), device="meta"
                )
                for tensor, own in group.items()
            }
            sizes = {name: value.nbytes for name, value in self._undone(empty).items()}
            yield Made(sizes, partial(self._make, group))

    def _dtype_of(self, own: Mapping[str, Part]) -> torch.dtype:
        """That of the weights; a bias keeps its own."""
        stored = [self._found[name] for name in own]
        if any(name in self._checkpoint.linears for name in stored):
            return self._dtype
        return FLOATS.get(self._checkpoint.tensors[stored[0]].dtype, self._dtype)

    def _make(self, group: Mapping[str, Mapping[str, Part]]) -> dict[str, Tensor]:
        whole = {tensor: self._whole(tensor, own) for tensor, own in group.items()}
        return {name: value.contiguous() for name, value in self._undone(whole).items()}

    def _whole(self, tensor: str, own: Mapping[str, Part]) -> Tensor:
        dtype = self._dtype_of(own)
        if own.keys() == {tensor} and tensor not in self._parts:
            return self._value(self._found[tensor], dtype)
        values = {name: self._value(self._found[name], dtype) for name in own}
        return fuse(own, values, self._tensors[tensor].shape)

    def _value(self, name: str, dtype: torch.dtype) -> Tensor:
        if name in self._checkpoint.linears:
            return next(iter(_decoded(self._checkpoint, name, dtype).values()))
        return next(iter(_stored(self._checkpoint, name, dtype).values()))

    def _undone(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        with explained(self._checkpoint.folder):
            return dict(revert_weight_conversion(self._model, tensors))


def _decoded(checkpoint: Checkpoint, module: str, dtype: torch.dtype) -> dict[str, Tensor]:
    dense = checkpoint.dense(module, dtype)
    name = f"{module}.weight"
    if not bool(torch.isfinite(dense).all()):
        # Decoded once more, in float32: the value that did not fit belongs in the message.
        _refuse_beyond(name, checkpoint.dense(module), dtype)
    return {name: dense}


def _decoded_by(module: CodedModule, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    dense = module.decode(dtype)
    if not bool(torch.isfinite(dense).all()):
        _refuse_beyond(name, module.decode(torch.float32), dtype)
    return {name: dense}


def _stored(
    checkpoint: Checkpoint | StoredFolder, name: str, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    stored = checkpoint.read(name)
    if dtype is None:
        return {name: stored}
    dense = stored.to(dtype)
    if not bool(torch.isfinite(dense).all()):
        _refuse_beyond(name, stored, dtype)
    return {name: dense}


def _refuse_beyond(name: str, values: Tensor, dtype: torch.dtype) -> None:
    """Raise CheckpointError where `dtype` cannot hold a finite value."""
    if bool(torch.isfinite(values).all()):
        raise CheckpointError(
            f"{name} has values up to {float(values.abs().max()):.4g}, beyond the range of "
            f"{dtype}. Use bfloat16."
        )
