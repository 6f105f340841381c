"""The masks of code gf2: which bits of a state are added up for each bit of the index.

Found by `eval/trellis_maps.py`; what it prints goes into this table. A map serves all rates near
that which it was found for, with a table trained for each rate. Masks are never changed, because
`vqllm tune` finds the codec of a checkpoint by its format.
"""

STATE_BITS = range(8, 17)
"""States that have maps."""
TABLE_BITS = (6, 7)

_FEW, _MANY = TABLE_BITS
_LOW, _HIGH = 2.5, 3.25
"""Rates up to which the maps for 2 and 3 bits are the better ones."""

_MAPS: dict[tuple[int, int, int], tuple[int, ...]] = {
    # state_bits, bits, table_bits
    (8, 2, 6): (0xC1, 0x24, 0xB3, 0x18, 0x87, 0xCD),
    (10, 2, 6): (0x143, 0x3FA, 0x32, 0x9C, 0x2DB, 0x3C2),
    (12, 2, 6): (0xD8C, 0x6A1, 0x252, 0x108, 0x98F, 0xF96),
    (12, 3, 6): (0xEFD, 0xFB1, 0xBE0, 0xECC, 0xBB1, 0x672),
    (12, 3, 7): (0xA54, 0x42F, 0x1E0, 0x13C, 0x82A, 0xA63, 0xD8C),
    (12, 4, 7): (0x27D, 0x5AF, 0xB0, 0xBB4, 0x8CA, 0xA63, 0x58C),
}


def best(state_bits: int, rate: float, table_bits: int | None = None) -> tuple[int, ...]:
    """The masks for a rate, the lowest bit of the index first.

    Args:
        table_bits: of `TABLE_BITS`; None takes 6 for the maps for 2 bits, where 7 gain nothing,
            and 7 above.
    """
    bits = 2 if rate <= _LOW else 3 if rate <= _HIGH else 4
    if table_bits is None:
        table_bits = _FEW if bits == 2 else _MANY
    return min(
        (abs(known - bits), masks)
        for (states, known, entries), masks in _MAPS.items()
        if (states, entries) == (state_bits, table_bits)
    )[1]
