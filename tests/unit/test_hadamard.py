"""Transforms of every order: orthonormal, made of what is stored, done as defined."""

import hashlib

import pytest
import torch

from vqllm.core.hadamard import MIN_BLOCK, block_for
from vqllm_kernels.hadamard import matrices, reference
from vqllm_kernels.hadamard.galois import prime_power, quadratic_character
from vqllm_kernels.hadamard.matrices import factor, factors, is_hadamard, matrix, signs
from vqllm_kernels.hadamard.reference import transform

# Sides of linears in published models, and sizes that no construction serves.
FACTORS = {
    1: (1,),
    2: (2,),
    3: (3,),
    37: (37,),
    192: (12, 16),
    344: (172, 2),
    576: (36, 16),
    768: (12, 64),
    1376: (172, 8),
    1536: (12, 128),
    2304: (36, 64),
    2880: (180, 16),
    3072: (12, 256),
    4864: (76, 64),
    5504: (172, 32),
    5632: (44, 128),
    8192: (8192,),
    9728: (76, 128),
    10920: (13, 420, 2),
    11008: (172, 64),
    13696: (428, 32),
    14336: (28, 512),
    17408: (68, 256),
    18944: (148, 128),
    25600: (100, 256),
    28672: (28, 1024),
    29568: (84, 44, 8),
}
WITHOUT_HADAMARD = {3, 37, 10920}
# One of each construction, with prime and prime-power fields.
CORES = {
    "paley 1, prime": 12,
    "paley 1, 27": 28,
    "paley 1, 343": 344,
    "paley 2, prime": 36,
    "paley 2, 9": 20,
    "paley 2, 25": 52,
    "paley 2, 49": 100,
    "paley 2, 81": 164,
    "paley 2, 121": 244,
    "paley 2, 125": 252,
    "paley 2, 169": 340,
    "williamson 23": 92,
    "williamson 29": 116,
    "williamson 43": 172,
    "turyn 36": 428,
}


def gaussian(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("order", FACTORS)
def test_factors_multiply_to_the_order(order: int) -> None:
    sizes = factors(order)
    assert sizes == FACTORS[order]
    assert torch.tensor(sizes).prod() == order
    assert is_hadamard(order) == (order not in WITHOUT_HADAMARD)


@pytest.mark.parametrize("size", sorted({f for sizes in FACTORS.values() for f in sizes} - {8192}))
def test_every_factor_is_orthonormal(size: int) -> None:
    Q = factor(size)
    torch.testing.assert_close(Q @ Q.T, torch.eye(size, dtype=torch.float64), atol=1e-13, rtol=0)
    if size % 2 == 0 or size == 1:
        assert_hadamard(signs(size))


@pytest.mark.parametrize("order", CORES.values(), ids=CORES.keys())
def test_every_construction_is_a_hadamard_matrix(order: int) -> None:
    assert_hadamard(signs(order))


def test_every_order_up_to_512_is_a_hadamard_matrix_or_refused() -> None:
    refused = []
    for order in range(4, 513, 4):
        if is_hadamard(order):
            for size in factors(order):
                assert_hadamard(signs(size))
        else:
            refused.append(order)
    # Orders for which a Hadamard matrix is known, but by none of the constructions here.
    assert refused == [
        *(156, 188, 236, 260, 268, 292, 324, 356, 372, 376, 404, 412, 436, 452, 472, 476, 508)
    ]


def assert_hadamard(H: torch.Tensor) -> None:
    """H Hᵀ = n I, in exact integer arithmetic."""
    n = len(H)
    assert H.dtype == torch.int8
    assert bool((H.abs() == 1).all())
    products = H.double() @ H.double().T  # integers up to n: exact
    assert torch.equal(products, n * torch.eye(n, dtype=torch.float64))


def test_matrices_are_those_of_the_stored_format() -> None:
    """A change here makes every stored checkpoint with a Hadamard transform unreadable."""
    digest = hashlib.sha256()
    for order in [2, 16, *CORES.values()]:
        digest.update(signs(order).numpy().tobytes())
    assert digest.hexdigest() == (
        "35c4a3227d7ac8ee263c9331cb741e69365652b8624dbe8c5071936b6d5f976e"
    )
    torch.testing.assert_close(
        factor(3),
        torch.tensor(
            [[3**-0.5] * 3, [2**-0.5, 0, -(2**-0.5)], [6**-0.5, -2 * 6**-0.5, 6**-0.5]],
            dtype=torch.float64,
        ),
    )


@pytest.mark.parametrize("order", range(1, 200))
def test_every_small_order_has_a_flat_orthonormal_transform(order: int) -> None:
    Q = matrix(order)
    torch.testing.assert_close(Q @ Q.T, torch.eye(order, dtype=torch.float64), atol=1e-13, rtol=0)
    assert Q.abs().max() <= (2 / order) ** 0.5 + 1e-12
    if is_hadamard(order):
        torch.testing.assert_close(Q.abs(), torch.full_like(Q, order**-0.5))


@pytest.mark.parametrize("order", [0, -4])
def test_no_order_below_one(order: int) -> None:
    with pytest.raises(ValueError, match="at least 1 feature"):
        factors(order)


def test_unknown_core_is_refused() -> None:
    with pytest.raises(ValueError, match="no Hadamard factor of order 156"):
        signs(156)


@pytest.mark.parametrize("q", [3, 5, 9, 25, 27, 49, 81, 121, 125, 169, 243, 343])
def test_quadratic_character(q: int) -> None:
    chi = quadratic_character(q).double()
    assert torch.equal(chi.sum(1), torch.zeros(q).double())
    assert torch.equal(chi.T, chi if q % 4 == 1 else -chi)
    # Jacobsthal: Q Qᵀ = q I − J holds only for the characters of a field.
    expected = q * torch.eye(q, dtype=torch.float64) - 1
    assert torch.equal(chi @ chi.T, expected)


def test_character_needs_an_odd_prime_power() -> None:
    assert prime_power(343) == (7, 3)
    assert prime_power(15) is None
    for q in (15, 16, 1):
        with pytest.raises(ValueError, match="not an odd prime power"):
            quadratic_character(q)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("block", [1, 2, 3, 37, 44, 128, 192, 256, 344, 500, 576, 1092, 1536])
def test_transform_is_the_product_with_the_matrix(block: int, transpose: bool) -> None:
    Q = matrix(block)
    v = gaussian(3, 2, 2 * block)
    expected = v.unflatten(-1, (2, block)) @ (Q if transpose else Q.T)
    torch.testing.assert_close(
        transform(v, block, transpose), expected.flatten(-2), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("order", FACTORS)
def test_transpose_is_the_inverse(order: int) -> None:
    v = gaussian(2, order)
    y = transform(v, order)
    torch.testing.assert_close(y.norm(dim=1), v.norm(dim=1))
    torch.testing.assert_close(transform(y, order, transpose=True), v, atol=1e-11, rtol=0)


@pytest.mark.parametrize("order", [576, 1536, 13696])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_rounded_once(order: int, dtype: torch.dtype) -> None:
    v = gaussian(4, order, dtype=dtype)
    y = transform(v, order)
    assert y.dtype == dtype
    exact = transform(v.double(), order)
    unit = torch.finfo(dtype).eps / 2
    # Half a unit in the last place of y, and the float32 sums: 1e-5 of the vector's rms.
    assert bool(((y.double() - exact).abs() <= unit * exact.abs() + 1e-5).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_types_keep_their_precision(dtype: torch.dtype) -> None:
    v = gaussian(4, 1536, dtype=dtype)
    error = (transform(v, 1536).double() - transform(v.double(), 1536)).abs().max()
    assert error <= 20 * torch.finfo(dtype).eps


def test_chunks_and_strides_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    v = gaussian(10, 7, 576, dtype=torch.float32)
    whole = transform(v, 576)
    assert whole.is_contiguous()
    monkeypatch.setitem(reference.CHUNK_ELEMENTS, "cpu", 3 * 576)
    torch.testing.assert_close(transform(v, 576), whole, atol=1e-5, rtol=0)
    other_strides = v.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(transform(other_strides, 576), whole, atol=1e-5, rtol=0)
    assert transform(v[:0], 576).shape == (0, 7, 576)
    assert transform(v[0, 0], 576).shape == (576,)


def test_input_is_left_alone_and_the_result_repeats() -> None:
    v = gaussian(5, 192)
    before = v.clone()
    assert torch.equal(transform(v, 96), transform(v, 96))
    assert torch.equal(v, before)


def test_transform_is_differentiable_also_after_inference_mode() -> None:
    reference._stages.cache_clear()
    with torch.inference_mode():
        transform(gaussian(1, 60), 60)
    v = gaussian(2, 60).requires_grad_()
    g = gaussian(2, 60)
    (transform(v, 60) * g).sum().backward()
    torch.testing.assert_close(v.grad, transform(g, 60, transpose=True))


def test_transform_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="block of 7 does not divide 12 features"):
        transform(gaussian(2, 12), 7)
    with pytest.raises(ValueError, match="block of 0"):
        transform(gaussian(2, 12), 0)
    with pytest.raises(ValueError, match="floating-point"):
        transform(torch.ones(2, 12, dtype=torch.int32), 12)


def test_stages_are_moderate() -> None:
    """No product is wider than a core, a DCT or 128, whatever the order."""
    for order in FACTORS:
        largest = max(factors(order)[: len(factors(order)) - 1], default=1)
        for Q in reference._stages(order, torch.float32, torch.device("cpu")):
            assert len(Q) <= max(128, largest)


@pytest.mark.parametrize(
    ("size", "at_most", "block"),
    [
        (576, None, None),
        (576, 576, None),
        (576, 1024, None),
        (1536, 128, 128),
        (576, 128, 96),
        (576, 64, 64),
        (11008, 128, 128),
        (344, 128, None),  # 43·8: the largest divisor that has a Hadamard matrix is 8
        (37, 16, None),
    ],
)
def test_block_for(size: int, at_most: int | None, block: int | None) -> None:
    assert block_for(size, at_most) == block
    if block is not None:
        assert size % block == 0
        assert is_hadamard(block)
        assert block >= MIN_BLOCK


def test_large_odd_sizes_are_served_without_a_table() -> None:
    for order in (4 * 1009, 2 * 911, 1155, 3 * 5 * 7 * 11 * 16):
        v = gaussian(1, order)
        back = transform(transform(v, order), order, transpose=True)
        torch.testing.assert_close(back, v, atol=1e-11, rtol=0)
    assert max(matrices.factors(3 * 5 * 7 * 11 * 16)) <= matrices.WIDE_CORE
