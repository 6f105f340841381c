"""QTIP: a trellis code of tiles between two Hadamard transforms.

A linear of C inputs and R outputs, tiles of `td_x` outputs by `td_y` inputs, K bits a weight:

    trellis       int16 [R/td_x · C/td_y, td_x·td_y·K/16]   a tail-biting stream for each tile,
                                                            highest bits first
    tlut          float [2^tlut_bits, V]                    the table, with a mode that has one
    SU, SV        float [C], [R]                            scales with signs
    rcp, tp_rank  int64 []                                  whether the transform of the inputs (1)
                                                            or outputs (2) is in `tp_rank` blocks

State i of a stream is the L bits from bit i·K·V on, and makes V weights, row by row of the tile.
Where QTIP has a kernel (quantlut_sym with L = 16, V = 2, K = 2..4, 9 bits, tiles of 16 x 16), the
weights of a tile are in the order of tensor cores, and the bytes of two by two tiles are mixed: K
bytes of each tile at a time, last byte first. What it is stands under `quip_params` in config.json.

Source: arXiv 2406.11235; the layout is that of Cornell-RelaxML/qtip, lib/codebook/bitshift.py and
lib/utils/kernel_decompress.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from vqllm.foreign.base import FLOATS, Options, Rows, Shape, Stored
from vqllm.foreign.qtip_values import MODES, TABLES, values
from vqllm.foreign.rotated import Around, RotatedFormat, Rotation, rotation

NOTES = ("codebook", "skip_list", "split_for_tp", "fused", "model_version", "tp_rank")
"""Options that say which linears are coded, or what their tensors say."""


@dataclass(frozen=True)
class Qtip(RotatedFormat):
    """`bits` are those of all linears but v_proj, which may have others."""

    method: ClassVar[str] = "qtip"
    marker: ClassVar[str] = "trellis"
    names: ClassVar[frozenset[str]] = frozenset({"trellis", "tlut", "SU", "SV", "rcp", "tp_rank"})
    codes: ClassVar[frozenset[str]] = frozenset({"trellis"})
    tables: ClassVar[frozenset[str]] = frozenset({"tlut"})

    tile_rows: int
    tile_cols: int
    state_bits: int
    bits: int
    bits_v: int
    width: int
    table_bits: int
    mode: str

    @classmethod
    def from_config(cls, values: Mapping[str, Any], where: str) -> Self:
        options = Options(cls.method, values, where)
        sizes = tuple(1 << power for power in range(9))
        bits = options.number("K", range(1, 9))
        mode = options.choice("decode_mode", MODES, None)
        own = cls(
            tile_rows=options.number("td_x", sizes),
            tile_cols=options.number("td_y", sizes),
            state_bits=options.number("L", range(1, 17)),
            bits=bits,
            bits_v=options.number("K_v_proj", range(1, 9), bits),
            width=options.number("V", (1, 2) if mode in TABLES else (1,)),
            table_bits=options.number("tlut_bits", range(17)),
            mode=mode,
        )
        if max(own.bits, own.bits_v) * own.width > own.state_bits:
            options.refuse("L", own.state_bits, f"at least K · V, {bits * own.width} bits")
        if mode == "lut" and own.table_bits != own.state_bits:
            options.refuse("tlut_bits", own.table_bits, f"L, {own.state_bits}, of a whole table")
        if mode == "quantlut_sym" and (own.width != 2 or own.table_bits not in range(1, 16)):
            options.refuse("tlut_bits", own.table_bits, "1..15, with V = 2, of quantlut_sym")
        options.number("codebook_version", (0,), 0)
        options.ignore(*NOTES)
        options.end()
        return own

    def shape(self, module: Stored) -> Shape:
        (cols,), (rows,) = module.shape("SU", 1), module.shape("SV", 1)
        bits, unit = self._bits(module), self.tile_rows * self.tile_cols
        block = 32 if self._is_swizzled(bits) else 1
        if rows % max(self.tile_rows, block) or cols % max(self.tile_cols, block):
            module.refuse("SU", f"whole tiles of {self.tile_rows} x {self.tile_cols}, even numbers")
        what = f"{rows} x {cols} weights of {bits} bits"
        if unit * bits % 16 or unit % self.width:
            module.refuse("trellis", f"whole words of 16 bits a tile of {unit} weights")
        size = (rows * cols // unit, unit * bits // 16)
        module.expect("trellis", ("I16",), size, what)
        module.expect("SU", FLOATS, (cols,), what)
        module.expect("SV", FLOATS, (rows,), what)
        if self.mode in TABLES:
            table = (1 << self.table_bits, self.width)
            module.expect("tlut", FLOATS, table, f"{self.mode} of {self.table_bits} bits")
        for name in ("rcp", "tp_rank"):
            if name in module.headers:
                module.expect(name, ("I64", "I32"), (), "a number")
        self._sides(module, rows, cols)
        return Shape(rows, cols, max(self.tile_rows, block))

    def describe(self, module: Stored, shape: Shape) -> str:
        return f"trellis {self.mode}, {self._bits(module)} bits"

    def inner_rows(self, module: Stored, shape: Shape) -> Rows:
        bits, trellis = self._bits(module), module.read("trellis")
        table = module.read("tlut").float() if self.mode in TABLES else None
        value_S = values(self.mode, self.state_bits, self.table_bits, table)
        is_swizzled, per_row = self._is_swizzled(bits), shape.cols // self.tile_cols
        place = _fragment_order() if is_swizzled else slice(None)

        def decode(start: int, stop: int) -> Tensor:
            num_tile_rows = (stop - start) // self.tile_rows
            first = start // self.tile_rows * per_row
            words = trellis[first : first + num_tile_rows * per_row]
            words = words.int() & 0xFFFF
            if is_swizzled:
                words = _unswizzled(words, num_tile_rows, per_row)
            tiles = value_S[self._states(words, bits)].flatten(1)[:, place]
            tiles = tiles.view(num_tile_rows, per_row, self.tile_rows, self.tile_cols)
            return tiles.transpose(1, 2).reshape(stop - start, shape.cols)

        return decode

    def around(self, module: Stored, shape: Shape) -> Around:
        sides = self._sides(module, shape.rows, shape.cols)
        return Around(*sides, module.read("SU").float(), module.read("SV").float())

    def _bits(self, module: Stored) -> int:
        return self.bits_v if module.name.endswith(".v_proj") else self.bits

    def _is_swizzled(self, bits: int) -> bool:
        """Whether files are in the order of QTIP's kernel."""
        own = (self.mode, self.state_bits, self.width, self.table_bits)
        tile = (self.tile_rows, self.tile_cols)
        return own == ("quantlut_sym", 16, 2, 9) and tile == (16, 16) and bits in (2, 3, 4)

    def _states(self, words: Tensor, bits: int) -> Tensor:
        """States, int64 [tiles, weights / V], of streams of words [tiles, n] of 16 bits."""
        step, num_words = bits * self.width, words.shape[1]
        first = torch.arange(16 * num_words // step) * step
        at, shift = first // 16, 32 - self.state_bits - first % 16
        pairs = words[:, at].long() << 16 | words[:, (at + 1) % num_words]
        return (pairs >> shift) & ((1 << self.state_bits) - 1)

    def _sides(self, module: Stored, rows: int, cols: int) -> tuple[Rotation, Rotation]:
        blocks = [1, 1]
        if "rcp" in module.headers and (side := int(module.read("rcp"))):
            module.need("tp_rank")
            ranks = int(module.read("tp_rank"))
            if side not in (1, 2) or ranks < 1:
                raise module.wrong(f"its rcp is {side}, tp_rank {ranks}; known are 0, 1 and 2")
            blocks[side - 1] = ranks
        inputs = rotation(module, "SU", cols, blocks[0])
        return inputs, rotation(module, "SV", rows, blocks[1])


def _unswizzled(words: Tensor, num_tile_rows: int, per_row: int) -> Tensor:
    """Words of streams [tiles, n] from those of the kernel's order."""
    pairs = torch.stack([words & 0xFF, words >> 8], -1)
    size = (num_tile_rows // 2, per_row // 2, 32, 2, 2, -1)
    tiles = pairs.reshape(size).permute(0, 4, 1, 3, 2, 5).flip(-1)
    stream = tiles.reshape(words.shape[0], -1, 2)
    return stream[..., 0] << 8 | stream[..., 1]


def _fragment_order() -> Tensor:
    """For each weight of a tile, row by row, its place in the stream, int64 [256]."""
    place = torch.arange(256).view(8, 4, 2, 2, 2)
    return place.permute(3, 0, 2, 1, 4).flatten()
