"""The bits of format trellis-v1.

A tile of T = 256 weights, row-major, is coded in n = `tile_bits` bits that form a ring. It is read
in T / V steps of V weights. Step t ends before bit

    e(t) = (t + 1) · n · V // T

and its state is the number made of the `state_bits` = L bits of the ring before that place, the
oldest bit the most significant. So each step shifts e(t) − e(t − 1) new bits into a window of L,
and any weight can be decoded alone. The V weights of the step are the values of the state, below,
times `scale`.

Bit i of the ring is bit 15 − i % 16 (15 the most significant) of word i // 16 of the tile.

The values of state s, with 32-bit unsigned arithmetic, before they are brought to zero mean and
unit variance over all states (in float64, each of the V values for itself, then rounded to
float32):

    1mad    x = 34038481 s + 76625530; the sum of the four bytes of x
    mul1    x = 0x83DCD12D s; the sum of the four bytes of x
    3inst   x = 89226354 s + 64248484; y = (x & 0x8FFF8FFF) ^ 0x3B603B60; the sum of the two halves
            of y, read as float16
    mul2    x = 0x83DCD12D s; V = 2: b0 + b2 and b1 + b3 of the bytes of x read as signed, b0 the
            lowest
    bytes4  x = 0x14B9ADB5 s; b0 + b1 + b2 + b3 of the bytes of x read as signed
    bytes2  x = 0x9B48D67B s; V = 2: as mul2
    hybrid  x = s s + s; V = 2: the entry (x >> (15 − q)) mod 2^q of the stored table
            [2^q, 2], q = `table_bits`; its second value is negated where bit 15 of x is set. The
            table's values are taken as they are.
    table   the entry s of the stored table [2^L, V], as it is

Source: bitshift trellis, 1MAD, 3INST and the hybrid code: QTIP, arXiv 2406.11235, sections 3.1 and
3.2; mul1: exllamav3. The multipliers of bytes4 and bytes2 are the best of 500 and 400 that were
drawn at random, on Gaussian weights at 2.5 to 4 and at 1.5 to 2.25 bits. Signed bytes are what a
tensor core multiplies, so the register with x is an operand as it is.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

WEIGHTS = 256
"""Weights of a tile."""
WORD = 16
"""Bits of a stored word."""

Code = Literal["1mad", "mul1", "3inst", "mul2", "bytes4", "bytes2", "hybrid", "table"]
CODES: tuple[str, ...] = get_args(Code)
STORED = ("hybrid", "table")
"""Codes with a stored table."""

MULTIPLIERS = {
    "1mad": 34038481,
    "mul1": 0x83DCD12D,
    "mul2": 0x83DCD12D,
    "bytes4": 0x14B9ADB5,
    "bytes2": 0x9B48D67B,
}
"""What the state is multiplied by in the codes whose values are sums of bytes."""
ADDENDS = {"1mad": 76625530}
"""What is added to the product."""
WEIGHTS_OF_STEP = {"mul2": 2, "bytes2": 2, "hybrid": 2}
"""V, where it is not 1; "table" has what its table has."""
UNSIGNED = ("1mad", "mul1")
"""Codes that read the bytes as unsigned."""

_U32 = 0xFFFFFFFF


def step_ends(tile_bits: int, num_steps: int) -> list[int]:
    """e(t) of every step."""
    return [(t + 1) * tile_bits // num_steps for t in range(num_steps)]


def states(codes: Tensor, tile_bits: int, state_bits: int, num_steps: int) -> Tensor:
    """The state of every step.

    Args:
        codes: words in 0..65535, int32 [..., tile_bits / 16].

    Returns:
        int32 [..., num_steps].
    """
    before_S, last_S, shift_S = _windows(tile_bits, num_steps, codes.device)
    window = (codes[..., before_S] << WORD) | codes[..., last_S]
    return (window >> shift_S) & ((1 << state_bits) - 1)


@cache
def _windows(tile_bits: int, num_steps: int, device: torch.device) -> tuple[Tensor, ...]:
    """The last word that the window of each step touches, the one before it around the ring, and
    the bits behind the window: [S] each, the words first."""
    end_S = torch.tensor(step_ends(tile_bits, num_steps), device=device)
    last_S = (end_S - 1) // WORD
    shift_S = ((last_S + 1) * WORD - end_S).to(torch.int32)
    return (last_S - 1) % (tile_bits // WORD), last_S, shift_S


def words(states_NS: Tensor, tile_bits: int) -> Tensor:
    """Inverse of `states`: int32 [N, tile_bits / 16] of a path that closes.

    Args:
        states_NS: int32 [N, num_steps]; only the new bits of each step are read.
    """
    step_WP, new_WP, left_WP, right_WP = _parts(tile_bits, states_NS.shape[1], states_NS.device)
    parts_NWP = (states_NS[:, step_WP] & new_WP) << left_WP >> right_WP
    return (parts_NWP & (1 << WORD) - 1).sum(2, dtype=torch.int32)


@cache
def _parts(tile_bits: int, num_steps: int, device: torch.device) -> tuple[Tensor, ...]:
    """What words are made of: the steps with bits in each word, a mask of the new bits of these
    steps, and how far they are shifted to the left and to the right: [W, P] each. Words of fewer
    steps have masks of 0 behind them."""
    ends = step_ends(tile_bits, num_steps)
    parts = []
    for start in range(0, tile_bits, WORD):
        stop = start + WORD
        parts.append(
            [
                (t, (1 << end - begin) - 1, max(stop - end, 0), max(end - stop, 0))
                for t, (begin, end) in enumerate(zip([0, *ends], ends))
                if begin < stop and end > start
            ]
        )
    most = max(map(len, parts))
    table_WP4 = torch.tensor([own + [(0, 0, 0, 0)] * (most - len(own)) for own in parts])
    step_WP, *others = table_WP4.unbind(2)
    return (step_WP.to(device), *(values_WP.to(device, torch.int32) for values_WP in others))


@cache
def computed_values(code: str, state_bits: int, device: torch.device) -> Tensor:
    """The values of all states of a code without a stored table, float32 [2^L, V]."""
    s = torch.arange(1 << state_bits, dtype=torch.int64)
    if code in MULTIPLIERS:
        values = byte_sums(code, s).double()
    else:
        values = raw_values(code, s)
    values = values - values.mean(0)
    return (values / values.square().mean(0).sqrt()).float().to(device)


def byte_sums(code: str, states: Tensor) -> Tensor:
    """The sums of bytes [..., V] of a code of `MULTIPLIERS`, int64, of states int64 [...].

    Bytes are read as signed, whatever the code says: this takes 512 from the sum of four.
    """
    x = (MULTIPLIERS[code] * states + ADDENDS.get(code, 0)) & _U32
    flip = 0 if code in UNSIGNED else 128
    b = [((x >> 8 * i) & 255 ^ flip) - 128 for i in range(4)]
    if WEIGHTS_OF_STEP.get(code) == 2:
        return torch.stack((b[0] + b[2], b[1] + b[3]), -1)
    return (b[0] + b[1] + b[2] + b[3])[..., None]


@dataclass(frozen=True)
class Moments:
    """What turns sums of bytes into values: (sum − mean) / deviation, for each of the V."""

    means: tuple[float, ...]
    deviations: tuple[float, ...]


@cache
def moments_of(code: str, state_bits: int) -> Moments:
    """The moments over all states."""
    states = torch.arange(1 << state_bits, dtype=torch.int64)
    if code in MULTIPLIERS:
        sums = byte_sums(code, states).double()
    else:
        sums = raw_values(code, states)
    means = sums.mean(0)
    deviations = (sums - means).square().mean(0).sqrt()
    return Moments(tuple(means.tolist()), tuple(deviations.tolist()))


def raw_values(code: str, states: Tensor) -> Tensor:
    """The values [..., 1] of a computed code without bytes as they come, float64, of states int64
    [...]."""
    if code != "3inst":
        raise ValueError(f"trellis code {code!r} has a stored table")
    return sums_of_halves((89226354 * states + 64248484) & _U32).half().double()[..., None]


def sums_of_halves(x: Tensor) -> Tensor:
    """The sums of the two halves of y of 3inst, read as float16: float32 [...], exact.

    Args:
        x: int64 [...] of 32 bits.
    """
    y = (x & 0x8FFF8FFF) ^ 0x3B603B60
    return _float16(y & 0xFFFF).float() + _float16(y >> 16).float()


def values(
    code: str, state_bits: int, table_bits: int, table: Tensor | None, device: torch.device
) -> Tensor:
    """The values of all states, float32 [2^L, V]; `table` is float16, for a code that stores it."""
    if table is None:
        return computed_values(code, state_bits, device)
    state_S = torch.arange(1 << state_bits, dtype=torch.int64, device=device)
    entry_S, sign_SV = entries(code, table_bits, state_S)
    return table.float()[entry_S] * sign_SV


def entries(code: str, table_bits: int, states: Tensor) -> tuple[Tensor, Tensor]:
    """Which entry of a stored table each state takes, [S], and the signs of its values, [S, V].

    Signs that are all positive are [1, 1].

    Args:
        states: int64 [S].
    """
    if code == "table":
        return states, torch.ones(1, 1, device=states.device)
    x = states * states + states
    sign_S = 1.0 - 2.0 * ((x >> 15) & 1)
    entry_S = (x >> (15 - table_bits)) & ((1 << table_bits) - 1)
    return entry_S, torch.stack((torch.ones_like(sign_S), sign_S), 1)


def decode_tiles(
    codes: Tensor, values_SV: Tensor, scale: Tensor, tile_bits: int, state_bits: int
) -> Tensor:
    """Weights of tiles, float32 [..., 256].

    Args:
        codes: words, int32 [..., tile_bits / 16].
        values_SV: what `values` gives.
        scale: float32 [1].
    """
    num_steps = WEIGHTS // values_SV.shape[1]
    state = states(codes, tile_bits, state_bits, num_steps)
    return torch.nn.functional.embedding(state, values_SV).flatten(-2) * scale


def decode(
    tensors: dict[str, Tensor],
    tile: tuple[int, int],
    code: str,
    tile_bits: int,
    state_bits: int,
    table_bits: int,
    rows: int,
    cols: int,
) -> Tensor:
    """Weights, float32 [rows, cols].

    Args:
        tensors: `codes` int16 (bit patterns) [I, J, tile_bits / 16]; `scale` float32 [1]; `table`
            float16, for the codes that store one.
        tile: (rows, cols) of a tile; I and J are the numbers of tiles, rounded up.
    """
    codes = tensors["codes"].to(torch.int32) & 0xFFFF
    table = values(code, state_bits, table_bits, tensors.get("table"), codes.device)
    X_IJE = decode_tiles(codes, table, tensors["scale"], tile_bits, state_bits)
    return matrix(X_IJE, tile, rows, cols)


def matrix(X_IJE: Tensor, tile: tuple[int, int], rows: int, cols: int) -> Tensor:
    """Tiles put together and cut to size, float32 [rows, cols]."""
    X = X_IJE.unflatten(-1, tile).transpose(1, 2)
    return X.flatten(2).flatten(0, 1)[:rows, :cols]


def _float16(bits: Tensor) -> Tensor:
    """float16 values of bit patterns in 0..65535."""
    signed = torch.where(bits >= 1 << 15, bits - (1 << 16), bits)
    return signed.to(torch.int16).view(torch.float16)
