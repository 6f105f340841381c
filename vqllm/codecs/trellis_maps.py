"""The masks of code gf2: which bits of a state are added up for each bit of the index.

Found by `eval/trellis_maps.py`; what it prints goes into this table. A map serves all rates near
that which it was found for, with a table trained for each rate. Masks are never changed, because
`vqllm tune` finds the codec of a checkpoint by its format.

Mean squared error on unit Gaussian weights, the best scale in the table (1,024 tiles up to 2^14
states, 256 to 512 above; bytes4 with 2^12 states has 0.0726, 0.0190 and 0.0050 on them):

    states    2 bits, 64 entries    3 bits, 128    4 bits, 128
    2^8       0.0739                0.0196         0.00525
    2^9       0.0727                0.0190         0.00508
    2^10      0.0713                0.0185         0.00494
    2^11      0.0702                0.0183         0.00486
    2^12      0.0695                0.0180         0.00474
    2^13      0.0691                0.0179         0.00471
    2^14      0.0686                0.0176         0.00467
    2^15      0.0685                0.0176         0.00466
    2^16      0.0679                0.0174         0.00464
"""

STATE_BITS = range(8, 17)
"""States that have maps."""
TABLE_BITS = (6, 7)

_FEW, _MANY = TABLE_BITS
_LOW, _HIGH = 2.5, 3.25
"""Rates up to which the maps for 2 and 3 bits are the better ones."""

# By state_bits, bits that they were found for, table_bits.
_MAPS: dict[tuple[int, int, int], tuple[int, ...]] = {
    (8, 2, 6): (0xC1, 0x24, 0xB3, 0x18, 0x87, 0xCD),
    (8, 3, 7): (0xCC, 0x1D, 0x65, 0x8, 0x5F, 0xD6, 0xFC),
    (8, 4, 7): (0xE1, 0x21, 0x6, 0x57, 0xE3, 0x9A, 0x36),
    (9, 2, 6): (0x1C1, 0x24, 0xBB, 0x58, 0x187, 0x8D),
    (9, 3, 7): (0x1C8, 0x1BD, 0x161, 0x8, 0x15B, 0x1D6, 0xFC),
    (9, 4, 7): (0x1E1, 0x121, 0x6, 0x57, 0xE3, 0x19A, 0x36),
    (10, 2, 6): (0x143, 0x3FA, 0x32, 0x9C, 0x2DB, 0x3C2),
    (10, 3, 7): (0x3DF, 0xD6, 0x31, 0x20, 0xA3, 0x319, 0x2DC),
    (10, 4, 7): (0xF2, 0x125, 0x100, 0x312, 0x271, 0x1AE, 0x115),
    (11, 2, 6): (0x543, 0x3FA, 0x32, 0x9C, 0x2DB, 0x7C2),
    (11, 3, 7): (0x3DF, 0x56, 0x431, 0x20, 0x483, 0x79D, 0x6DC),
    (11, 4, 7): (0xF2, 0x525, 0x500, 0x712, 0x671, 0x1AE, 0x515),
    (12, 2, 6): (0xD8C, 0x6A1, 0x252, 0x108, 0x98F, 0xF96),
    (12, 3, 6): (0xEFD, 0xFB1, 0xBE0, 0xECC, 0xBB1, 0x672),
    (12, 3, 7): (0xA54, 0x42F, 0x1E0, 0x13C, 0x82A, 0xA63, 0xD8C),
    (12, 4, 7): (0x27D, 0x5AF, 0xB0, 0xBB4, 0x8CA, 0xA63, 0x58C),
    (13, 2, 6): (0xD8C, 0x6A1, 0x252, 0x108, 0x198F, 0xF96),
    (13, 3, 7): (0xA54, 0x42F, 0x11E0, 0x13C, 0x82A, 0x1A63, 0xD8C),
    (13, 4, 7): (0x27D, 0x5AF, 0xB0, 0xBB4, 0x18CA, 0x1A63, 0x58C),
    (14, 2, 6): (0x292C, 0x1685, 0x252, 0x1108, 0x398F, 0x1F96),
    (14, 3, 7): (0x214, 0x342F, 0x1E0, 0x17C, 0x92A, 0x1A63, 0x2D0C),
    (14, 4, 7): (0x327D, 0x35AF, 0xB0, 0xBB4, 0x38CA, 0x2A63, 0x258C),
    (15, 2, 6): (0x692C, 0x1685, 0x252, 0x5108, 0x398F, 0x5F96),
    (15, 3, 7): (0x214, 0x742F, 0x1E0, 0x17C, 0x492A, 0x5A63, 0x6D0C),
    (15, 4, 7): (0x727D, 0x35AF, 0xB0, 0x4BB4, 0x38CA, 0x6A63, 0x658C),
    (16, 2, 6): (0xE92C, 0x1685, 0x252, 0xD108, 0x798F, 0x9F96),
    (16, 3, 7): (0x214, 0xB42F, 0x81E0, 0x17C, 0x892A, 0x5A63, 0xAD0C),
    (16, 4, 7): (0x327D, 0x35AF, 0x40B0, 0x4BB4, 0x38CA, 0xEA63, 0x658C),
}


def best(state_bits: int, rate: float, table_bits: int | None = None) -> tuple[int, ...]:
    """The masks for a rate, the lowest bit of the index first.

    Args:
        table_bits: of `TABLE_BITS`; None takes 6 for the maps for 2 bits, where 7 gain nothing,
            and 7 above. Where there is no map of that size for the rate, one for another rate is
            taken.
    """
    bits = 2 if rate <= _LOW else 3 if rate <= _HIGH else 4
    if table_bits is None:
        table_bits = _FEW if bits == 2 else _MANY
    return min(
        (abs(known - bits), masks)
        for (states, known, entries), masks in _MAPS.items()
        if (states, entries) == (state_bits, table_bits)
    )[1]
