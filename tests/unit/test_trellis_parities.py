"""The trellis code gf2: bits of an index are parities of bits of the state, entries are bytes."""

import json

import pytest
import torch

from vqllm.codecs import CODECS, trellis_maps, trellis_tables
from vqllm.core import tiles
from vqllm.errors import RecipeError
from vqllm_kernels import formats
from vqllm_kernels.trellis import reference_v2
from vqllm_kernels.trellis.spec import ParityTrellisSpec

MASKS = (0x84F, 0x1, 0x802, 0x5BA, 0xAC3, 0xFFF)


def spec(tile_bits=512, masks=MASKS, state_bits=12, tile_rows=64):
    return ParityTrellisSpec(
        tile_rows=tile_rows, tile_bits=tile_bits, state_bits=state_bits, masks=masks
    )


def gf2(**options):
    return CODECS.get("trellis").model_validate({"type": "trellis", "code": "gf2", **options})


def random_tensors(own, rows, cols):
    generator = torch.Generator().manual_seed(0)
    codes, table = own.layout(rows, cols)["codes"], own.layout(rows, cols)["table"]
    return {
        "codes": torch.randint(-(1 << 15), 1 << 15, codes.shape, generator=generator).short(),
        "table": torch.randint(-127, 128, table.shape, generator=generator).to(torch.int8),
        "scale": torch.tensor([0.25]),
    }


def parities(masks, state):
    return sum(((state & mask).bit_count() & 1) << i for i, mask in enumerate(masks))


def test_bits_of_the_index_are_parities():
    masks = (*MASKS, 0xFFFF, 0x8000)
    found = reference_v2.indices(masks, torch.arange(1 << 16))
    assert found[::97].tolist() == [parities(masks, state) for state in range(0, 1 << 16, 97)]


@pytest.mark.parametrize("tile_bits", [384, 448, 512, 592, 704, 768, 1024])
@pytest.mark.parametrize(("state_bits", "tile_rows"), [(12, 64), (16, 16)])
def test_weights_from_the_stored_bytes(tile_bits, state_bits, tile_rows):
    """By the words of the definition, in Python's own integers."""
    own = spec(tile_bits, state_bits=state_bits, tile_rows=tile_rows)
    tile_cols = 256 // tile_rows
    rows, cols = tile_rows + 3, 2 * tile_cols
    tensors = random_tensors(own, rows, cols)
    W_RC = own.decode(tensors, rows, cols)
    for row, col in ((0, 0), (0, 1), (tile_rows - 1, cols - 1), (tile_rows, tile_cols)):
        tile = tensors["codes"][row // tile_rows, col // tile_cols]
        ring = "".join(f"{int(word) & 0xFFFF:016b}" for word in tile)
        weight = row % tile_rows * tile_cols + col % tile_cols
        end = (weight + 1) * tile_bits // 256 + tile_bits
        state = int((ring + ring)[end - state_bits : end], 2)
        entry = int(tensors["table"][parities(MASKS, state), 0])
        assert float(W_RC[row, col]) == 0.25 * entry
    some = torch.tensor([rows - 1, 0, 2])
    assert torch.equal(own.decode_rows(tensors, some, cols), W_RC[some])


def test_a_specification_is_read_back():
    own = spec()
    assert formats.from_dict(json.loads(json.dumps(own.to_dict()))) == own
    assert own.to_dict()["format"] == "trellis-v2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": []}, "0 masks; allowed are 1 to 8"),
        ({"masks": [1] * 9}, "9 masks"),
        ({"masks": [1, 0]}, "allowed are numbers from 1 to 4095"),
        ({"masks": [1, 4096]}, "allowed are numbers from 1 to 4095"),
        ({"masks": [1, 2.0]}, "allowed are numbers from 1 to 4095"),
        ({"masks": [1, True]}, "no number"),
        ({"state_bits": 17}, "a state of 17 bits"),
        ({"tile_bits": 500}, "500 bits a tile"),
        ({"tile_rows": 48}, "tiles of 48 rows"),
        ({"code": "gf2"}, "fields"),
    ],
)
def test_a_specification_that_means_nothing_is_refused(change, message):
    with pytest.raises(ValueError, match=f"trellis-v2.*{message}|{message}"):
        formats.from_dict({**spec().to_dict(), **change})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_bits": 7}, "code gf2 with state_bits 7; allowed are 8 to 16"),
        ({"table_bits": 5}, "code gf2 with table_bits 5; allowed are 6 and 7"),
        ({"step_weights": 2}, "code gf2 with 2 weights a step"),
        ({"bits": 2.03}, "allowed are multiples of 0.0625"),
    ],
)
def test_options_that_the_code_does_not_have_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        gf2(**options)


@pytest.mark.parametrize("state_bits", trellis_maps.STATE_BITS)
@pytest.mark.parametrize("rate", [1, 1.5, 2, 2.25, 2.5, 3, 3.5, 4, 6])
def test_maps_of_every_size_have_full_rank(state_bits, rate):
    for table_bits in (None, *trellis_maps.TABLE_BITS):
        masks = gf2(state_bits=state_bits, bits=rate, table_bits=table_bits).spec().masks
        assert len(masks) in ((table_bits,) if table_bits else trellis_maps.TABLE_BITS)
        index_S = reference_v2.indices(masks, torch.arange(1 << state_bits))
        counts_K = index_S.bincount(minlength=1 << len(masks))
        assert bool((counts_K == 1 << (state_bits - len(masks))).all())


def test_the_table_is_of_bytes_that_use_their_range():
    codec = gf2(state_bits=8)
    X_IJE = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0))
    state = codec.fit(X_IJE, None, torch.Generator())
    codes_IJM = codec.encode(X_IJE, state)
    packed = codec.pack(codes_IJM, state)
    assert packed["table"].dtype == torch.int8
    assert int(packed["table"].abs().max()) == trellis_tables.LARGEST
    rows, cols = 2 * codec.tile[0], 3 * codec.tile[1]
    decoded = tiles.to_tiles(codec.spec().decode(packed, rows, cols), codec.tile)
    assert torch.equal(decoded, codec.decode(codes_IJM, state))


def test_a_table_that_training_moved_is_stored_with_another_scale():
    codec = gf2(state_bits=8)
    table_K1 = torch.linspace(-200, 254, 64)[:, None]
    state = codec.project({"scale": torch.tensor([0.5]), "table": table_K1})
    assert float(state["scale"]) == 1.0
    assert torch.equal(state["table"], (table_K1 / 2).round())
    again = codec.project(state)
    assert all(torch.equal(again[name], state[name]) for name in state)
