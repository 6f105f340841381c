"""trellis-v3: tiles in an order of their own, values with the constants of EXL3."""

import json
import struct

import pytest
import torch

from vqllm_kernels import formats
from vqllm_kernels.trellis.spec import PlacedTrellisSpec

PLACES = (0, 3, 7, 1, 2, 4, 5, 6)


def spec(code="mul1", tile_bits=640, **fields):
    values = {"tile_rows": 16, "state_bits": 16, "places": PLACES, **fields}
    return PlacedTrellisSpec(code=code, tile_bits=tile_bits, **values)


def float16(bits):
    return struct.unpack("<e", struct.pack("<H", bits))[0]


def value(code, state):
    """By the words of the definition, in Python's own numbers."""
    if code == "mul1":
        x = 0x83DCD12D * state & 0xFFFFFFFF
        return float16(0x1EEE) * (sum(x.to_bytes(4, "little")) + 1024) + float16(0xC931)
    x = 0xCBAC1FED * state if code == "mcg" else 89226354 * state + 64248484
    y = x & 0x8FFF8FFF ^ 0x3B603B60
    return float16(y & 0xFFFF) + float16(y >> 16)


@pytest.mark.parametrize("code", ["3inst", "mcg", "mul1"])
@pytest.mark.parametrize("tile_bits", [256, 640, 2048])
def test_weights_from_the_stored_bytes(code, tile_bits):
    own = spec(code, tile_bits)
    generator = torch.Generator().manual_seed(0)
    shape = own.layout(20, 40)["codes"].shape
    codes = torch.randint(-(1 << 15), 1 << 15, shape, generator=generator).short()
    W_RC = own.decode({"codes": codes, "scale": torch.tensor([0.5])}, 20, 40)
    for row, col in ((0, 0), (0, 1), (5, 38), (15, 15), (19, 21)):
        words = codes[row // 16, col // 16].tolist()
        ring = "".join(f"{word & 0xFFFF:016b}" for word in words)
        place = row % 16 * 16 + col % 16
        step = sum((place >> bit & 1) << k for k, bit in enumerate(PLACES))
        end = (step + 1) * tile_bits // 256 + tile_bits
        assert W_RC[row, col] == 0.5 * value(code, int((ring + ring)[end - 16 : end], 2))


def test_it_is_written_and_read():
    own = spec()
    values = json.loads(json.dumps(own.to_dict()))
    assert values["format"] == "trellis-v3"
    assert formats.from_dict(values) == own


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"code": "bytes4"}, "allowed are 3inst, mcg, mul1"),
        ({"places": (0, 1, 2, 3, 4, 5, 6, 6)}, "each of 0 to 7 must be there once"),
        ({"places": (0, 1)}, "each of 0 to 7"),
        ({"tile_bits": 520}, "multiples of 16"),
        ({"tile_rows": 12}, "divisors of 256"),
    ],
)
def test_other_numbers_are_refused(fields, message):
    with pytest.raises(ValueError, match=f"trellis-v3.*{message}"):
        spec(**fields)


def test_which_linears_are_decoded_before_they_are_multiplied_is_said():
    reasons = {
        own: own.kernels("packed").reason  # type: ignore[attr-defined]
        for own in (spec(), spec("mcg"), spec(tile_rows=64), spec(places=(1, 0, 2, 3, 4, 5, 6, 7)))
    }
    said = [reason or "" for reason in reasons.values()]
    assert said[0] == ""
    assert [text.split(";")[0].split(":")[0] for text in said[1:]] == [
        "code mcg is no sum of bytes",
        "tiles of 64 rows",
        "places [1, 0, 2, 3, 4, 5, 6, 7]",
    ]
