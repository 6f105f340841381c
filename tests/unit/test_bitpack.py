"""Integers of any width, packed without gaps."""

import pytest
import torch

from vqllm_kernels.bitpack import (
    MAX_WIDTH,
    pack_bits,
    pack_wide,
    packed_bytes,
    unpack_bits,
    unpack_wide,
)

WIDTHS = range(1, MAX_WIDTH + 1)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("num_symbols", [1, 2, 3, 7, 8, 9, 37, 576])
def test_lossless_at_every_width_and_length(width, num_symbols):
    generator = torch.Generator().manual_seed(width)
    codes = torch.randint(1 << width, (3, num_symbols), generator=generator, dtype=torch.int32)
    codes[0] = (1 << width) - 1
    packed = pack_bits(codes, width)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, packed_bytes(num_symbols, width))
    assert packed.shape[1] == -(-num_symbols * width // 8)
    assert torch.equal(unpack_bits(packed, width, num_symbols), codes)


@pytest.mark.parametrize("width", WIDTHS)
def test_bit_order_is_the_documented_one(width):
    codes = torch.randint(1 << width, (11,), generator=torch.Generator().manual_seed(1))
    stream = sum(int(code) << (i * width) for i, code in enumerate(codes))
    packed = pack_bits(codes, width)
    assert bytes(packed.tolist()) == stream.to_bytes(len(packed), "little")


def test_whole_byte_widths_are_plain_integers():
    codes = torch.tensor([[0, 1, 255]])
    assert torch.equal(pack_bits(codes, 8), codes.to(torch.uint8))
    words = torch.tensor([0x1234, 0xFFFF])
    assert pack_bits(words, 16).tolist() == [0x34, 0x12, 0xFF, 0xFF]


def test_leading_axes_are_kept():
    codes = torch.randint(8, (2, 3, 5), generator=torch.Generator().manual_seed(2))
    packed = pack_bits(codes, 3)
    assert packed.shape == (2, 3, 2)
    assert torch.equal(unpack_bits(packed, 3, 5), codes.to(torch.int32))


@pytest.mark.parametrize("width", [0, 17, -1])
def test_width_out_of_range(width):
    with pytest.raises(ValueError, match=r"outside 1\.\.16"):
        pack_bits(torch.zeros(4, dtype=torch.int32), width)
    with pytest.raises(ValueError, match=r"outside 1\.\.16"):
        unpack_bits(torch.zeros(4, dtype=torch.uint8), width, 4)


@pytest.mark.parametrize("code", [-1, 8])
def test_code_that_does_not_fit(code):
    with pytest.raises(ValueError, match=r"allowed is 0\.\.7"):
        pack_bits(torch.tensor([0, code]), 3)


def test_wrong_size_or_dtype_of_packed_codes():
    with pytest.raises(ValueError, match="expected uint8"):
        unpack_bits(torch.zeros(2, dtype=torch.uint8), 3, 6)
    with pytest.raises(ValueError, match="expected uint8"):
        unpack_bits(torch.zeros(3, dtype=torch.int32), 3, 8)


@pytest.mark.parametrize("width", [1, 7, 16, 17, 31, 32, 33, 48, 63, 64, 127, 128])
@pytest.mark.parametrize("num_symbols", [1, 2, 5, 8, 37])
def test_wide_symbols_are_lossless_in_the_documented_order(width, num_symbols):
    generator = torch.Generator().manual_seed(width)
    limbs = torch.randint(1 << 16, (3, num_symbols, -(-width // 16)), generator=generator)
    limbs[0] = (1 << 16) - 1
    limbs[..., -1] &= (1 << (width - 1) % 16 + 1) - 1
    packed = pack_wide(limbs, width)
    assert packed.shape == (3, packed_bytes(num_symbols, width))
    assert torch.equal(unpack_wide(packed, width, num_symbols), limbs.to(torch.int32))
    for row, symbols in zip(packed, limbs.tolist()):
        symbols = [sum(limb << 16 * m for m, limb in enumerate(s)) for s in symbols]
        stream = sum(symbol << (j * width) for j, symbol in enumerate(symbols))
        assert bytes(row.tolist()) == stream.to_bytes(len(row), "little")
    if width <= MAX_WIDTH:
        assert torch.equal(packed, pack_bits(limbs[..., 0], width))


def test_wide_symbols_that_do_not_fit():
    for limbs in ([[-1, 0]], [[0, 2]], [[1 << 16, 0]]):
        with pytest.raises(ValueError, match="do not fit 17 bits"):
            pack_wide(torch.tensor(limbs), 17)
    with pytest.raises(ValueError, match="symbols of 3 limbs; 17 bits have 2 limbs of 16 bits"):
        pack_wide(torch.zeros(4, 3, dtype=torch.int32), 17)
    with pytest.raises(ValueError, match="width 0 is not at least 1"):
        pack_wide(torch.zeros(4, 0, dtype=torch.int32), 0)
    with pytest.raises(ValueError, match="expected uint8"):
        unpack_wide(torch.zeros(8, dtype=torch.uint8), 17, 4)
