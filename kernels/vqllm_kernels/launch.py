"""The host side of the Triton kernels of packed formats, the same for every format.

A format says how its kernels work: `product` which kernel multiplies, how much of the result one
program takes and the arguments that only this kernel has, `decoding` the same for the weights. All
that does not depend on the format is here: outputs, activations in bytes, the grid, the arguments
of members and of their sums, pieces of the columns and the kernel that adds them up.

Names of arguments that a kernel must have, because they are filled in here:

    product     num_tokens, WARPS; and, if it splits no columns, those of outputs
    with split  num_tokens, WARPS, every_rows, split_steps, partial_ptr; its sum has num_tokens,
                partial_ptr, splits, PIECES, BLOCK and those of outputs
    outputs     every_rows, y_ptrs, add_ptrs, HAS_ADD; rows, y_ptr, add_ptr, HAS_ADD in a kernel of
                one member
    decoding    rows, W_ptr, add_ptr, HAS_ADD
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor

from vqllm_kernels import activations, gpu
from vqllm_kernels.kernels import Call, Operand, Quantized, Tensors, Wanted

Kernel = Any
"""A function compiled by triton: kernel[grid](arguments)."""

SUM_BLOCK = 128
"""Rows of a program that adds up pieces."""
MAX_PIECES = 32
"""Pieces that it adds at once: one after the other each waits for its load."""


@dataclass(frozen=True, kw_only=True)
class Members:
    """The linears that are multiplied in one launch."""

    tensors: Sequence[Tensors]
    rows: tuple[int, ...]
    cols: int
    ys: Sequence[Tensor]
    """Where the results go, [N, rows] of each."""
    adds: Sequence[Tensor] | None
    """float32 [N, rows] of each, added to the results."""

    def stored(self, name: str) -> tuple[Tensor, ...]:
        """A stored tensor of each."""
        return tuple(own[name].contiguous() for own in self.tensors)

    def one_by_one(self) -> "list[Members]":
        """A launch for each."""
        adds = [None] * len(self.rows) if self.adds is None else [[add] for add in self.adds]
        return [
            Members(tensors=[own], rows=(rows,), cols=self.cols, ys=[y], adds=add)
            for own, rows, y, add in zip(self.tensors, self.rows, self.ys, adds, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Split:
    """How programs share the columns of W, and what adds up their sums, in a fixed order."""

    steps: int
    """Steps that one program would take through all columns."""
    most_steps: int
    """Steps that a program takes at most."""
    kernel: Kernel
    arguments: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """The size of what a program multiplies."""

    row_groups: int
    """Rows of W, or of tiles, in groups of 8."""
    column_groups: int
    """Columns of the product in groups of 8. A token has a column, or one for each of its bytes."""
    warps: int


@dataclass(frozen=True, kw_only=True)
class Product:
    """How a kernel multiplies."""

    kernel: Kernel
    arguments: Mapping[str, object]
    """Those that only this kernel has."""
    tile: Tile
    group_rows: int = 8
    """Rows of W of a group of rows: 8, or 8 tiles."""
    max_registers: int | None = None
    of_one_member: bool = False
    """Whether the kernel takes one member, and no tuples."""
    split: Split | None = None


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How a kernel decodes."""

    kernel: Kernel
    arguments: Mapping[str, object]
    grid: tuple[int, int]
    options: Mapping[str, object] = field(default_factory=lambda: {"enable_fp_fusion": True})


class TritonKernels(ABC):
    """The `Kernels` of a format in Triton, for up to 64 tokens."""

    takes_blocks: bool = False
    members_together: ClassVar[bool] = True
    """Whether one launch takes several members."""

    @abstractmethod
    def declines(self, call: Call) -> str | None:
        """See `Kernels`."""

    def wanted(self, x_NC: Tensor) -> Wanted | None:
        """See `Kernels`; here x as it is."""
        return None

    @abstractmethod
    def product(self, x: Operand, members: Members) -> Product:
        """How to multiply x, which is in bytes if they are wanted and contiguous if not."""

    @abstractmethod
    def decoding(self, tensors: Tensors, rows: int, cols: int) -> Decoding:
        """How to decode the weights."""

    def matmuls(
        self,
        x: Operand,
        tensors: Sequence[Tensors],
        rows: Sequence[int],
        cols: int,
        dtype: torch.dtype,
        adds: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """See `Kernels`."""
        num_tokens = x.num_tokens if isinstance(x, Quantized) else len(x)
        device = next(iter(tensors[0].values())).device
        ys = [torch.empty(num_tokens, own, dtype=dtype, device=device) for own in rows]
        if num_tokens * sum(rows) == 0:
            return ys
        # The operand: bytes where the format wants them, unless a transform has written them.
        if isinstance(x, Tensor):
            wanted = self.wanted(x)
            x = x.contiguous() if wanted is None else activations.quantized(x, wanted)
        # One launch for all members, or one for each.
        together = Members(tensors=tensors, rows=tuple(rows), cols=cols, ys=ys, adds=adds)
        for members in [together] if self.members_together else together.one_by_one():
            multiply(self.product(x, members), x, members)
        return ys

    def decode(
        self,
        tensors: Tensors,
        rows: int,
        cols: int,
        dtype: torch.dtype,
        add_RC: Tensor | None = None,
    ) -> Tensor:
        """See `Kernels`."""
        device = next(iter(tensors.values())).device
        W_RC = torch.empty(rows, cols, dtype=dtype, device=device)
        if W_RC.numel() == 0:
            return W_RC
        decoding = self.decoding(tensors, rows, cols)
        decoding.kernel[decoding.grid](
            **decoding.arguments,
            rows=rows,
            add_ptr=W_RC if add_RC is None else add_RC,
            W_ptr=W_RC,
            HAS_ADD=add_RC is not None,
            **decoding.options,
        )
        return W_RC


def multiply(product: Product, x: Operand, members: Members) -> None:
    """Launch the kernel of a product, and the sum of its pieces, which write the members' y."""
    num_tokens, tile = len(members.ys[0]), product.tile
    # The grid: each member has programs of its own along the rows.
    program_rows = product.group_rows * tile.row_groups
    row_programs = sum(triton.cdiv(own, program_rows) for own in members.rows)
    columns = num_tokens * x.parts if isinstance(x, Quantized) else num_tokens
    column_programs = triton.cdiv(columns, 8 * tile.column_groups)
    arguments = {
        **product.arguments,
        "num_tokens": num_tokens,
        "WARPS": tile.warps,
        "num_warps": tile.warps,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }
    if product.max_registers is not None:
        arguments["maxnreg"] = product.max_registers
    if product.split is not None:
        _multiply_in_pieces(
            product.kernel, product.split, arguments, row_programs, column_programs, members
        )
        return
    outputs = _outputs(members, product.of_one_member)
    product.kernel[(row_programs, column_programs)](**arguments, **outputs)


def _multiply_in_pieces(
    kernel: Kernel,
    split: Split,
    arguments: Mapping[str, object],
    row_programs: int,
    column_programs: int,
    members: Members,
) -> None:
    """The product of each piece of the columns of W, and the sum of them."""
    num_tokens, device = len(members.ys[0]), members.ys[0].device
    # As many pieces as fill the device, each as long as its sums are safe.
    num_pieces = _num_pieces(split.steps, row_programs * column_programs, device)
    split_steps = min(triton.cdiv(split.steps, num_pieces), split.most_steps)
    num_pieces = triton.cdiv(split.steps, split_steps)
    size = (num_pieces, num_tokens, sum(members.rows))
    partial = torch.empty(size, dtype=torch.float32, device=device)
    kernel[(row_programs, num_pieces, column_programs)](
        **arguments, partial_ptr=partial, every_rows=members.rows, split_steps=split_steps
    )
    # Their sum, in a fixed order, so that results repeat.
    sum_programs = sum(triton.cdiv(own, SUM_BLOCK) for own in members.rows)
    split.kernel[(sum_programs, num_tokens)](
        **split.arguments,
        **_outputs(members, of_one_member=False),
        partial_ptr=partial,
        num_tokens=num_tokens,
        splits=num_pieces,
        PIECES=min(MAX_PIECES, triton.next_power_of_2(num_pieces)),
        BLOCK=SUM_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _outputs(members: Members, of_one_member: bool) -> dict[str, object]:
    """The arguments for what is written and added. A pointer that is not used is another's."""
    adds = members.ys[:1] if members.adds is None else members.adds
    has_add = members.adds is not None
    if of_one_member:
        [rows], [y] = members.rows, members.ys
        return {"rows": rows, "add_ptr": adds[0], "y_ptr": y, "HAS_ADD": has_add}
    return {
        "every_rows": members.rows,
        "add_ptrs": tuple(adds),
        "y_ptrs": tuple(members.ys),
        "HAS_ADD": has_add,
    }


def _num_pieces(steps: int, programs: int, device: torch.device) -> int:
    """Into how many pieces of the columns, `steps` long in all, the work of `programs` is cut: two
    programs of 8 warps a multiprocessor."""
    return min(steps, max(1, 2 * gpu.num_multiprocessors(device) // programs))


def few_rows(rows: int, device: torch.device) -> bool:
    """Whether programs of 32 rows are fewer than two a multiprocessor."""
    return rows < 32 * 2 * gpu.num_multiprocessors(device)


def in_units(length: int, unit: int) -> tuple[int, int]:
    """(units, size of a unit) of a length: what tells a kernel its alignment (`fragments`)."""
    size = gcd(length, unit)
    return length // size, size


def are_whole_words(every_codes: Sequence[Tensor]) -> bool:
    """Whether rows of codes are words of 32 bits where they lie."""
    row_bytes = every_codes[0].shape[1] * every_codes[0].itemsize
    return row_bytes % 4 == 0 and all(codes.data_ptr() % 4 == 0 for codes in every_codes)


def words_of(codes: Tensor) -> Tensor:
    """Codes as int32, copied if they begin between two words. Kernels are compiled for addresses
    divisible by 16, and for others."""
    codes = codes.contiguous()
    if codes.data_ptr() % 4:
        codes = codes.clone()
    return codes.view(torch.int32)
