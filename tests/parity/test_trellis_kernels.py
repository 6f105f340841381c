"""The kernels of trellis-v1 and trellis-v2 against their references."""

from itertools import product

import pytest
import torch

from tests.support.kernels import assert_no_worse, plain_product, random_activations, random_tensors
from tests.support.params import each_with_one_of, slow, slow_but
from vqllm_kernels import activations, dispatch, formats, gpu
from vqllm_kernels.trellis import reference
from vqllm_kernels.trellis.reference import moments_of
from vqllm_kernels.trellis.spec import ParityTrellisSpec, TrellisSpec

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


def trellis(
    code: str = "bytes4", rate: float = 2, state_bits: int = 12, tile_rows: int = 64, **options
) -> TrellisSpec:
    return TrellisSpec(
        tile_rows=tile_rows,
        code=code,
        tile_bits=round(rate * 256),
        state_bits=state_bits,
        step_weights=options.get("step_weights", reference.WEIGHTS_OF_STEP.get(code, 1)),
        table_bits=9 if code == "hybrid" else 0,
    )


def parities(rate: float, masks: tuple[int, ...], tile_rows: int = 64) -> ParityTrellisSpec:
    return ParityTrellisSpec(
        tile_rows=tile_rows, tile_bits=round(rate * 256), state_bits=12, masks=masks
    )


SIX_MASKS = (0x1, 0x802, 0x5BA, 0xAC3, 0x925, 0xFFF)
SPECS = {
    "bytes4": trellis(),
    "bytes4, 3 bits, 2^16": trellis(rate=3, state_bits=16),
    "bytes4, 4.5 bits, 2^9": trellis(rate=4.5, state_bits=9),
    "bytes4, 1.25 bits, 16 rows": trellis(rate=1.25, tile_rows=16),
    "bytes4, 1.125 bits, 32 rows": trellis(rate=1.125, tile_rows=32),
    "bytes2": trellis("bytes2", state_bits=14),
    "bytes2, 1.75 bits": trellis("bytes2", 1.75, 14),
    "bytes2, 2.25 bits, 8 rows": trellis("bytes2", 2.25, 14, 8),
    "mul1": trellis("mul1"),
    "mul1, 5 bits": trellis("mul1", 5),
    "mul2": trellis("mul2", state_bits=16),
    "1mad, 2.5 bits": trellis("1mad", 2.5, 16, 16),
    "3inst": trellis("3inst", state_bits=16),
    "3inst, 3.5 bits, 16 rows": trellis("3inst", 3.5, 16, 16),
    "hybrid": trellis("hybrid", state_bits=16),
    "table": trellis("table", state_bits=8),
    "table, pairs": trellis("table", 3, 10, 16, step_weights=2),
    "gf2": parities(2, SIX_MASKS),
    "gf2, 4 bits, 7 masks, 16 rows": parities(4, (0x84F, *SIX_MASKS), 16),
}
QUICK = (
    "bytes4",
    "bytes4, 4.5 bits, 2^9",
    "bytes4, 1.125 bits, 32 rows",
    "bytes2, 2.25 bits, 8 rows",
    "mul1, 5 bits",
    "mul2",
    "1mad, 2.5 bits",
    "3inst, 3.5 bits, 16 rows",
    "hybrid",
    "table, pairs",
    "gf2, 4 bits, 7 masks, 16 rows",
)
"""Every code, and every kind of tile."""
SHAPES = [(37, 40, 3), (130, 72, 1), (64, 600, 9)]
"""(rows, cols, tokens): parts of tiles, more tile rows than one, more steps than one."""


def in_bytes(x_NC: torch.Tensor, spec: TrellisSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes int8 [N, parts, padded] of the activations, and their steps."""
    out = activations.quantized(x_NC, spec.kernels("triton").wanted(x_NC))
    return out.words.view(torch.int8), out.step


def check_matmul(
    spec: TrellisSpec | ParityTrellisSpec,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: str,
) -> None:
    rows, cols, num_tokens = shape
    tensors = random_tensors(spec, rows, cols, device)
    x_NC = random_activations(num_tokens, cols, dtype, device)
    W_RC = spec.decode(tensors, rows, cols)
    with dispatch.force("triton"):
        y_NR = dispatch.matmul(x_NC, tensors, spec, rows, cols)
    assert_no_worse(y_NR, plain_product(x_NC, W_RC), x_NC.double() @ W_RC.double().T)


@pytest.mark.parametrize(("name", "shape"), each_with_one_of(SPECS, SHAPES, QUICK))
def test_matmul_is_as_exact_as_torch(name, shape, half, device):
    check_matmul(SPECS[name], shape, half, device)


@pytest.mark.parametrize(
    ("name", "shape"),
    each_with_one_of(
        [n for n, s in SPECS.items() if s.code in reference.MULTIPLIERS], SHAPES, QUICK
    ),
)
def test_matmul_of_float32_is_as_exact_as_torch(name, shape, device):
    check_matmul(SPECS[name], shape, torch.float32, device)


@pytest.mark.parametrize(
    ("name", "shape_and_dtype"),
    each_with_one_of(SPECS, [*product(SHAPES[:2], (torch.float32, torch.float16))], QUICK),
)
def test_decode_equals_the_reference(name, shape_and_dtype, device):
    spec, ((rows, cols, _), out) = SPECS[name], shape_and_dtype
    tensors = random_tensors(spec, rows, cols, device)
    with dispatch.force("triton"):
        W_RC = dispatch.decode(tensors, spec, rows, cols, out)
    assert torch.equal(W_RC, spec.decode(tensors, rows, cols).to(out))


@pytest.mark.parametrize("num_tokens", slow_but([5, 17], [*range(1, 18), 33, 64]))
@pytest.mark.parametrize(("code", "rows"), [("bytes2", (24, 9)), ("3inst", (24,))])
def test_matmul_at_every_batch_size(code, rows, num_tokens, device):
    spec, cols = trellis(code, tile_rows=16), 48
    tensors = [random_tensors(spec, own, cols, device) for own in rows]
    x_NC = random_activations(num_tokens, cols, torch.float16, device)
    ys = spec.kernels("triton").matmuls(x_NC, tensors, rows, cols, torch.float16)
    for y_NR, own, num_rows in zip(ys, tensors, rows, strict=True):
        W_RC = spec.decode(own, num_rows, cols)
        assert_no_worse(y_NR, plain_product(x_NC, W_RC), x_NC.double() @ W_RC.double().T)


@pytest.mark.parametrize("multiprocessors", [1, 3, 1000])
@pytest.mark.parametrize("code", ["bytes2", slow("table")])
def test_matmul_in_one_and_in_many_pieces(code, multiprocessors, device, monkeypatch):
    monkeypatch.setattr(gpu, "num_multiprocessors", lambda device: multiprocessors)
    check_matmul(trellis(code), (70, 500, 2), torch.float16, device)


@pytest.mark.parametrize(
    "code", slow_but(["bytes2", "hybrid"], ["bytes2", "bytes4", "hybrid", "3inst"])
)
def test_members_get_what_they_get_alone(code, device, monkeypatch):
    # Every piece is a step, alone as together; the second member has two programs.
    monkeypatch.setattr(gpu, "num_multiprocessors", lambda device: 1000)
    spec, rows, cols = trellis(code, tile_rows=16), (37, 133, 1), 260
    tensors = [random_tensors(spec, own, cols, device) for own in rows]
    x_NC = random_activations(3, cols, torch.float16, device)
    kernels = spec.kernels("triton")
    together = kernels.matmuls(x_NC, tensors, rows, cols, torch.float32)
    for y_NR, own, num_rows in zip(together, tensors, rows, strict=True):
        [alone] = kernels.matmuls(x_NC, [own], [num_rows], cols, torch.float32)
        assert torch.equal(y_NR, alone)


def test_sums_of_bytes_are_exact_integers(device):
    """What the kernel adds to is what torch computes from the same bytes in int64, to the bit."""
    rows, cols = 64, 256
    spec = trellis("bytes2", state_bits=14)
    tensors = random_tensors(spec, rows, cols, device) | {"scale": torch.ones(1, device=device)}
    x_NC = random_activations(2, cols, torch.float16, device)
    with dispatch.force("triton"):
        y_NR = dispatch.matmul(x_NC.half(), tensors, spec, rows, cols)
    q, step_N2 = in_bytes(x_NC, spec)
    hi_NC, lo_NC = q.long().unbind(1)
    codes = tensors["codes"].to(torch.int32) & 0xFFFF
    state = reference.states(codes, spec.tile_bits, spec.state_bits, 128).long()
    sums = reference.byte_sums("bytes2", state).flatten(-2)
    S_RC = sums.unflatten(-1, spec.tile).transpose(1, 2).flatten(2).flatten(0, 1)
    high, low = ((part.cpu() @ S_RC.cpu().T).float().to(device) for part in (hi_NC, lo_NC))
    exact = (high * 256 + low) * step_N2[:, :1] + step_N2[:, 1:]
    assert torch.equal(y_NR, exact.half())


def test_float32_activations_keep_thirty_two_bits(device):
    spec = trellis()
    x_NC = random_activations(3, 100, torch.float32, device)
    q, step_N2 = in_bytes(x_NC, spec)
    parts = q.double()
    integers = ((parts[:, 0] * 256 + parts[:, 1]) * 256 + parts[:, 2]) * 256 + parts[:, 3]
    assert float(integers.abs().max()) == activations.LEVELS[4]
    deviation = moments_of("bytes4", 12).deviations[0]
    back = integers[:, :100] * step_N2[:, :1].double() * deviation
    torch.testing.assert_close(back, x_NC.double(), rtol=4e-7, atol=1e-8)


def test_activations_keep_sixteen_bits(device):
    spec = trellis()
    x_NC = random_activations(3, 98, torch.float16, device)
    q, step_N2 = in_bytes(x_NC, spec)
    hi, lo = q.float().unbind(1)
    integers = 256 * hi + lo
    assert float(integers.abs().max()) == activations.LEVELS[2]
    assert integers.shape == (3, 100)
    assert not bool(integers[:, 98:].any())
    deviation = moments_of("bytes4", 12).deviations[0]
    error = (integers[:, :98] * step_N2[:, :1] * deviation - x_NC.float()).abs()
    assert bool((error <= 0.501 * step_N2[:, :1] * deviation).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad, device):
    spec = trellis()
    tensors = random_tensors(spec, 64, 64, device)
    x_NC = random_activations(2, 64, torch.float16, device)
    x_NC[1, 5] = bad
    with dispatch.force("triton"):
        y_NR = dispatch.matmul(x_NC, tensors, spec, 64, 64)
    assert bool(y_NR[0].isfinite().all())
    assert bool(y_NR[1].isnan().all())


def test_zeros_give_zeros(device):
    spec = trellis()
    tensors = random_tensors(spec, 64, 64, device)
    with dispatch.force("triton"):
        y_NR = dispatch.matmul(
            torch.zeros(1, 64, dtype=torch.float16, device=device), tensors, spec, 64, 64
        )
    assert not bool(y_NR.any())


def test_no_tokens_give_no_outputs(device):
    spec = trellis()
    tensors = random_tensors(spec, 64, 64, device)
    x_NC = torch.zeros(2, 0, 64, dtype=torch.float16, device=device)
    with dispatch.force("triton"):
        assert dispatch.matmul(x_NC, tensors, spec, 64, 64).shape == (2, 0, 64)


def test_codes_at_an_odd_address(device):
    spec = trellis("bytes2", state_bits=14)
    tensors = random_tensors(spec, 64, 64, device)
    storage = torch.zeros(1 + tensors["codes"].numel(), dtype=torch.int16, device=device)
    storage[1:] = tensors["codes"].flatten()
    moved = tensors | {"codes": storage[1:].view(tensors["codes"].shape)}
    x_NC = random_activations(1, 64, torch.float16, device)
    with dispatch.force("triton"):
        y_NR = dispatch.matmul(x_NC, moved, spec, 64, 64)
        assert torch.equal(y_NR, dispatch.matmul(x_NC, tensors, spec, 64, 64))


def test_results_repeat_bit_for_bit(device):
    spec = trellis("bytes2", state_bits=14)
    tensors = random_tensors(spec, 192, 512, device)
    x_NC = random_activations(2, 512, torch.float16, device)
    with dispatch.force("triton"):
        first = dispatch.matmul(x_NC, tensors, spec, 192, 512)
        for _ in range(2 if device == "cpu" else 20):
            assert torch.equal(first, dispatch.matmul(x_NC, tensors, spec, 192, 512))


def test_a_stage_of_a_residual(device):
    stages = [trellis("bytes2", 2, 14).to_dict(), trellis("bytes4", 1.5, 12).to_dict()]
    spec = formats.from_dict({"format": "residual-v1", "stages": stages})
    tensors = random_tensors(spec, 64, 64, device)
    x_NC = random_activations(2, 64, torch.float16, device)
    W_RC = spec.decode(tensors, 64, 64)
    with dispatch.force("triton"):
        assert torch.equal(dispatch.decode(tensors, spec, 64, 64), W_RC)
        y_NR = dispatch.matmul(x_NC, tensors, spec, 64, 64)
    assert_no_worse(y_NR, plain_product(x_NC, W_RC), x_NC.double() @ W_RC.double().T)


@pytest.mark.parametrize(
    ("spec", "given", "reason"),
    [
        (trellis(tile_rows=128), torch.float16, "tiles of 128 rows; the kernel takes 8 to 64"),
        (trellis(rate=2.0625), torch.float16, "2.0625 bits: not whole words"),
        (trellis("3inst"), torch.float32, "float32 activations with code 3inst"),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_take_is_said(spec, given, reason, device):
    tensors = random_tensors(spec, 128, 64, device)
    x_NC = torch.zeros(1, 64, dtype=given, device=device)
    with dispatch.force("triton"), pytest.raises(ValueError, match=reason):
        dispatch.matmul(x_NC, tensors, spec, 128, 64)
    assert dispatch.matmul(x_NC.float(), tensors, spec, 128, 64).shape == (1, 128)
