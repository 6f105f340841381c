"""Values that processes send each other: pickled, with the tensors in them apart."""

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes; where a tensor begins in a buffer is a multiple."""


class Form(NamedTuple):
    """What is to be known of a tensor before it comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    on_cpu: bool
    order: tuple[int, ...]
    """of the axes in memory"""

    @classmethod
    def of(cls, tensor: Tensor) -> "Form":
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=lambda axis: (-strides[axis], axis))
        return cls(tensor.dtype, tuple(tensor.shape), tensor.device.type == "cpu", tuple(order))

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def padded_bytes(self) -> int:
        """In a buffer. An empty tensor takes a few too, so that none is a message of 0 bytes."""
        return max(1, -(-self.num_bytes // ALIGNMENT)) * ALIGNMENT


@dataclass(frozen=True)
class Parcel:
    """A value without its tensors, and their forms."""

    data: bytes
    forms: tuple[Form, ...]

    @classmethod
    def of(cls, value: Any) -> tuple["Parcel", list[Tensor]]:
        """The parcel, and the tensors that go with it."""
        file, tensors = io.BytesIO(), list[Tensor]()

        class Pickler(pickle.Pickler):
            def persistent_id(self, obj: Any) -> int | None:
                if not isinstance(obj, Tensor):
                    return None
                tensors.append(obj)
                return len(tensors) - 1

        Pickler(file).dump(value)
        return cls(file.getvalue(), tuple(map(Form.of, tensors))), tensors

    def opened(self, tensors: Sequence[Tensor]) -> Any:
        """The value with these tensors in it. Comes from a process of the same run."""

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, pid: int) -> Tensor:
                return tensors[pid]

        return Unpickler(io.BytesIO(self.data)).load()


def join(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The bytes of all tensors in one buffer, uint8."""
    forms = [Form.of(tensor) for tensor in tensors]
    buffer = torch.empty(sum(f.padded_bytes for f in forms), dtype=torch.uint8, device=device)
    start = 0
    for tensor, form in zip(tensors, forms):
        own = tensor.detach().permute(form.order).contiguous().reshape(-1).view(torch.uint8)
        buffer[start : start + form.num_bytes] = own
        start += form.padded_bytes
    return buffer


def part(buffer: Tensor, forms: Sequence[Form]) -> list[Tensor]:
    """The tensors of a buffer, each in memory of its own with its axes in the order that it had:
    the sums of products may depend on where an operand begins, and on its strides."""
    tensors, start = [], 0
    for form in forms:
        own = buffer[start : start + form.num_bytes].clone().view(form.dtype)
        own = own.view([form.shape[axis] for axis in form.order])
        own = own.permute([form.order.index(axis) for axis in range(len(form.order))])
        tensors.append(own.cpu() if form.on_cpu else own)
        start += form.padded_bytes
    return tensors
