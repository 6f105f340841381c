"""The bytes of a block of every native type.

Codes stand in fields: planes of 1, 2 or 4 bits, in which a byte has the bits of 8, 4 or 2 weights
that are `run` weights apart:

    byte l of a chunk      weight l | weight run + l | weight 2 run + l | ..    lowest bits first

Where vectors are coded, their numbers and bytes of 8 signs take the place of the codes of weights.

Source: llama.cpp (MIT), ggml/src/ggml-common.h for the order of the fields; the decoders of the
package `gguf` are what the tests compare with.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vqllm.export.native_types import NativeType

Parts = Mapping[str, Tensor]
"""Of N blocks: `q` uint8 [N, block], code numbers, or of vectors int32 [N, vectors] with `signs`
int32 [N, block / 8]; `d` and, where there is one, `dmin` float16 [N, 1]; `s` and `m` int32
[N, groups]."""


def pack(native: NativeType, codes_RJM: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """The bytes of all rows, uint8 [R, blocks a row · bytes of a block].

    Args:
        codes_RJM: numbers of values, int32 [R, C, 1]; or codes of tiles, of numbers of vectors
            and, last, signs.
        state: that of `NativeCodec`.
    """
    R, J, _ = codes_RJM.shape
    num_blocks = J * native.tile_cols // native.block
    if native.grid is None:
        parts = {"q": codes_RJM.to(torch.uint8).reshape(R * num_blocks, native.block)}
    else:
        bits = codes_RJM[..., -1].reshape(R * num_blocks, -1)
        signs = bits if native.tile_cols == 8 else bits[:, 0::2] | (bits[:, 1::2] << 4)
        parts = {"q": codes_RJM[..., :-1].reshape(R * num_blocks, -1), "signs": signs}
    for name, tensor in state.items():
        parts[name] = tensor.reshape(R * num_blocks, -1)
    packed = torch.cat([own.to(torch.uint8) for own in _PACKERS[native.name](parts)], 1)
    assert packed.shape[1] == native.num_bytes, native.name
    return packed.reshape(R, -1)


def _field(q: Tensor, bits: int, run: int) -> Tensor:
    """A plane of codes, uint8 [N, block · bits / 8]."""
    chunks = q.unflatten(1, (-1, 8 // bits, run))
    out = torch.zeros_like(chunks[:, :, 0])
    for i in range(8 // bits):
        out |= (chunks[:, :, i] & ((1 << bits) - 1)) << (bits * i)
    return out.flatten(1)


def _half(values: Tensor) -> Tensor:
    return values.half().contiguous().view(torch.uint8)


def _q4_0(p: Parts) -> list[Tensor]:
    return [_half(p["d"]), _field(p["q"], 4, 16)]


def _q4_1(p: Parts) -> list[Tensor]:
    return [_half(p["d"]), _half(p["dmin"]), _field(p["q"], 4, 16)]


def _q5_0(p: Parts) -> list[Tensor]:
    q = p["q"]
    return [_half(p["d"]), _field(q >> 4, 1, 1), _field(q, 4, 16)]


def _q5_1(p: Parts) -> list[Tensor]:
    q = p["q"]
    return [_half(p["d"]), _half(p["dmin"]), _field(q >> 4, 1, 1), _field(q, 4, 16)]


def _q8_0(p: Parts) -> list[Tensor]:
    signed = (p["q"].to(torch.int16) - 128).to(torch.int8)
    return [_half(p["d"]), signed.view(torch.uint8)]


def _q2_k(p: Parts) -> list[Tensor]:
    scales = p["s"] | (p["m"] << 4)
    return [scales, _field(p["q"], 2, 32), _half(p["d"]), _half(p["dmin"])]


def _q3_k(p: Parts) -> list[Tensor]:
    q, s = p["q"], p["s"] + 32
    low = (s[:, :8] & 15) | ((s[:, 8:] & 15) << 4)
    high = (s >> 4).unflatten(1, (4, 4)) << torch.tensor([0, 2, 4, 6])[:, None]
    return [_field(q >> 2, 1, 32), _field(q, 2, 32), low, high.sum(1), _half(p["d"])]


def _scales_k4(p: Parts) -> Tensor:
    """The 6-bit scales and mins of Q4_K and Q5_K: the last four of 8 are split, low bits apart."""
    s, m = p["s"], p["m"]
    parts = (
        s[:, :4] | (s[:, 4:] >> 4 << 6),
        m[:, :4] | (m[:, 4:] >> 4 << 6),
        (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4),
    )
    return torch.cat(parts, 1)


def _q4_k(p: Parts) -> list[Tensor]:
    return [_half(p["d"]), _half(p["dmin"]), _scales_k4(p), _field(p["q"], 4, 32)]


def _q5_k(p: Parts) -> list[Tensor]:
    q = p["q"]
    heads = [_half(p["d"]), _half(p["dmin"]), _scales_k4(p)]
    return [*heads, _field(q >> 4, 1, 32), _field(q, 4, 32)]


def _q6_k(p: Parts) -> list[Tensor]:
    q = p["q"]
    scales = p["s"].to(torch.int8).view(torch.uint8)
    return [_field(q, 4, 64), _field(q >> 4, 2, 32), scales, _half(p["d"])]


def _iq4_xs(p: Parts) -> list[Tensor]:
    s = p["s"] + 32
    low = (s[:, 0::2] & 15) | ((s[:, 1::2] & 15) << 4)
    high = ((s >> 4) << (2 * torch.arange(8))).sum(1, keepdim=True)
    return [_half(p["d"]), high & 255, high >> 8, low, _field(p["q"], 4, 16)]


def _signs_and_scales(p: Parts) -> Tensor:
    """A number of 32 bits for 32 weights: four times 7 signs, then the scale."""
    signs = (p["signs"] & 127).long().unflatten(1, (-1, 4)) << torch.tensor([0, 7, 14, 21])
    return _little_endian(signs.sum(2) | (p["s"].long() << 28), 4)


def _little_endian(numbers: Tensor, size: int) -> Tensor:
    return ((numbers[..., None] >> (8 * torch.arange(size))) & 255).flatten(1)


def _iq2_xxs(p: Parts) -> list[Tensor]:
    numbers, others = p["q"].unflatten(1, (-1, 4)), _signs_and_scales(p).unflatten(1, (-1, 4))
    return [_half(p["d"]), torch.cat([numbers, others], 2).flatten(1)]


def _iq2_xs(p: Parts) -> list[Tensor]:
    numbers = p["q"] | ((p["signs"] & 127) << 9)
    return [_half(p["d"]), _little_endian(numbers, 2), _field(p["s"], 4, 1)]


def _iq2_s(p: Parts) -> list[Tensor]:
    q = p["q"]
    return [_half(p["d"]), q & 255, p["signs"], _field(q >> 8, 2, 1), _field(p["s"], 4, 1)]


def _iq3_xxs(p: Parts) -> list[Tensor]:
    return [_half(p["d"]), p["q"], _signs_and_scales(p)]


def _iq3_s(p: Parts) -> list[Tensor]:
    q = p["q"]
    return [_half(p["d"]), q & 255, _field(q >> 8, 1, 1), p["signs"], _field(p["s"], 4, 1)]


_PACKERS: dict[str, Callable[[Parts], list[Tensor]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "IQ4_NL": _q4_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_XS": _iq4_xs,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
}
