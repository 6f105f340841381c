"""Decode and decode-matmul kernels against the reference of their format."""

from itertools import product

import pytest
import torch

from tests.support.kernels import assert_no_worse, plain_product, random_activations, random_tensors
from tests.support.params import each_with_one_of, slow, slow_but
from vqllm_kernels import activations, dispatch, formats, gpu
from vqllm_kernels.formats import FormatSpec

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


def lut(rows: int, cols: int, bits: int) -> dict:
    return {"format": "lut-v1", "tile_rows": rows, "tile_cols": cols, "index_bits": bits}


E8P, E81B = {"format": "e8p-v1"}, {"format": "e81b-v1"}
FORMATS = {
    "e8p": E8P,
    "e81b": E81B,
    "lut 1x8 8 bit": lut(1, 8, 8),
    "lut 1x4 8 bit": lut(1, 4, 8),
    "lut 1x2 8 bit": lut(1, 2, 8),
    "lut 1x1 8 bit": lut(1, 1, 8),
    "lut 8x1 8 bit": lut(8, 1, 8),
    "lut 2x4 8 bit": lut(2, 4, 8),
    "lut 1x8 12 bit": lut(1, 8, 12),
    "lut 6x1 12 bit": lut(6, 1, 12),
    "lut 3x1 12 bit": lut(3, 1, 12),
    "lut 1x8 16 bit": lut(1, 8, 16),
    "lut 4x1 16 bit": lut(4, 1, 16),
    "lut 16x1 11 bit": lut(16, 1, 11),
    "lut 12x1 12 bit": lut(12, 1, 12),
    "lut 1x4 5 bit": lut(1, 4, 5),
    "e8p + e8p": {"format": "residual-v1", "stages": [E8P, E8P]},
    "e8p + e81b": {"format": "residual-v1", "stages": [E8P, E81B]},
    "lut + lut": {"format": "residual-v1", "stages": [lut(1, 4, 8), lut(1, 4, 6)]},
}
SHAPES = [(37, 40, 3), (16, 344, 17), (8, 576, 1)]
"""(rows, cols, tokens): codes that are aligned to nothing, to a code, to 16 bytes."""
ONE_OF_A_KIND = ("e8p", "lut 1x8 8 bit", "e8p + e81b")
QUICK = (
    "e8p",
    "e81b",
    "lut 1x4 8 bit",
    "lut 8x1 8 bit",
    "lut 2x4 8 bit",
    "lut 6x1 12 bit",
    "lut 1x8 16 bit",
    "lut 16x1 11 bit",
    "e8p + e81b",
)
"""Every way in which codes are read, and every way in which they make tiles."""


def check_matmul(
    spec: FormatSpec, shape: tuple[int, int, int], dtype: torch.dtype, device: str
) -> None:
    rows, cols, num_tokens = shape
    tensors = random_tensors(spec, rows, cols, device)
    x_NC = random_activations(num_tokens, cols, dtype, device)
    W_RC = spec.decode(tensors, rows, cols)
    with dispatch.force("triton"):
        y_NR = dispatch.matmul(x_NC, tensors, spec, rows, cols)
    assert_no_worse(y_NR, plain_product(x_NC, W_RC), x_NC.double() @ W_RC.double().T)


@pytest.mark.parametrize(("name", "shape"), each_with_one_of(FORMATS, SHAPES, QUICK))
def test_matmul_is_as_exact_as_torch(name, shape, dtype, device):
    check_matmul(formats.from_dict(FORMATS[name]), shape, dtype, device)


@pytest.mark.parametrize(
    ("name", "shape_and_dtype"),
    each_with_one_of(FORMATS, [*product(SHAPES[:2], (torch.float32, torch.float16))], QUICK),
)
def test_decode_equals_the_reference(name, shape_and_dtype, device):
    spec, ((rows, cols, _), out) = formats.from_dict(FORMATS[name]), shape_and_dtype
    tensors = random_tensors(spec, rows, cols, device)
    with dispatch.force("triton"):
        W_RC = dispatch.decode(tensors, spec, rows, cols, out)
    assert torch.equal(W_RC, spec.decode(tensors, rows, cols).to(out))


@pytest.mark.parametrize("num_tokens", slow_but([4, 5, 17], [*range(1, 18), 33, 64]))
@pytest.mark.parametrize("values", [E8P, E81B], ids=str)
def test_matmul_at_every_batch_size(values, num_tokens, device):
    check_matmul(formats.from_dict(values), (24, 64, num_tokens), torch.float16, device)


@pytest.mark.parametrize("values", [E8P, E81B], ids=str)
@pytest.mark.parametrize("shape", [(37, 93, 3), (1, 25, 1), (130, 608, 8), (5, 9088, 5)], ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_matmul_in_bytes(values, shape, multiprocessors, device, monkeypatch):
    monkeypatch.setattr(gpu, "num_multiprocessors", lambda device: multiprocessors)
    spec = formats.from_dict(values)
    assert spec.kernels("triton").wanted(torch.zeros(shape[2], shape[1], dtype=torch.float16))
    check_matmul(spec, shape, torch.float16, device)


@pytest.mark.parametrize("values", [E8P, E81B], ids=str)
def test_sums_in_bytes_are_exact(values, device):
    """The product of the integers and the weights, with one rounding or two at the end."""
    spec = formats.from_dict(values)
    tensors = random_tensors(spec, 48, 192, device)
    x_NC = random_activations(3, 192, torch.float16, device)
    x_NC[1] += 8  # what is left when a large mean is taken away
    kernels = spec.kernels("triton")
    quantized = activations.quantized(x_NC, kernels.wanted(x_NC))
    [y_NR] = kernels.matmuls(quantized, [tensors], [48], 192, torch.float32)
    hi, lo = quantized.words.view(torch.int8).double().unbind(1)
    W_RC = spec.decode(tensors, 48, 192).double()
    exact = (256 * hi + lo) @ W_RC.T * quantized.step[:, :1]
    torch.testing.assert_close(
        y_NR.double(), exact, rtol=1e-6, atol=4e-6 * float(exact.abs().max())
    )


def test_what_is_not_taken_in_bytes():
    kernels = formats.from_dict(E8P).kernels("triton")

    def takes(num_tokens: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        return kernels.wanted(torch.zeros(num_tokens, cols, dtype=dtype)) is not None

    assert takes(8, 4096)
    assert not takes(9, 4096)
    assert not takes(1, 4096, torch.float32)
    assert not takes(1, 4104)  # 513 codes: not whole words of 32 bits
    assert not takes(1, 1 << 17)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_not_finite_stays_so(device):
    spec = formats.from_dict(E8P)
    tensors = random_tensors(spec, 16, 64, device)
    x_NC = random_activations(2, 64, torch.float16, device)
    x_NC[1, 5] = float("inf")
    with dispatch.force("triton"):
        y_NR = dispatch.matmul(x_NC, tensors, spec, 16, 64)
    assert bool(y_NR[0].isfinite().all())
    assert bool(y_NR[1].isnan().all())


@pytest.mark.parametrize("values", [E8P, E81B, lut(1, 8, 8), lut(1, 4, 12)], ids=str)
def test_matmul_walks_over_long_rows(values, device):
    # Eight warps take 2048 columns a step at least.
    check_matmul(formats.from_dict(values), (5, 9000, 2), torch.float32, device)


@pytest.mark.parametrize("values", [E8P, lut(1, 8, 8)], ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_matmul_with_small_and_large_tiles(values, multiprocessors, device, monkeypatch):
    monkeypatch.setattr(gpu, "num_multiprocessors", lambda device: multiprocessors)
    check_matmul(formats.from_dict(values), (70, 64, 2), torch.float16, device)


@pytest.mark.parametrize(
    ("name", "num_tokens"),
    [
        ("e8p", 2),
        ("e8p", 9),
        slow("lut 1x8 8 bit", 2),
        ("lut 6x1 12 bit", 2),
        slow("e8p + e81b", 2),
    ],
)
def test_members_get_what_they_get_alone(name, num_tokens, device, monkeypatch):
    monkeypatch.setattr(gpu, "num_multiprocessors", lambda device: 1000)
    spec, rows = formats.from_dict(FORMATS[name]), (19, 8, 33)
    tensors = [random_tensors(spec, own, 64, device) for own in rows]
    x_NC = random_activations(num_tokens, 64, torch.float16, device)
    kernels = spec.kernels("triton")
    together = kernels.matmuls(x_NC, tensors, rows, 64, torch.float32)
    for y_NR, own, num_rows in zip(together, tensors, rows, strict=True):
        [alone] = kernels.matmuls(x_NC, [own], [num_rows], 64, torch.float32)
        assert torch.equal(y_NR, alone)


@pytest.mark.parametrize("values", [E8P, E81B], ids=str)
def test_every_code_decodes_exactly(values, device):
    spec = formats.from_dict(values)
    if spec.format_id == "e8p-v1":
        codes = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(64, 1024)
    else:
        codes = torch.arange(256).to(torch.uint8).view(4, 64)
    rows, cols = len(codes), 8 * codes.shape[1]
    tensors = {"codes": codes.to(device), "scale": torch.tensor([0.7], device=device)}
    with dispatch.force("triton"):
        W_RC = dispatch.decode(tensors, spec, rows, cols)
    assert torch.equal(W_RC, spec.decode(tensors, rows, cols))


def test_codes_at_an_odd_address(device):
    spec = formats.from_dict(E8P)
    tensors = random_tensors(spec, 8, 64, device)
    storage = torch.zeros(1 + 8 * 8, dtype=torch.int16, device=device)
    storage[1:] = tensors["codes"].flatten()
    tensors["codes"] = storage[1:].view(8, 8)
    W_RC = spec.decode(tensors, 8, 64)
    for dtype in (torch.float32, torch.float16):
        x_NC = random_activations(1, 64, dtype, device)
        with dispatch.force("triton"):
            y_NR = dispatch.matmul(x_NC, tensors, spec, 8, 64)
        assert_no_worse(y_NR, plain_product(x_NC, W_RC), x_NC.double() @ W_RC.double().T)


def test_activations_that_are_not_contiguous(device):
    spec = formats.from_dict(E8P)
    tensors = random_tensors(spec, 8, 64, device)
    x_NC = random_activations(64, 3, torch.float32, device).T
    with dispatch.force("triton"):
        y_NR = dispatch.matmul(x_NC, tensors, spec, 8, 64)
        same = dispatch.matmul(x_NC.contiguous(), tensors, spec, 8, 64)
    assert torch.equal(y_NR, same)


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_no_tokens_give_no_outputs(name, device):
    spec = formats.from_dict(FORMATS[name])
    tensors = random_tensors(spec, 8, 64, device)
    x_NC = torch.zeros(2, 0, 64, dtype=torch.float16, device=device)
    with dispatch.force("triton"):
        assert dispatch.matmul(x_NC, tensors, spec, 8, 64).shape == (2, 0, 8)


@pytest.mark.parametrize("name", slow_but(ONE_OF_A_KIND[:2], FORMATS))
def test_results_repeat_bit_for_bit(name, device):
    spec = formats.from_dict(FORMATS[name])
    tensors = random_tensors(spec, 48, 512, device)
    x_NC = random_activations(2, 512, torch.float16, device)
    with dispatch.force("triton"):
        first = dispatch.matmul(x_NC, tensors, spec, 48, 512)
        for _ in range(2 if device == "cpu" else 20):
            assert torch.equal(first, dispatch.matmul(x_NC, tensors, spec, 48, 512))
