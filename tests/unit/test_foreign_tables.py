"""The tables that QuIP# and QTIP share with nobody: their Hadamard matrices and codewords.

What is decoded with them is compared in `test_foreign`; here are those that no small linear has.
"""

import hashlib

import pytest
import torch

from vqllm.foreign import quip_codes, sloane
from vqllm_kernels.e8p.reference import abs_table

DIGESTS = {
    12: "67507aecbe2abee5",
    20: "f54960fecf1ccf70",
    28: "a6cb994c78f9acd4",
    36: "d674d8240e6b622b",
    52: "9ee082772819b105",
    60: "091e76fba0aef583",
    108: "690a34c6c9ed2f0e",
    116: "e35aecfbc1d95799",
    124: "9b41cf5242a1dd12",
    140: "b9ff01506ffe4db5",
    156: "99a1b852ce559ffd",
    172: "378ef12c7cc31f3e",
}
"""SHA-256 of the matrices in lib/utils/matmul_had.py of QuIP#, as int8."""


def test_every_core_has_a_digest() -> None:
    assert sorted(sloane.CORES) == sorted(DIGESTS)


@pytest.mark.parametrize("core", DIGESTS)
def test_the_cores_are_those_of_quip_sharp(core: int) -> None:
    signs = sloane.signs(core)
    assert hashlib.sha256(signs.numpy().tobytes()).hexdigest()[:16] == DIGESTS[core]
    assert torch.equal(signs.long() @ signs.long().T, core * torch.eye(core, dtype=torch.long))


@pytest.mark.parametrize(
    ("features", "core"),
    [(4096, 1), (11008, 172), (13824, 108), (14336, 28), (5120, 20), (12288, 12), (5632, None)],
)
def test_the_core_of_the_sizes_of_models(features: int, core: int | None) -> None:
    assert sloane.core_of(features) == core


def test_blocks_are_transformed_on_their_own() -> None:
    v = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    whole = torch.cat([sloane.transform(part, 12, 24) for part in v.split(24, 1)], 1)
    torch.testing.assert_close(sloane.transform(v, 12, 24), whole)


def test_codewords_in_the_order_of_our_own_format() -> None:
    """|A| in the place of our table, and signs by `e8p_own_signs`, make the same codewords."""
    codes = torch.arange(1 << 16, dtype=torch.int32)
    signs = quip_codes.e8p_own_signs(codes)
    table = quip_codes.e8p_base().abs().int()
    table[(table.sum(1) // 2) % 2 == 1, 0] *= -1
    bits = (signs[:, None] >> torch.arange(8)) & 1
    parity = bits.sum(1, keepdim=True) & 1
    bits[:, :1] ^= parity
    own = (2 * table[codes >> 8] * (1 - 2 * bits) + 1 - 2 * parity).float() / 4
    assert torch.equal(own, quip_codes.e8p_codewords())


def test_only_the_vectors_of_norm_12_differ_from_ours() -> None:
    theirs = {tuple(row) for row in quip_codes.e8p_base().abs().tolist()}
    ours = {tuple(row) for row in abs_table().tolist()}
    assert len(theirs) == len(ours) == 256
    assert {sum(c * c for c in row) for row in theirs ^ ours} == {48}


def test_codewords_are_all_different() -> None:
    for table in (
        quip_codes.e8p_codewords(),
        quip_codes.e81b_codewords(),
        quip_codes.d4_codewords(),
    ):
        assert len(table.unique(dim=0)) == len(table)
