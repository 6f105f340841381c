"""The bits of format learned-lattice-v1: d weights of a row as a companded lattice point.

    W = scale · F⁻¹(G q)

G, mu and scale are those of the group of the tile: `group` consecutive columns, all rows. G is
lower triangular or diagonal. q are the coordinates of the point, which symbols z_i of
0..2^width_i − 1 stand for:

    integers    q_i = z_i − (2^width_i − 1) / 2

    e8          each eight symbols z_0..z_7 are a point of the lattice E8 + 1/4 in a box:
                    h   = bit 0 of z_7
                    n_i = z_i, but bit 0 of n_7 is such that n_0 + ... + n_7 is even
                    q_i = n_i − 2^width_i / 2 + 1/4 + h / 2

F⁻¹ acts on the components of y = G q:

    none        y
    mu          sgn(y) · (e^|y| − 1) / mu
    tanh        artanh(y) / mu, y between ±(1 − 2⁻¹²)

The symbols of a tile follow each other without gaps, and so do the tiles of a row: a stream of
bits, least significant first, filled up with zeros to a whole byte.

G q is exact in float64 in whatever order it is summed (entries of G are multiples of 2⁻²⁴, those of
q of 1/4), and is then rounded to float32.

Source: GLVQ, arXiv 2510.20984 (integers, mu). E8 + 1/4 as in QuIP#, arXiv 2402.04396, there in a
ball.
"""

import torch
from torch import Tensor

from vqllm_kernels.bitpack import pack_bits, packed_bytes

LATTICES = ("integers", "e8")
COMPANDINGS = ("none", "mu", "tanh")
GENERATORS = ("triangular", "diagonal")
MAX_TANH = 1 - 2.0**-12
_CHUNK = 1 << 20
"""Weights that are decoded at a time."""


def pack_symbols(codes_IJM: Tensor, widths: tuple[int, ...]) -> Tensor:
    """The stream of bits of each row of tiles, uint8 [I, ceil(J · sum(widths) / 8)].

    Raises:
        ValueError: a symbol that does not fit its width.
    """
    if len(set(widths)) == 1:
        return pack_bits(codes_IJM.flatten(1), widths[0])
    limit_M = torch.tensor([1 << width for width in widths], device=codes_IJM.device)
    if bool(((codes_IJM < 0) | (codes_IJM >= limit_M)).any()):
        raise ValueError(
            f"codes span {int(codes_IJM.min())}..{int(codes_IJM.max())}, allowed are those of "
            f"{widths} bits"
        )
    bits = [(codes_IJM[..., i] >> b) & 1 for i, width in enumerate(widths) for b in range(width)]
    return pack_bits(torch.stack(bits, -1).flatten(1), 1)


def unpack_symbols(packed: Tensor, widths: tuple[int, ...], num_tiles: int) -> Tensor:
    """Inverse of `pack_symbols`: int32 [I, J, M] with J = `num_tiles`."""
    want = packed_bytes(num_tiles, sum(widths))
    if packed.dtype != torch.uint8 or packed.shape[-1] != want:
        raise ValueError(
            f"packed codes are {packed.dtype} [..., {packed.shape[-1]}], expected uint8 "
            f"[..., {want}] for {num_tiles} tiles of {sum(widths)} bits"
        )
    device = packed.device
    first_M = torch.tensor([sum(widths[:i]) for i in range(len(widths))], device=device)
    mask_M = torch.tensor([(1 << width) - 1 for width in widths], dtype=torch.int32, device=device)
    bit_JM = torch.arange(num_tiles, device=device)[:, None] * sum(widths) + first_M
    byte_JM, shift_JM = bit_JM // 8, (bit_JM % 8).to(torch.int32)
    # A symbol of up to 8 bits lies inside two consecutive bytes.
    padded = torch.nn.functional.pad(packed, (0, 1)).to(torch.int32)
    window = padded[:, byte_JM] | (padded[:, byte_JM + 1] << 8)
    return (window >> shift_JM) & mask_M


def coordinates(codes: Tensor, lattice: str, widths: tuple[int, ...]) -> Tensor:
    """q of symbols [..., d], float32 [..., d]."""
    levels = torch.tensor([float(1 << width) for width in widths], device=codes.device)
    if lattice == "integers":
        return codes - (levels - 1) / 2
    z = codes.unflatten(-1, (-1, 8))
    coset = z[..., 7:] & 1
    odd = z[..., :7].sum(-1, keepdim=True, dtype=z.dtype) & 1
    n = torch.cat((z[..., :7], (z[..., 7:] & ~1) | odd), -1)
    return (n + (0.5 * coset + 0.25)).flatten(-2) - levels / 2


def compress(x: Tensor, mu: Tensor, companding: str) -> Tensor:
    """F of weights over their scale, elementwise; `mu` is broadcast."""
    if companding == "none":
        return x
    if companding == "mu":
        return x.sign() * torch.log1p(mu * x.abs())
    # tanh(mu x), in a fifth of the time.
    return 2 * torch.sigmoid(2 * mu * x) - 1


def expand(y: Tensor, mu: Tensor, companding: str) -> Tensor:
    """F⁻¹, elementwise; `mu` is broadcast."""
    if companding == "none":
        return y
    if companding == "mu":
        return y.sign() * torch.expm1(y.abs()) / mu
    # Not torch.atanh, which is not the same at every place of a tensor.
    t = y.clamp(-MAX_TANH, MAX_TANH)
    return torch.log((1 + t) / (1 - t)) / (2 * mu)


def stored_entries(G_PEE: Tensor, generator: str) -> Tensor:
    """The entries of G that are stored for each group: its diagonal [P, d], or its lower triangle
    row by row [P, d (d + 1) / 2]."""
    if generator == "diagonal":
        return torch.diagonal(G_PEE, dim1=1, dim2=2).contiguous()
    row, col = torch.tril_indices(*G_PEE.shape[1:], device=G_PEE.device)
    return G_PEE[:, row, col]


def generator_matrices(entries: Tensor, dim: int) -> Tensor:
    """Inverse of `stored_entries`: G of each group, [P, d, d]."""
    if entries.shape[1] == dim:
        return torch.diag_embed(entries)
    row, col = torch.tril_indices(dim, dim, device=entries.device)
    zeros = entries.new_zeros(len(entries), dim * dim)
    return zeros.index_copy(1, row * dim + col, entries).unflatten(1, (dim, dim))


def reproduce(
    codes_IJM: Tensor,
    tensors: dict[str, Tensor],
    group_J: Tensor,
    lattice: str,
    companding: str,
    widths: tuple[int, ...],
) -> Tensor:
    """Weights of symbols, float32 [I, J, d].

    Args:
        tensors: `generator` as in `stored_entries`, `scale` [P], and `mu` [P] if companded.
        group_J: the group of each column of tiles.
    """
    scale_J1 = tensors["scale"].float()[group_J, None]
    mu_J1 = scale_J1 if companding == "none" else tensors["mu"].float()[group_J, None]
    entries, dim = tensors["generator"], len(widths)
    diagonal = entries.shape[1] == dim
    G_P = entries.float() if diagonal else generator_matrices(entries.double(), dim).mT
    G_J = G_P[group_J]
    weights = []
    num_rows = max(1, _CHUNK // max(1, len(group_J) * dim))
    for codes in codes_IJM.split(num_rows):
        q_IJE = coordinates(codes, lattice, widths)
        if diagonal:
            y_IJE = q_IJE * G_J
        else:
            y_IJE = torch.bmm(q_IJE.double().transpose(0, 1), G_J).transpose(0, 1).float()
        weights.append(scale_J1 * expand(y_IJE, mu_J1, companding))
    return torch.cat(weights)
