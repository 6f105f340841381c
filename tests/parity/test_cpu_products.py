"""Products with codes as they are stored on a CPU, against the definition of their formats.

Every set of instructions that this processor has is tried, and has the same result to the bit.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.params import slow, slow_but
from vqllm_kernels import dispatch
from vqllm_kernels.cpu import bound, instructions, threads
from vqllm_kernels.e8p.spec import E8PSpec, E81BSpec
from vqllm_kernels.formats import FormatSpec
from vqllm_kernels.kernels import Call
from vqllm_kernels.linear import BoundLinear, LinearSpec
from vqllm_kernels.lut.spec import LutSpec
from vqllm_kernels.residual.spec import ResidualSpec
from vqllm_kernels.transforms import HadamardSpec, ScaleSpec
from vqllm_kernels.trellis import reference
from vqllm_kernels.trellis.spec import ParityTrellisSpec, PlacedTrellisSpec, TrellisSpec

SETS = instructions.available()


def byte_sums(code: str, rate: float, state_bits: int, tile_rows: int = 64) -> TrellisSpec:
    return TrellisSpec(
        tile_rows=tile_rows,
        code=code,
        tile_bits=int(256 * rate),
        state_bits=state_bits,
        step_weights=reference.WEIGHTS_OF_STEP.get(code, 1),
    )


def parities(
    rate: float, state_bits: int, table_bits: int = 6, tile_rows: int = 64
) -> ParityTrellisSpec:
    generator = torch.Generator().manual_seed(1)
    masks = torch.randint(1, 1 << state_bits, (table_bits,), generator=generator)
    return ParityTrellisSpec(
        tile_rows=tile_rows,
        tile_bits=int(256 * rate),
        state_bits=state_bits,
        masks=tuple(masks.tolist()),
    )


def placed(rate: float, tile_rows: int = 16) -> PlacedTrellisSpec:
    return PlacedTrellisSpec(
        tile_rows=tile_rows,
        code="mul1",
        tile_bits=int(256 * rate),
        state_bits=16,
        places=(0, 3, 7, 1, 2, 4, 5, 6),
    )


RATES = (1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75, 4)
EVERY: dict[str, FormatSpec] = {
    **{f"bytes2 {rate}": byte_sums("bytes2", rate, 14) for rate in RATES[:7]},
    **{f"bytes4 {rate}": byte_sums("bytes4", rate, 12) for rate in RATES},
    **{f"gf2 {rate}": parities(rate, 12, 6 if rate < 2.5 else 7) for rate in RATES},
    "mul1 2, 2^16": byte_sums("mul1", 2, 16, 16),
    "mul1 3.5, 2^16": byte_sums("mul1", 3.5, 16),
    "mul2 1.5": byte_sums("mul2", 1.5, 13),
    "1mad 3.5": byte_sums("1mad", 3.5, 15, 32),
    "bytes4 4, head": byte_sums("bytes4", 4, 12, 16),
    "gf2 4, head": parities(4, 12, 7, 16),
    "gf2 2, 2^8": parities(2, 8),
    "gf2 2, 2^16": parities(2, 16),
    "gf2 3, few entries": parities(3, 12, 3),
    **{f"placed {rate}": placed(rate) for rate in (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)},
    "placed 3, 32 rows": placed(3, 32),
    "e8p": E8PSpec(),
    "e81b": E81BSpec(),
    "codebook 1 x 4, 8 bits": LutSpec(tile_rows=1, tile_cols=4, index_bits=8),
    "codebook 1 x 1, 3 bits": LutSpec(tile_rows=1, tile_cols=1, index_bits=3),
    "codebook 1 x 2, 7 bits": LutSpec(tile_rows=1, tile_cols=2, index_bits=7),
    "codebook 1 x 3, 6 bits": LutSpec(tile_rows=1, tile_cols=3, index_bits=6),
    "codebook 1 x 8, twice": ResidualSpec(
        stages=2 * (LutSpec(tile_rows=1, tile_cols=8, index_bits=8),)
    ),
    "e8p, e81b": ResidualSpec(stages=(E8PSpec(), E81BSpec())),
    "e8p twice": ResidualSpec(stages=(E8PSpec(), E8PSpec())),
}
QUICK = (
    "bytes2 2",
    "placed 2.5",
    "bytes4 2.5",
    "gf2 4, head",
    "e8p twice",
    "codebook 1 x 3, 6 bits",
)
"""Compiling is what takes time here, so that other tests take these formats too."""
SHAPES = ((70, 130), (129, 36), (33, 64))
"""Rows and columns that fit no tile."""


def values_of(spec: FormatSpec, rows: int, cols: int) -> dict[str, Tensor]:
    """Random stored tensors."""
    generator = torch.Generator().manual_seed(rows)
    tensors = {}
    for name, layout in spec.layout(rows, cols).items():
        if layout.dtype == torch.float16:
            tensors[name] = torch.randn(layout.shape, generator=generator).half()
        elif layout.dtype == torch.uint8:
            tensors[name] = torch.randint(
                0, 256, layout.shape, generator=generator, dtype=torch.uint8
            )
        elif layout.dtype == torch.float32:
            # Weights of trellis-v3 lie between two of bfloat16: another scale would round them.
            is_exact = isinstance(spec, PlacedTrellisSpec)
            tensors[name] = torch.full(layout.shape, 1.0 if is_exact else 0.02)
        else:
            low, high = (-(1 << 15), 1 << 15) if layout.dtype == torch.int16 else (-127, 128)
            tensors[name] = torch.randint(
                low, high, layout.shape, generator=generator, dtype=layout.dtype
            )
    return tensors


def activations(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(cols)
    return torch.randn(rows, cols, generator=generator).to(dtype)


def product(spec: FormatSpec, x: Tensor, tensors: dict[str, Tensor], rows: int) -> Tensor:
    """In float32, so that what is compared is not rounded."""
    [y] = spec.kernels("packed").matmuls(x, [tensors], [rows], x.shape[1], torch.float32)
    return y


@pytest.mark.parametrize("name", slow_but(QUICK, EVERY))
def test_equals_the_definition_on_every_set_of_instructions(name: str) -> None:
    spec = EVERY[name]
    for rows, cols in SHAPES:
        tensors = values_of(spec, rows, cols)
        W = spec.decode(tensors, rows, cols).double()
        for num_rows in (1, 3):
            x = activations(num_rows, cols, torch.float32)
            found = []
            for name_of_set in SETS:
                with instructions.force(name_of_set):
                    found.append(product(spec, x, tensors, rows))
            expected = x.double() @ W.T
            assert (found[0] - expected).norm() < 1e-4 * expected.norm(), (rows, cols, num_rows)
            assert all(torch.equal(y, found[0]) for y in found), (rows, cols, num_rows)


@pytest.mark.parametrize("name", slow_but(QUICK, EVERY))
def test_many_rows_are_multiplied_with_panels_of_bfloat16(name: str) -> None:
    spec, (rows, cols) = EVERY[name], SHAPES[0]
    tensors = values_of(spec, rows, cols)
    W = spec.decode(tensors, rows, cols)
    found = []
    for name_of_set in SETS:
        with instructions.force(name_of_set):
            found.append(product(spec, torch.eye(cols, dtype=torch.bfloat16), tensors, rows).T)
    # Each stage is rounded, and each sum of them.
    roundings = 1 + len(spec.stages) if isinstance(spec, ResidualSpec) else 2
    assert torch.equal(found[0], W.bfloat16().float()) or (
        (found[0] - W).abs().max() <= roundings * 2**-9 * W.abs().max()
    )
    assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize("name", ["bytes2 2", slow("bytes4 2.5"), slow("gf2 2")])
def test_a_row_has_the_same_result_alone_and_among_others(name: str) -> None:
    spec = EVERY[name]
    tensors = values_of(spec, 70, 130)
    x = activations(16, 130)
    together = product(spec, x, tensors, 70)
    for n in (1, 2, 3, 7, 16):
        assert torch.equal(product(spec, x[:n], tensors, 70), together[:n])


@pytest.mark.parametrize("name", slow_but((), EVERY))
def test_up_to_17_rows_on_every_set_of_instructions(name: str) -> None:
    spec, (rows, cols) = EVERY[name], (37, 100)
    tensors = values_of(spec, rows, cols)
    x = activations(17, cols)
    expected = x.double() @ spec.decode(tensors, rows, cols).double().T
    for number in range(1, 18):
        found = []
        for name_of_set in SETS:
            with instructions.force(name_of_set):
                # Panels, which more than 16 rows take, are bfloat16.
                own = x[:number].float() if number <= 16 else x
                found.append(product(spec, own, tensors, rows))
        allowed = 1e-4 if number <= 16 else 1e-2
        assert (found[0] - expected[:number]).norm() < allowed * expected[:number].norm()
        assert all(torch.equal(y, found[0]) for y in found), number


@pytest.mark.slow
def test_the_largest_activations_and_weights_do_not_overflow() -> None:
    """With so many columns that sums have to be added in between."""
    cols = 16384
    for name in ("gf2 2", "codebook 1 x 8, twice", "e8p"):
        spec = EVERY[name]
        tensors = values_of(spec, 8, cols)
        tensors = {
            key: torch.full_like(t, 127 if key == "table" else 8.0) if "codes" not in key else t
            for key, t in tensors.items()
        }
        x = torch.ones(1, cols)
        expected = x.double() @ spec.decode(tensors, 8, cols).double().T
        for name_of_set in ("avx2", "portable"):
            if name_of_set in SETS:
                with instructions.force(name_of_set):
                    y = product(spec, x, tensors, 8)
                assert (y - expected).abs().max() <= 1e-4 * expected.abs().max(), name


@pytest.mark.parametrize("name", ["bytes2 2", slow("gf2 2")])
def test_the_number_of_threads_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "worth", lambda: 1)
    spec = EVERY[name]
    tensors = values_of(spec, 640, 640)
    before = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found += [
                product(spec, activations(1, 640), tensors, 640),
                product(spec, activations(5, 640), tensors, 640),
            ]
    finally:
        torch.set_num_threads(before)
    for i in (2, 4):
        assert torch.equal(found[i], found[0])
        assert torch.equal(found[i + 1], found[1])


@pytest.mark.parametrize("policy", ["", "active", "PASSIVE"])
def test_threads_that_sleep_are_woken_for_larger_products(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    wanted = threads.WORTH_WAKING if policy == "PASSIVE" else threads.WORTH_WAITING
    assert threads.worth.__wrapped__() == wanted


def whole(rows: int, cols: int, spec: FormatSpec) -> tuple[LinearSpec, dict[str, Tensor]]:
    """A linear with the transforms of the default recipes."""
    transforms = (
        ScaleSpec(side="in", size=cols),
        ScaleSpec(side="out", size=rows),
        HadamardSpec(side="in", size=cols),
        HadamardSpec(side="out", size=rows),
    )
    linear = LinearSpec(rows=rows, cols=cols, format=spec, transforms=transforms)
    tensors = {}
    generator = torch.Generator().manual_seed(3)
    for name, layout in linear.layout().items():
        if layout.dtype == torch.float16:
            tensors[name] = (torch.rand(layout.shape, generator=generator) + 0.5).half()
        elif layout.dtype == torch.uint8:
            tensors[name] = torch.randint(
                0, 256, layout.shape, generator=generator, dtype=torch.uint8
            )
    return linear, tensors | values_of(spec, rows, cols)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "cols"), [(192, 576), (64, 70), (96, 20)])
def test_a_whole_linear_is_as_exact_as_its_dense_weights(
    rows: int, cols: int, dtype: torch.dtype
) -> None:
    linear, tensors = whole(rows, cols, EVERY["bytes2 2"])
    made = bound.linears_of([BoundLinear.of(linear, tensors)])
    assert not isinstance(made, str)
    W = linear.dequantize(tensors, torch.float64)
    for num_rows in (1, 4, 40):
        x = activations(num_rows, cols, dtype)
        ys = made(x)
        assert ys is not None
        expected = x.double() @ W.T
        allowed = (x @ W.to(dtype).T).double() - expected
        assert ys[0].dtype == dtype
        assert (ys[0].double() - expected).norm() < 2 * allowed.norm()


def test_linears_of_one_input_have_what_each_has_alone() -> None:
    """Of different formats, one of them a sum of two."""
    cols = 130
    every = [
        whole(rows, cols, EVERY[name]) for rows, name in ((70, "bytes2 2"), (33, "gf2 4, head"))
    ]
    for i in range(1, len(every)):  # the signs and scales of the input are shared
        shared = {k: v for k, v in every[0][1].items() if k.startswith(("t0_", "t2_"))}
        every[i] = every[i][0], every[i][1] | shared
    linears = [BoundLinear.of(*one) for one in every]
    together = bound.linears_of(linears)
    assert not isinstance(together, str)
    x = activations(2, cols)
    ys = together(x)
    assert ys is not None
    for linear, y in zip(linears, ys, strict=True):
        alone = bound.linears_of([linear])
        assert not isinstance(alone, str)
        own = alone(x)
        assert own is not None
        assert torch.equal(own[0], y)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [1, 20])
def test_activations_that_are_not_finite_have_results_that_are_not(value: float, rows: int) -> None:
    linear, tensors = whole(70, 130, EVERY["bytes2 2"])
    x = activations(rows, 130)
    x[0, 5] = value
    y = dispatch.linear(x, tensors, linear)
    assert not y[0].isfinite().any()
    assert y[1:].isfinite().all()


@pytest.mark.parametrize("factor", [0, 1e-30, 1e30])
def test_the_magnitude_of_activations_does_not_matter(factor: float) -> None:
    linear, tensors = whole(70, 130, EVERY["bytes2 2"])
    x = activations(1, 130) * factor
    expected = x.double() @ linear.dequantize(tensors, torch.float64).T
    y = dispatch.linear(x, tensors, linear).double()
    assert (y - expected).norm() <= 0.01 * expected.norm()


def test_why_calls_are_declined() -> None:
    def reason(spec: FormatSpec, dtype: torch.dtype = torch.bfloat16) -> str | None:
        cpu = torch.device("cpu")
        call = Call(operation="matmul", spec=spec, device=cpu, dtype=dtype, batch=1)
        return spec.kernels("packed").declines(call)

    assert reason(EVERY["bytes2 2"]) is None
    assert "has more digits" in str(reason(EVERY["bytes2 2"], torch.float32))
    assert "tiles of 4 rows" in str(reason(byte_sums("bytes2", 2, 14, 4)))
    assert "no sum of bytes" in str(reason(byte_sums("3inst", 2, 14)))
    assert "2^8 entries" in str(reason(parities(2, 12, 8)))
    assert "32 bits that are read at once" in str(reason(parities(4, 16, 6, 16)))
    with instructions.force("portable"):
        assert reason(EVERY["bytes2 2"]) is None


SKYLAKE = [
    "sse3",
    "ssse3",
    "sse4.1",
    "sse4.2",
    "popcnt",
    "avx",
    "avx2",
    "fma",
    "bmi",
    "bmi2",
    "lzcnt",
    "f16c",
    "movbe",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx512cd",
]
"""AVX-512 as the first processors had it, without VBMI, VNNI and GFNI."""


def test_the_first_avx_512_takes_avx2_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(instructions.VARIABLE, raising=False)
    monkeypatch.setattr(instructions, "features", lambda: frozenset(SKYLAKE))
    instructions._chosen.cache_clear()
    dispatch.forget()
    try:
        assert instructions.instructions() == "avx2"
        x = torch.empty(1, 64, dtype=torch.bfloat16)
        for name in ("gf2 2", "e8p", "e81b", "codebook 1 x 2, 7 bits"):
            assert dispatch.multiplied_packed(EVERY[name], torch.bfloat16)
            dispatch.choose(x, EVERY[name])
        told = "instructions: avx2, without avx512vbmi, avx512vnni, gfni of AVX-512"
        assert [(c.implementation, c.reason) for c in dispatch.choices()] == 4 * [
            ("packed", f"first choice; {told}")
        ]
        assert not dispatch.multiplied_packed(EVERY["codebook 1 x 1, 3 bits"], torch.bfloat16)
    finally:
        instructions._chosen.cache_clear()
        dispatch.forget()


@pytest.mark.slow
def test_the_first_avx_512_has_the_same_products(tmp_path: Path) -> None:
    if "avx512" not in SETS:
        pytest.skip("this processor has no AVX-512")
    code = (
        "import torch\n"
        "from tests.parity.test_cpu_products import EVERY, activations, product, values_of\n"
        "from vqllm_kernels.cpu import instructions\n"
        "assert instructions.instructions() == 'avx2'\n"
        "for name in ('gf2 2', 'gf2 2.25', 'bytes4 3', 'e8p', 'codebook 1 x 3, 6 bits'):\n"
        "    tensors = values_of(EVERY[name], 70, 130)\n"
        "    y = product(EVERY[name], activations(2, 130), tensors, 70)\n"
        f"    torch.save(y, {str(tmp_path)!r} + '/' + name)\n"
    )
    own = {
        "NUMBA_CPU_NAME": "skylake-avx512",
        "NUMBA_CPU_FEATURES": ",".join(f"+{f}" for f in SKYLAKE),
    }
    subprocess.run([sys.executable, "-c", code], env=os.environ | own, check=True)
    for path in tmp_path.iterdir():
        tensors = values_of(EVERY[path.name], 70, 130)
        assert torch.equal(
            torch.load(path), product(EVERY[path.name], activations(2, 130), tensors, 70)
        )


@pytest.mark.parametrize(
    ("value", "message"),
    [("sse9", "allowed are avx512, avx2, portable"), ("avx512", "this processor lacks")],
)
def test_a_set_that_is_unknown_or_missing_is_refused(value: str, message: str) -> None:
    code = "from vqllm_kernels.cpu import instructions; instructions.instructions()"
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "VQLLM_CPU": value}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | plain, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert message in done.stderr
