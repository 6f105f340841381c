"""What a format gives for products on a CPU: its codes, and the kernels that read them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from vqllm_kernels.cpu.activations import Operand
from vqllm_kernels.cpu.chains import Chain


@dataclass(frozen=True)
class Product:
    """The kernel of a format for some rows of x."""

    address: int
    """Of a C function of one address: that of NUM_ARGUMENTS numbers."""
    operand: Operand
    table: Tensor | None
    """What it looks up."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Codes of a linear, or of one of several that are added."""

    codes: Tensor
    """[rows of tiles, tiles of a row, ..]"""
    tile: tuple[int, int]
    scale: float
    """What the products are multiplied by."""
    product: Callable[[int], Product]
    """The kernel for so many rows of x, one of ROWS."""
    panel: Callable[[], int]
    """The address of the kernel that decodes: a C function of NUM_PANEL_ARGUMENTS numbers."""
    panel_numbers: tuple[float, float, float, float]
    """What the latter is given, as float32."""
    table: Tensor | None
    """And what it looks up."""
    kept_bytes: int = 0
    """Of `codes`, where they are not the stored ones."""


@dataclass(frozen=True)
class Member:
    """One of several linears of one input."""

    rows: int
    cols: int
    parts: Sequence[Part]
    """What is added, in this order."""
    output: Chain
