"""The kernels of the Hadamard transform against its reference."""

import pytest
import torch

from tests.support.kernels import assert_no_worse, plain_product, random_activations
from tests.support.params import slow
from vqllm_kernels import dispatch
from vqllm_kernels.hadamard import kernels
from vqllm_kernels.transforms import HadamardSpec, ScaleSpec

pytestmark = pytest.mark.usefixtures("poisoned")

SIZES = [
    (1, None),
    (16, None),
    (37, None),
    (40, None),
    (128, None),
    (576, None),
    (576, 64),
    (688, 344),
    (129, None),
    (260, None),
    (4096, None),
]
"""(features, block): dense Sylvester, DCT and core; one pass with every kind of factor."""
BYTES_SIZES = [
    (1, None),
    (37, None),
    (96, 32),
    (128, None),
    (86, 43),
    (304, None),
    (576, 64),
    (1536, None),
    (4096, 128),
    (8192, None),
]


def random_signs(size: int, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    return {name: t.to(device) for name, t in HadamardSpec.pack_signs(signs).items()}


def check(spec: HadamardSpec, num_tokens: int, dtype: torch.dtype, device: str, direction: str):
    tensors = random_signs(spec.size, device)
    v = random_activations(num_tokens, spec.size, dtype, device)
    run = spec.input if direction == "input" else spec.output
    with dispatch.force("triton"):
        out = dispatch.transform(v, spec, tensors, direction)
    # Stricter than a product in the dtype itself: it is rounded once, at the end.
    matrix = run(torch.eye(spec.size, dtype=torch.float64, device=device), tensors).T
    assert_no_worse(out, plain_product(v.float(), matrix).to(dtype), run(v.double(), tensors))


@pytest.mark.parametrize(("size", "block"), SIZES, ids=str)
@pytest.mark.parametrize("direction", ["input", slow("output")])
def test_transform_is_as_exact_as_the_reference(size, block, direction, dtype, device):
    spec = HadamardSpec(side="in", size=size, block=block)
    check(spec, 3, dtype, device, direction)


@pytest.mark.parametrize("direction", ["input", "output"])
def test_transform_in_two_passes(direction, device, monkeypatch):
    # Orders that need two passes by themselves (10920, 65536) take seconds in the interpreter.
    monkeypatch.setattr(kernels, "MAX_LEFT", 20)
    kernels.passes.cache_clear()
    assert kernels.passes(5120) == (((4,), 64, True), ((20,), 256, False))
    check(HadamardSpec(side="in", size=5120), 2, torch.float32, device, direction)
    kernels.passes.cache_clear()


@pytest.mark.parametrize("order", [4096, 5120, 8192, 11008, 14336, 18944, 28672, 10920, 65536])
def test_passes_hold_all_factors(order):
    done = 1
    for sizes, post, has_sylvester in kernels.passes(order):
        if has_sylvester:
            done = post
        assert post == done
        done *= int(torch.tensor(sizes).prod())
    assert done == order


def test_output_undoes_input(device):
    spec = HadamardSpec(side="out", size=576)
    tensors = random_signs(576, device)
    v = random_activations(2, 576, torch.float32, device)
    with dispatch.force("triton"):
        there = dispatch.transform(v, spec, tensors, "input")
        back = dispatch.transform(there, spec, tensors, "output")
    assert torch.allclose(back, v, atol=3e-6)
    assert not torch.allclose(there, v, atol=0.1)


def test_leading_axes_and_no_tokens(device):
    spec = HadamardSpec(side="in", size=48)
    tensors = random_signs(48, device)
    v = random_activations(6, 48, torch.float32, device)
    with dispatch.force("triton"):
        flat = dispatch.transform(v, spec, tensors, "input")
        assert torch.equal(
            dispatch.transform(v.view(2, 3, 48), spec, tensors, "input"), flat.view(2, 3, 48)
        )
        assert dispatch.transform(v[:0], spec, tensors, "input").shape == (0, 48)


@pytest.mark.parametrize(
    ("size", "block"),
    BYTES_SIZES,
    ids=str,
)
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_a_transform_in_bytes(size, block, num_tokens, device, monkeypatch):
    activations = pytest.importorskip("vqllm_kernels.activations")
    allocate = activations.empty

    def poisoned(*args):
        out = allocate(*args)
        out.words.fill_(0x55555555)
        return out

    monkeypatch.setattr(activations, "empty", poisoned)
    spec, scale = HadamardSpec(side="in", size=size, block=block), ScaleSpec(side="in", size=size)
    tensors = random_signs(size, device)
    own = {"scale": torch.linspace(-2, 2, size).half().to(device)}
    wanted = activations.Wanted(
        padded_cols=-(-size // 32) * 32, factors=(0.5, 0.3), offsets=(1.5, -0.5)
    )
    v = random_activations(num_tokens, size, torch.float16, device)
    out = kernels.HadamardKernels().quantize(v, spec, tensors, [(scale, own)], wanted)
    hi, lo = out.words.view(torch.int8).double().unbind(1)
    integers = 256 * hi + lo
    assert bool((integers.abs().amax(-1) == activations.LEVELS[2]).all())
    assert not bool(integers[:, size:].any())
    odd = torch.arange(wanted.padded_cols, device=device) % 2
    factor, offset = torch.tensor([wanted.factors, wanted.offsets], device=device).double()
    step, total = out.step.double().unbind(1)
    torch.testing.assert_close(total, step * (integers @ offset[odd]), rtol=1e-5, atol=1e-4)
    exact = spec.input(scale.input(v.double(), own), tensors) * factor[odd[:size]]
    naive = spec.input(scale.input(v, own), tensors) * factor[odd[:size]].half()
    assert_no_worse((integers[:, :size] * step[:, None]).half(), naive, exact)


def test_what_is_transformed_to_bytes():
    def takes(size: int, block: int | None = None, dtype: torch.dtype = torch.bfloat16) -> bool:
        return kernels.HadamardKernels().quantizes(
            HadamardSpec(side="in", size=size, block=block), dtype
        )

    assert takes(4096)
    assert takes(8192)
    assert takes(8192, 128)
    assert not takes(11008)  # 172 rows
    assert not takes(14336, 128)  # 112 x 2 rows
    assert not takes(4096, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_in_bytes(bad, device):
    activations = pytest.importorskip("vqllm_kernels.activations")
    spec = HadamardSpec(side="in", size=64)
    v = random_activations(2, 64, torch.float16, device)
    v[1, 7] = bad
    wanted = activations.Wanted(padded_cols=64)
    out = kernels.HadamardKernels().quantize(v, spec, random_signs(64, device), (), wanted)
    assert bool(out.step[0].isfinite().all())
    assert bool(out.step[1].isnan().all())
