"""A whole packed linear, or several of one input, as one call of compiled code.

    x  ── scales, Hadamard ──▶  x'  ── integers, product ──▶  y'  ── Hadamard, scales ──▶  y

What does not change from call to call is written down once, as addresses and sizes: `Linears`.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vqllm_kernels.compiled import said_if_long
from vqllm_kernels.cpu import panels, plan, threads
from vqllm_kernels.cpu.activations import MAX_ROWS
from vqllm_kernels.cpu.chains import Chain
from vqllm_kernels.cpu.parts import Member

ROWS = (1, 2, 4, 8, MAX_ROWS)
"""Rows of x that kernels are compiled for; a call takes the first that holds it."""


MOST_PACKED = 24
"""Rows of x up to which products of at most `MAX_ROWS` rows are taken one after the other, in place
of panels. Panels took 1.3 to 1.65 times as long for 17 rows (gf2 at 2 bits, 1536 x 576 to
4096 x 4096, AVX-512 and AMX), 1.04 to 1.34 times for 24, and for 32 1.17 to 0.74."""


@dataclass
class Linears:
    """Linears of one input."""

    input: Chain
    members: Sequence[Member]
    _plans: dict[int, plan.Plan] = field(default_factory=dict)
    """By rows of x."""

    def __call__(self, x: Tensor) -> list[Tensor] | None:
        """y of each, [..., rows] in the dtype of x; None if x is not finite.

        Args:
            x: bfloat16, float16 or float32 [..., cols], with a row at least.
        """
        x = x.contiguous()
        if x.dtype == torch.float16:
            ys = self(x.float())
            return None if ys is None else [y.to(x.dtype) for y in ys]
        *outer, cols = x.shape
        num_rows = x.numel() // cols
        if num_rows > MAX_ROWS:
            return self._many(x)
        own = self._plans.get(num_rows)
        if own is None:
            own = self._plans[num_rows] = self._plan(num_rows)
        ys = [x.new_empty((*outer, member.rows)) for member in self.members]
        addresses = array("q", [y.data_ptr() for y in ys])
        is_finite = plan.multiply(
            own.address,
            x.data_ptr(),
            num_rows,
            x.dtype == torch.bfloat16,
            threads.count() if num_rows * own.weights >= threads.worth() else 1,
            addresses.buffer_info()[0],
        )
        return ys if is_finite else None

    @property
    def nbytes(self) -> int:
        """Of the factors and of codes in another order: what is kept beside the packed tensors."""
        chains = [self.input, *(member.output for member in self.members)]
        factors = sum(chain.before.nbytes + chain.after.nbytes for chain in chains)
        return factors + sum(part.kept_bytes for member in self.members for part in member.parts)

    def _plan(self, num_rows: int) -> plan.Plan:
        rows = next(r for r in ROWS if num_rows <= r)
        same = next((own for own in self._plans.values() if own.rows == rows), None)
        if same is not None:
            return same
        with said_if_long():
            return plan.Plan.of(self.input, self.members, rows)

    def _many(self, x: Tensor) -> list[Tensor] | None:
        x_NC = x.view(-1, x.shape[-1])
        # Panels are bfloat16, which has fewer digits than float32.
        if x.dtype == torch.float32 or len(x_NC) <= MOST_PACKED:
            pieces = [self(piece) for piece in x_NC.split(MAX_ROWS)]
            if any(piece is None for piece in pieces):
                return None
            return [torch.cat(ys).view(*x.shape[:-1], -1) for ys in zip(*pieces, strict=True)]
        x_NC = self.input.rows(x_NC)
        return [
            member.output.rows(panels.multiply(x_NC, member.parts, member.rows)).view(
                *x.shape[:-1], member.rows
            )
            for member in self.members
        ]
